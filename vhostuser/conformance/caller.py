"""The front-end under test: one that is started, or one that runs already and connects by itself.

What belongs here: processes, the socket on which the front-end meets us, how it ends. What does not: what is said on
the socket (``standin``).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

from vhostuser.conformance.subject import command_of
from vhostuser.conformance.suite import Unreachable

_AGAIN = 0.01
# A busy machine takes its time to start a program; its answers are another matter.
_STARTING = 10.0


class Running(Protocol):
    """A front-end that was started."""

    async def wait(self) -> int:
        """Its exit status, when it has ended: as of subprocess, negative for a signal."""

    def ask(self) -> None:
        """Asks it to end, as SIGTERM does. Again: nothing."""

    def kill(self) -> None:
        """Ends it whether it listens or not. Again: nothing."""

    def words(self) -> str:
        """What it said last, a line."""


Launch = Callable[[Path, Path], Awaitable[Running]]
"""Starts a front-end for the socket at the first path; the second is a directory of its own. Raises Unreachable."""


class Process:
    """A process of ours, with a process group of its own, and a file for its words."""

    def __init__(self, process: asyncio.subprocess.Process, output: Path) -> None:
        self._process = process
        self._output = output

    async def wait(self) -> int:
        return await self._process.wait()

    def ask(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def words(self) -> str:
        lines = self._output.read_text(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


def command(template: str) -> Launch:
    """Starts a command in which {socket}, {directory} and {image} stand for things of its own, see ``command_of``."""

    async def launch(path: Path, directory: Path) -> Running:
        _, words = command_of(template, directory)
        output = directory / "output"
        with output.open("ab") as file:
            try:
                process = await asyncio.create_subprocess_exec(
                    *words, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
                )
            except OSError as error:
                raise Unreachable(f"{words[0]} cannot be started: {error.strerror}") from None
        return Process(process, output)

    return launch


class Meeting:
    """Where a front-end meets us: we listen, or connect to it. Owns the listening socket and its path."""

    def __init__(self, path: Path, *, connect: bool) -> None:
        self._path = path
        self.connects = connect
        self._listener: socket.socket | None = None
        if connect:
            return
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._listener.setblocking(False)
            self._listener.bind(str(path))
            self._listener.listen()
        except OSError as error:
            self._listener.close()
            raise Unreachable(f"{path}: {error.strerror or error}") from None

    async def next(self) -> socket.socket:
        """The next connection, waited for without end."""
        loop = asyncio.get_running_loop()
        if self._listener is not None:
            return (await loop.sock_accept(self._listener))[0]
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.setblocking(False)
            try:
                await loop.sock_connect(sock, str(self._path))
                return sock
            except OSError:
                sock.close()
            except BaseException:
                sock.close()
                raise
            await asyncio.sleep(_AGAIN)

    def close(self) -> None:
        """Stops listening. Again: nothing."""
        if self._listener is not None and self._listener.fileno() >= 0:
            self._listener.close()
            self._path.unlink(missing_ok=True)


class Caller:
    """One front-end, from its start to its end. Owns its process and directory, if it was started.

    path: where it connects to by itself, where there is no ``launch``. connect: it listens, we connect.
    """

    def __init__(self, path: Path | None, launch: Launch | None, *, connect: bool, patience: float) -> None:
        self._launch = launch
        self._patience = patience
        self._directory = tempfile.TemporaryDirectory(prefix="conform-")
        own = Path(self._directory.name)
        self._own = own
        self._path = own / "socket" if path is None or launch is not None else path
        self._connect = connect
        self.meeting: Meeting | None = None
        self.running: Running | None = None
        self.ended: asyncio.Future[int] | None = None
        self._asked = False

    async def start(self) -> Meeting:
        """Begins to listen, and starts the front-end. Raises Unreachable."""
        self.meeting = Meeting(self._path, connect=self._connect)
        if self._launch is not None:
            self.running = await self._launch(self._path, self._own)
            self.ended = asyncio.ensure_future(self.running.wait())
        return self.meeting

    @property
    def starting(self) -> float:
        """Seconds to wait for its first connection."""
        return max(self._patience, _STARTING) if self._launch is not None else self._patience

    @property
    def status(self) -> int | None:
        """How it has ended; None: it has not, or is not ours."""
        return self.ended.result() if self.ended is not None and self.ended.done() else None

    @property
    def crash(self) -> str:
        """The signal that ended it unasked, with its last words; empty if there was none."""
        status = self.status
        if status is None or status >= 0 or (self._asked and -status in (signal.SIGTERM, signal.SIGKILL)):
            return ""
        assert self.running is not None
        name, words = signal.Signals(-status).name, self.running.words()
        return f"{name} ({words})" if words else name

    @property
    def end(self) -> str:
        """Its exit status and last words; empty if it has not ended."""
        if self.status is None or self.running is None:
            return ""
        words = self.running.words()
        return f"status {self.status} ({words})" if words else f"status {self.status}"

    async def stop(self) -> bool:
        """Asks it to end, and waits. Has it, in time? One that is not ours has."""
        if self.running is None or self.ended is None:
            return True
        if self.status is None and not self._asked:
            self._asked = True
            self.running.ask()
        done, _ = await asyncio.wait((self.ended,), timeout=self._patience)
        return bool(done)

    async def close(self) -> None:
        """Ends it, listens no more, removes its directory."""
        if self.meeting is not None:
            self.meeting.close()
        if self.running is not None and self.ended is not None:
            self.running.kill()
            with contextlib.suppress(asyncio.CancelledError):
                await self.ended
        self._directory.cleanup()
