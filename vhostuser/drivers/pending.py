"""Requests under way on a ring, awaited by tasks of one loop.

What belongs here: who waits for which answer, and who of them looks at the ring. What does not: what is asked (``blk``,
``plain``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from vhostuser.frontend.ring import FrontendRing

A = TypeVar("A")


class Pending(Generic[A]):
    """What tasks wait for on one ring. collect: what was answered since it was called last, by head.

    *Touches*: not in postcopy.
    """

    def __init__(self, ring: FrontendRing, collect: Callable[[], Sequence[tuple[int, A]]]) -> None:
        self._ring = ring
        self._collect = collect
        self._answers: dict[int, asyncio.Future[A]] = {}
        self._turn = asyncio.Lock()
        self._collected = 0

    async def answer(self, head: int) -> A:
        """The answer to a request that was just published; no task may have been let run since. Raises QueueBroken.

        One that is cancelled leaves the request to the device.
        """
        answered: asyncio.Future[A] = asyncio.get_running_loop().create_future()
        self._answers[head] = answered
        while not answered.done():
            await self.progress()
        return answered.result()

    async def progress(self) -> None:
        """Waits until some request is answered: one task at a time, for all. Raises QueueBroken."""
        seen = self._collected
        async with self._turn:
            if self._collected != seen:
                return  # another task's turn brought what this one waits for, and there may be nothing more to come
            if not self._take() and not self._ring.queue.arm():
                await self._ring.called()

    def _take(self) -> bool:
        collected = self._collect()
        self._collected += len(collected)
        for head, answer in collected:
            future = self._answers.pop(head)
            if not future.done():
                future.set_result(answer)
        return bool(collected)
