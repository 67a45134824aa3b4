"""What passes the ends of network devices, in a pcapng file.

What belongs here: the file, its writer's thread, the end that stands before another one. What does not: packets, which
rings record in C and which no ring waits for (``native/capture.c``).
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from vhostuser import pcapng, threads
from vhostuser._native import ffi, lib
from vhostuser.devices.ends import End, EndError, made
from vhostuser.metrics import Kind, Metric, Sample

log = logging.getLogger("vhostuser")

LOST = Metric(
    "vhostuser_net_capture_lost_frames_total",
    Kind.COUNTER,
    "Frames that went their way and are not in the capture file.",
)

SNAP_LEAST: Final = lib.VU_FRAME_LEAST
SNAP_MOST: Final = lib.VU_FRAME_MOST
"""Bytes: an Ethernet header, and the longest frame."""
_ETHERNET = 1  # LINKTYPE_ETHERNET
_PATIENCE = 1.0  # seconds in which a slow file may take what is left at the end


class Capture:
    """A file that is written by a thread of its own, from here on until ``close``.

    What the file does not take, because it is slow or the disk is full, is counted and told once; frames never wait.
    """

    def __init__(self, path: str, ports: Sequence[str], *, snap: int = SNAP_MOST) -> None:
        """Makes the file, readable by its owner alone, or empties it. ports: names of interfaces, whose numbers are
        those of ``end``. snap: bytes of each frame that are kept at most. Raises EndError."""
        self._path = path
        error = ffi.new("int *")
        self._native = ffi.gc(made(lib.vu_capture_new(len(ports), snap, error), error, str(self)), lib.vu_capture_free)
        head = pcapng.section("vhostuser-net") + b"".join(pcapng.interface(_ETHERNET, name, snap) for name in ports)
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            os.write(self._file, head)
        except OSError as failed:
            raise EndError(f"{self}: {failed.strerror}") from None
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threads.spawn(self._write, "capture")

    def end(self, inner: End, port: int) -> Captured:
        """The end of a device whose frames go on to ``inner``. Raises EndError."""
        return Captured(self, self._native, inner, port)

    def lost(self, port: int) -> int:
        """Frames of that port that are not in the file."""
        return int(lib.vu_capture_lost(self._native, port))

    def close(self) -> None:
        """Ends the file with what was recorded up to now, or without it if it takes longer than a second. May be called
        more than once; blocks."""
        if self._stop < 0:
            return
        os.eventfd_write(self._stop, 1)
        self._thread.join(_PATIENCE)
        if self._thread.is_alive():
            log.warning("%s: the last frames are not in it: it is too slow", self)
            return
        os.close(self._stop)
        os.close(self._file)
        self._stop = -1

    def _write(self) -> None:
        while code := lib.vu_capture_write(self._native, self._file, self._stop):
            reason = "it is too slow" if code == lib.VU_CAPTURE_SLOW else os.strerror(ffi.errno or errno.EIO)
            log.warning("%s: frames are missing in it from here on: %s; %s counts them", self, reason, LOST.name)

    def __str__(self) -> str:
        return f"capture {self._path}"


class Captured(End):
    """An end that records what passes the one behind it, and is otherwise that one."""

    def __init__(self, capture: Capture, native: object, inner: End, port: int) -> None:
        self._capture = capture
        self._inner = inner
        self._port = port
        self.pairs = inner.pairs
        self.offloads = inner.offloads
        self.linked = inner.linked
        error = ffi.new("int *")
        self.native = ffi.gc(
            made(lib.vu_capture_end(native, inner.native, port, error), error, str(self)), lib.vu_end_free
        )

    async def attend(self, linked: Callable[[bool], None]) -> None:
        """Until it is cancelled; then the file is whole."""
        try:
            await self._inner.attend(linked)
            await asyncio.get_running_loop().create_future()
        finally:
            self._capture.close()

    def stop(self) -> None:
        self._inner.stop()

    def state(self) -> dict[str, object]:
        return self._inner.state()

    def measure(self) -> Iterator[Sample]:
        yield LOST.sample(self._capture.lost(self._port))
        yield from self._inner.measure()

    def close(self) -> None:
        self._inner.close()

    def __str__(self) -> str:
        return str(self._inner)
