"""Tries cases on one of the broken disks, in this process.

What belongs here: how long to wait, and what came of it. What does not: starting the disks (``forkserver``).
"""

from __future__ import annotations

from collections.abc import Sequence

from tests.conformance.broken import FAULTS
from tests.conformance.broken.forkserver import Child, ForkServer
from vhostuser.conformance.bench import BackendBench, Device, Settings
from vhostuser.conformance.peer import Peer
from vhostuser.conformance.subject import Subject
from vhostuser.conformance.suite import Case, Result, judge_all

OPTIONS = {
    Device.BLK: "--socket-path={socket} --blk-file={image} --log-level=error --num-queues=2",
    Device.NET: "--socket-path={socket} --end=loopback --log-level=error --queue-pairs=2 --postcopy=always",
}
_JOBS = 4  # mostly waiting


class Forked(Subject):
    """A broken disk, made by the fork server."""

    def __init__(self, server: ForkServer, template: str, *, patience: float) -> None:
        super().__init__(None, template, patience=patience)
        self._server = server

    async def _spawn(self) -> Child:
        return self._server.start(self._command, self._output)


class BrokenBench(BackendBench):
    """A bench for the disk with the fault ``name``. Times are in seconds; keep: see ``Settings``."""

    def __init__(self, server: ForkServer, name: str, patience: float, quiet: float, *, keep: bool) -> None:
        device = FAULTS[name].device
        command = f"{name} {OPTIONS[device]}"
        super().__init__(Settings(None, command, keep, device, patience=patience, quiet=quiet, loops=True))
        self._server = server

    def _subject(self) -> Subject:
        return Forked(self._server, self.settings.command, patience=self.settings.patience)


async def tried(
    server: ForkServer, name: str, cases: Sequence[Case[Peer]], *, patience: float, quiet: float, keep: bool = False
) -> list[Result[Peer]]:
    """What comes of the cases on the disk with this fault, in any order. keep: for as long as they pass, with one."""
    bench = BrokenBench(server, name, patience, quiet, keep=keep)
    await bench.look()
    try:
        return [result async for result in judge_all(cases, bench, jobs=_JOBS, patience=10 * patience)]
    finally:
        await bench.close()
