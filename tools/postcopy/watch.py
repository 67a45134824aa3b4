"""Watching over a run: losses, the control socket, requests that nothing holds up and that are not completed.

What belongs here: what is looked at again and again, and when patience ends. What does not: the order of the run
(``run``), what a finding means (``rules``).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from vhostuser.tools.postcopy.bench import Bench
from vhostuser.tools.postcopy.handshake import StepFailed
from vhostuser.tools.postcopy.load import Load, Open
from vhostuser.tools.postcopy.plan import Request
from vhostuser.tools.postcopy.progress import Progress
from vhostuser.tools.postcopy.record import Stuck

_TICK = 0.02
_PROBE_EVERY = 0.1


class Watch:
    """Watches over a bench in use; on the loop's thread.

    Everything raises StepFailed when a back-end does not let the run go on, and PagesError when the machine does not.
    """

    def __init__(self, bench: Bench, progress: Progress) -> None:
        self._bench = bench
        self._progress = progress
        self._patience = bench.options.patience
        self._whole_since: dict[tuple[int, int, int], float] = {}
        self._given: set[int] = set()
        self._probed = 0.0

    async def until(self, done: Callable[[], bool]) -> None:
        """Returns when ``done``."""
        while not done():
            await asyncio.sleep(_TICK)
            self._bench.pages.check()
            for each in self._bench.conversations:
                await each.look_for_loss()
            await self._probe_now_and_then()
            self._tell_progress()
            self._look_for_stuck()

    async def first_faults(self) -> None:
        """While nothing is placed: until each back-end waits, or has shown that it will not; then it is asked
        something."""
        bench, end = self._bench, time.monotonic() + self._patience
        for each, load in zip(bench.conversations, bench.loads, strict=True):
            while not (bench.pages.waiting(each.index) or load.done or bench.guest.present or time.monotonic() > end):
                await each.look_for_loss()
                await asyncio.sleep(_TICK)
        await self._probe()

    async def _probe_now_and_then(self) -> None:
        if time.monotonic() - self._probed >= _PROBE_EVERY:
            await self._probe()
            self._probed = time.monotonic()

    async def _probe(self) -> None:
        for each in self._bench.conversations:
            if not await each.probe(waiting=self._bench.pages.waiting(each.index)):
                raise StepFailed

    def _tell_progress(self) -> None:
        loads, pages = self._bench.loads, self._bench.pages
        done, open_ = sum(len(load.done) for load in loads), sum(len(load.open) for load in loads)
        faults = sum(pages.count(load.client) for load in loads)
        part = min(1.0, done / self._bench.record.planned)
        self._progress.figures(pages.received / pages.total, part, f"{faults} faults, {open_} requests open")

    def _look_for_stuck(self) -> None:
        now = time.monotonic()
        for load in self._bench.loads:
            for head, one in list(load.open.items()):
                self._look_at(load, head, one, now)
        if self._bench.record.stuck:
            raise StepFailed

    def _look_at(self, load: Load, head: int, one: Open, now: float) -> None:
        """A request is stuck when it is open for too long after the last of its pages was there.

        One that is open for as long with pages missing may be of a back-end whose faults we do not see: its pages come
        now, and if that does not help, it is stuck next.
        """
        plan, pages = self._bench.plan, self._bench.pages
        missing = pages.missing(plan.pages([*one.request.areas, plan.rings[load.client]]))
        if missing:
            if now - max(one.offered, self._bench.record.released) / 1e9 > self._patience:
                pages.bring(missing - self._given)
                self._given |= missing
            return
        since = self._whole_since.setdefault((load.client, head, one.offered), now)
        if now - since > self._patience:
            self._note_stuck(load.client, one.request, now - since)

    def _note_stuck(self, client: int, request: Request, seconds: float) -> None:
        plan = self._bench.plan
        asleep = self._bench.conversations[client].subject.asleep()
        # Many requests ask for the ring and the slots: they tell of this one only while a thread sleeps.
        needed = plan.pages([*request.areas, plan.rings[client]] if asleep else request.segments)
        asked = sum(event.client == client and event.guest in needed for event in self._bench.pages.faults())
        self._bench.record.stuck.append(Stuck(client, request.number, seconds, asked, asleep))
