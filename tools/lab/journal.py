"""An append-only list on which tasks wait for an entry. Everything the bench hears from a child passes through one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

from vhostuser.tools.lab.errors import LabError

T = TypeVar("T")


class Journal(Generic[T]):
    """What a peer said, in order, until it went away.

    ``entries`` may be read at any time. Belongs to one event loop.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.entries: list[T] = []
        self._closed = False
        self._changed = asyncio.Event()

    def append(self, entry: T) -> None:
        """Add one entry and wake whoever waits."""
        self.entries.append(entry)
        self._changed.set()

    def close(self) -> None:
        """No entry will follow; whoever waits is told so."""
        self._closed = True
        self._changed.set()

    async def find(self, wanted: Callable[[T], bool], what: str, *, start: int = 0, within: float = 30) -> T:
        """The first entry from index ``start`` on for which ``wanted`` holds, awaited for ``within`` seconds.

        Raises ``LabError``, which calls the entry ``what``, if the time is over or the journal closed.
        """
        try:
            async with asyncio.timeout(within):
                return await self._find(wanted, what, start)
        except TimeoutError:
            raise LabError(f"{self.name}: no {what} within {within:g} s") from None

    async def _find(self, wanted: Callable[[T], bool], what: str, index: int) -> T:
        while True:
            for entry in self.entries[index:]:
                index += 1
                if wanted(entry):
                    return entry
            if self._closed:
                last = f", its last word: {self.entries[-1]}" if self.entries else ""
                raise LabError(f"{self.name} ended while we waited for {what}{last}")
            self._changed.clear()
            await self._changed.wait()
