"""Progress while a run goes on: lines of text, or one line that changes where ``rich`` is installed and a person looks.

Everything goes to stderr; what a run ends with is not progress.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Protocol, Self, TextIO


class Progress(Protocol):
    """What a run tells while it goes on."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def phase(self, what: str) -> None:
        """Something new begins."""

    def figures(self, pages: float, requests: float, words: str) -> None:
        """How far it is: fractions of all pages and all requests, and figures in words. Often."""


class Lines:
    """One line for each phase, and one a second in between."""

    def __init__(self, stream: TextIO, *, every: float = 1.0) -> None:
        self._stream = stream
        self._every = every
        self._start = self._last = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def phase(self, what: str) -> None:
        self._last = time.monotonic()
        print(f"[{self._last - self._start:6.2f} s] {what}", file=self._stream, flush=True)

    def figures(self, pages: float, requests: float, words: str) -> None:
        if time.monotonic() - self._last >= self._every:
            self.phase(f"pages {pages:4.0%}, requests {requests:4.0%}, {words}")


class Silent:
    """Says nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def phase(self, what: str) -> None:
        pass

    def figures(self, pages: float, requests: float, words: str) -> None:
        pass


class Bars:
    """Two bars that fill, by ``rich``. Raises ImportError without it."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Rich

        columns = TextColumn("{task.description:<10}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
        self._rich = Rich(*columns, TextColumn("{task.fields[words]}"), console=Console(stderr=True), transient=True)
        self._pages = self._rich.add_task("pages", total=1.0, words="")
        self._requests = self._rich.add_task("requests", total=1.0, words="")

    def __enter__(self) -> Self:
        self._rich.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._rich.stop()

    def phase(self, what: str) -> None:
        self._rich.update(self._requests, words=what)

    def figures(self, pages: float, requests: float, words: str) -> None:
        self._rich.update(self._pages, completed=pages, words=words)
        self._rich.update(self._requests, completed=requests)


def suited(stream: TextIO = sys.stderr, *, quiet: bool = False) -> Progress:
    """Bars for a terminal where ``rich`` is installed, else lines."""
    if quiet:
        return Silent()
    if stream.isatty():
        try:
            return Bars()
        except ImportError:
            pass
    return Lines(stream)
