"""The back-end under test: one that runs already, or one that is started, killed and started again.

What belongs here: processes and sockets. What does not: what is said on the socket (``peer``).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
import socket
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from vhostuser.conformance.suite import Unreachable, Violation
from vhostuser.frontend import Frontend

_IMAGE = 64 << 20
_AGAIN = 0.01
# A busy machine takes its time to start a program; its answers are another matter.
_STARTING = 10.0
_LEAVING = 0.5
_UCRED = struct.Struct("3i")


class Process(Protocol):
    """What is asked of a process that was started."""

    @property
    def pid(self) -> int: ...
    @property
    def returncode(self) -> int | None: ...
    async def wait(self) -> int: ...


class Subject:
    """A back-end that listens on ``path``, or a process of ours, made of ``template`` by the first ``connect``.

    template: see ``command_of``. once: it serves one front-end and ends, so that each connection needs a new process.
    patience: seconds to wait for each of its answers, and for it to listen unless we start it. Owns the process and a
    directory for it.
    """

    def __init__(self, path: Path | None, template: str = "", *, patience: float, once: bool = False) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="conform-")
        directory = Path(self._directory.name)
        self._command: Sequence[str] = ()
        if template:
            path, self._command = command_of(template, directory)
        assert path is not None
        self._path = path
        self._patience = patience
        self._once = once
        self._output = directory / "output"
        self._process: Process | None = None
        self._visited = False
        self._killed = False
        self.pid: int | None = None
        """Of the process at the other end of the last connection, where the kernel tells."""

    async def connect(self) -> Frontend:
        """A new connection; starts the process if it does not run. Raises Unreachable."""
        if self._once and self._visited:
            await self._ended(self._patience)
        if self._command and not self.lives:
            self._check_end()
            await self._start()
        sock = await self._connected()
        self._visited = True
        with contextlib.suppress(OSError):
            self.pid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))[0]
        frontend = Frontend(sock)
        frontend.timeout = self._patience
        return frontend

    async def _start(self) -> None:
        self._path.unlink(missing_ok=True)
        self._visited = self._killed = False
        self._process = await self._spawn()

    async def _spawn(self) -> Process:
        """The process, in a group of its own; its output goes to ``_output``. Raises Unreachable."""
        with self._output.open("ab") as output:
            try:
                return await asyncio.create_subprocess_exec(
                    *self._command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
                )
            except OSError as error:
                raise Unreachable(f"{self._command[0]} cannot be started: {error.strerror}") from None

    async def _connected(self) -> socket.socket:
        """Tries until somebody listens: a connection made only to look would count as a front-end."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + (max(self._patience, _STARTING) if self._command else self._patience)
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.setblocking(False)
            try:
                await loop.sock_connect(sock, str(self._path))
                return sock
            except OSError as error:
                sock.close()
                if self._command and not self.lives:
                    await self._start_again()
                if loop.time() > deadline:
                    raise Unreachable(f"{self._path}: {error.strerror or error}") from None
            await asyncio.sleep(_AGAIN)

    def _check_end(self) -> None:
        """Raises Violation if our process was ended by a signal that was not ours."""
        status = 0 if self._process is None else self._process.returncode or 0
        if status < 0 and not self._killed:
            raise Violation("the process to survive what a front-end does", self._end())

    async def _start_again(self) -> None:
        """For a back-end that serves one front-end and ends, while we come with the next."""
        self._check_end()
        if not self._visited:
            raise Unreachable(f"the back-end ended: {self._end()}")
        await self._start()

    async def kill(self) -> None:
        """Ends our process as a crash would (SIGKILL)."""
        self._killed = True
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            await self._process.wait()

    async def _ended(self, within: float) -> None:
        """Returns when our process has ended, or after so many seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within):
                if self._process is not None:
                    await self._process.wait()

    async def leaves(self) -> bool:
        """Did our process end by itself, well, now that its front-end has gone?"""
        await self._ended(_LEAVING)
        return self._process is not None and self._process.returncode == 0

    @property
    def lives(self) -> bool:
        """Is there a process of ours that has not ended?"""
        return self._process is not None and self._process.returncode is None

    async def close(self) -> None:
        """Ends our process and removes its directory."""
        await self.kill()
        self._directory.cleanup()

    async def spins(self, seconds: float) -> bool:
        """Does a thread of the back-end use all the processor time that it can get, for so long?

        One that only looks now and then runs for less than a millisecond at a time; one that spins, until it is made to
        wait, and it never waits for anything else.
        """
        before = self._threads()
        await asyncio.sleep(seconds)
        for thread, (ran, waited, turns) in self._threads().items():
            ran_before, waited_before, turns_before = before.get(thread, (ran, waited, turns))
            busy = ran - ran_before + waited - waited_before
            if busy > 0.8e9 * seconds and ran - ran_before > 1e6 * (turns - turns_before):
                return True
        return False

    def _threads(self) -> dict[str, tuple[int, int, int]]:
        """Nanoseconds that each thread of the back-end ran and waited to run, and how many times it ran."""
        found = {}
        for path in Path(f"/proc/{self.pid}/task").glob("*/schedstat"):
            with contextlib.suppress(OSError):
                ran, waited, turns = map(int, path.read_text().split())
                found[path.parent.name] = ran, waited, turns
        return found

    async def survived(self, quiet: float) -> None:
        """Raises Violation if our process was ended by a signal that was not ours, now or within ``quiet`` seconds."""
        await self._ended(quiet)
        self._check_end()

    def _end(self) -> str:
        """How our process ended, and its last words."""
        assert self._process is not None
        status = self._process.returncode or 0
        how = signal.Signals(-status).name if status < 0 else f"status {status}"
        lines = self._output.read_text(errors="replace").split("\n")
        words = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"{how} ({words})" if words else how


def command_of(template: str, directory: Path) -> tuple[Path, list[str]]:
    """The socket and the words of a command in which {socket}, {directory} and {image} stand for things in
    ``directory``; the image is made, 64 MiB of zeros. Raises ValueError for a template without {socket}."""
    if "{socket}" not in template:
        raise ValueError("the command has no {socket}: put it where the back-end's option wants the path")
    path, image = directory / "socket", directory / "image"
    if "{image}" in template:
        with image.open("wb") as file:
            file.truncate(_IMAGE)
    names = {"{socket}": str(path), "{directory}": str(directory), "{image}": str(image)}
    words = shlex.split(template)
    for name, value in names.items():
        words = [word.replace(name, value) for word in words]
    return path, words
