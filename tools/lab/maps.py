"""A process's mappings of shared memory, from ``/proc/PID/maps``, to compare addresses of two processes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class FilePlace:
    """One byte of one file, whatever address it is mapped at."""

    device: str
    inode: int
    offset: int


@dataclass(frozen=True)
class Mapping:
    """One line of ``/proc/PID/maps``; ``end`` is exclusive, ``place`` the file's byte at ``start``."""

    start: int
    end: int
    place: FilePlace
    name: str


def mappings(pid: int) -> list[Mapping]:
    """All mappings of the process, in the order of their addresses."""
    return [_mapping(line) for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]


def place_of(pid: int, address: int) -> FilePlace | None:
    """Which byte of which file the process has at ``address``, None if there is no mapping of a file."""
    for mapping in mappings(pid):
        if mapping.start <= address < mapping.end and mapping.place.inode:
            place = mapping.place
            return FilePlace(place.device, place.inode, place.offset + address - mapping.start)
    return None


def _mapping(line: str) -> Mapping:
    span, _, offset, device, inode, *name = line.split(maxsplit=5)
    start, end = (int(bound, 16) for bound in span.split("-"))
    return Mapping(start, end, FilePlace(device, int(inode), int(offset, 16)), name[0] if name else "")
