"""The back-end under test: its process, if we start it, and what the kernel tells of it.

What belongs here: starting, connecting, ``/proc``. What does not: what is said on the socket (``handshake``).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
import socket
import struct
from pathlib import Path
from typing import NamedTuple, Self

from vhostuser.tools.lab.errors import LabError
from vhostuser.tools.lab.maps import FilePlace, place_of
from vhostuser.tools.lab.process import Process

_AGAIN = 0.02
"""Seconds between two attempts to connect."""
_START = 10.0
"""Seconds that a back-end may take to start, however impatient the run is: it is not judged by that."""
_PEER = struct.Struct("3i")


class SubjectError(Exception):
    """The back-end cannot be started or reached: one line."""


class Place(NamedTuple):
    """The files of one back-end: of its socket, of its disk, of its wake channel's socket."""

    socket: Path
    disk: Path
    wake: Path


def command_line(template: str, number: int, place: Place) -> list[str]:
    """The words of a command in which ``{socket}``, ``{disk}``, ``{wake}`` and ``{number}`` stand for the files and the
    number of this back-end. Raises ValueError for quotes that do not match."""
    names = {"{socket}": place.socket, "{disk}": place.disk, "{wake}": place.wake, "{number}": number}
    words = shlex.split(template)
    for name, value in names.items():
        words = [word.replace(name, str(value)) for word in words]
    return words


class Subject:
    """One back-end: an async context manager that ends its process if we have started it.

    command: what to start, or None for one that runs already.
    """

    def __init__(self, name: str, place: Place, command: list[str] | None, patience: float) -> None:
        self.name = name
        self.place = place
        self.pid: int | None = None
        self._patience = max(patience, _START)
        self._process = Process(name, command) if command else None

    async def __aenter__(self) -> Self:
        if self._process is not None:
            try:
                await self._process.__aenter__()
            except FileNotFoundError as error:
                raise SubjectError(f"{error.filename}: no such command, needed to start the back-end") from None
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._process is None:
            return
        self._process.send(signal.SIGTERM)
        with contextlib.suppress(LabError):
            await self._process.ended(1.0)
        # The whole group: a command that is a script may leave the back-end itself behind.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(LabError):
            await self._process.__aexit__()

    async def connect(self) -> socket.socket:
        """A connected socket, the caller's; waits for a back-end that we have started. Raises SubjectError."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            async with asyncio.timeout(self._patience):
                await self._attempt(sock)
        except TimeoutError:
            sock.close()
            raise SubjectError(
                f"{self.place.socket}: {self.name} does not listen there after {self._patience:g} s{self._last_words()}"
            ) from None
        except OSError as error:
            sock.close()
            raise SubjectError(f"{self.place.socket}: {error.strerror}") from None
        except SubjectError:
            sock.close()
            raise
        self.pid = _PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))[0] or None
        return sock

    async def _attempt(self, sock: socket.socket) -> None:
        while True:
            try:
                return await asyncio.get_running_loop().sock_connect(sock, str(self.place.socket))
            except (FileNotFoundError, ConnectionRefusedError):
                if self._process is None:
                    raise
            if not self._process.running:
                raise SubjectError(f"{self.name} {await self._end()}{self._last_words()}")
            await asyncio.sleep(_AGAIN)

    async def ended(self) -> str:
        """How its process ended, after its connection was lost; empty if it lives on or is not ours."""
        if self._process is None:
            return ""
        with contextlib.suppress(LabError):
            return f"{await self._end()}{self._last_words()}"
        return ""

    async def _end(self) -> str:
        assert self._process is not None
        status = await self._process.ended(0.5)
        if status < 0:
            return f"was ended by {signal.Signals(-status).name}"
        return f"ended with status {status}"

    def _last_words(self) -> str:
        lines = self._process.output.entries if self._process is not None else []
        return f", its last words: {lines[-1]}" if lines else ""

    def mapped(self, address: int) -> FilePlace | None:
        """Which byte of which file it has there. Raises PermissionError and ProcessLookupError where it is not told."""
        if self.pid is None:
            raise ProcessLookupError
        try:
            return place_of(self.pid, address)
        except FileNotFoundError:
            raise ProcessLookupError from None

    def asleep(self) -> int | None:
        """Its threads that wait for a page right now; None where the kernel does not tell."""
        try:
            tasks = list(Path(f"/proc/{self.pid}/task").iterdir())
            where = [(task / "wchan").read_text() for task in tasks]
        except OSError:
            return None
        if set(where) <= {"0"}:  # what is told to those who may not know
            return None
        return where.count("handle_userfault")


def file_place(fd: int, offset: int) -> FilePlace:
    """A byte of our own file, as /proc/PID/maps names it."""
    status = os.fstat(fd)
    return FilePlace(f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}", status.st_ino, offset)
