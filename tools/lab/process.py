"""A child process that cannot outlive us, and the lines it prints."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Sequence

from vhostuser.tools.lab.errors import LabError
from vhostuser.tools.lab.journal import Journal

LINE_LIMIT = 1 << 20


class Process:
    """One child: an async context manager that has killed it when it is left.

    The kernel kills it when we die, by whatever cause. ``output`` holds the lines of its stdout and stderr.
    """

    def __init__(self, name: str, command: Sequence[str], *, pass_fds: Sequence[int] = ()) -> None:
        self.name = name
        self.command = tuple(command)
        self.output: Journal[str] = Journal(name)
        self._pass_fds = tuple(pass_fds)

    async def __aenter__(self) -> Process:
        self._process = await asyncio.create_subprocess_exec(
            *("setpriv", "--pdeathsig", "KILL", "--", *self.command),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            pass_fds=self._pass_fds,
            # A Ctrl-C is ours to turn into an orderly end of the children.
            start_new_session=True,
            limit=LINE_LIMIT,
        )
        try:
            self._pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError:  # it has ended, and asyncio was quicker to reap it
            self._pidfd = -1
        self._reader = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.kill()
        await self.ended()
        if self._pidfd >= 0:
            os.close(self._pidfd)

    @property
    def pid(self) -> int:
        """The process id (of the command itself: setpriv execs it)."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it has not been seen to end."""
        return self._process.returncode is None

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if it is still there."""
        # Not by the subprocess module, which would reap a child that has just ended and lose its status for asyncio.
        if self.running and self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def kill(self) -> None:
        """SIGKILL, if it is still there."""
        self.send(signal.SIGKILL)

    async def ended(self, within: float = 10) -> int:
        """Its exit status (negative: the signal) within ``within`` seconds, else ``LabError``."""
        try:
            async with asyncio.timeout(within):
                status = await self._process.wait()
                await self._reader
        except TimeoutError:
            raise LabError(f"{self.name} (pid {self.pid}) has not ended within {within:g} s") from None
        return status

    async def stop(self, within: float = 10) -> int:
        """SIGTERM; its exit status within ``within`` seconds, else ``LabError``."""
        self.send(signal.SIGTERM)
        return await self.ended(within)

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            self.output.append(line.decode(errors="replace").rstrip("\n"))
        self.output.close()
