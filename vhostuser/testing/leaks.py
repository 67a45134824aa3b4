"""What this process holds, before and after: descriptors and shared mappings.

What belongs here: looking at /proc. What does not: saying what ought to be held.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vhostuser.dataplane import new_event_loop


def open_fds() -> dict[int, str]:
    """This process's descriptors and what they are."""
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found[int(entry.name)] = str(entry.readlink())
        except OSError:  # the directory's own
            continue
    return found


def shared_mappings() -> Counter[str]:
    """How often each file is mapped shared into this process: guest memory, dirty logs, in-flight buffers."""
    lines = (line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines())
    return Counter(f"{fields[5]} (inode {fields[4]})" for fields in lines if len(fields) > 5 and fields[1][3] == "s")


@contextmanager
def no_open_fds() -> Iterator[None]:
    """Raises AssertionError, naming them, if the block leaves descriptors open."""
    new_event_loop().close()  # uvloop keeps a pipe for signals from its first loop on
    before = open_fds()
    yield
    left = {fd: what for fd, what in open_fds().items() if fd not in before}
    assert not left, f"descriptors left open: {left}"


@contextmanager
def no_mappings() -> Iterator[None]:
    """Raises AssertionError, naming them, if the block leaves files mapped.

    A mapping goes with the last reference to it: a queue, a map, a request. Cycles are collected before it is missed.
    """
    before = shared_mappings()
    yield
    if shared_mappings() - before:
        gc.collect()
    left = shared_mappings() - before
    assert not left, f"files left mapped: {dict(left)}"
