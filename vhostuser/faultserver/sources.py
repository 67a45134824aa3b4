"""Where the pages of a fault server come from: a mapped file, or whatever answers when it is asked.

What belongs here: the contract between a source and the server, and the sources of one machine. What does not: the
stream to another process (``stream``), placing and waking (``server``).

There are two kinds. A *mapped* source is memory of this process: the server places from it in C, and Python never runs
for a fault. Any other source is run by the server on threads of its own and asks its ``Feed`` what to bring; what
somebody waits for is always named first.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, Self, runtime_checkable

from vhostuser._native import ffi
from vhostuser.protocol import VhostUserError


class SourceLost(VhostUserError):
    """The source cannot bring pages any more. The server pauses; ``FaultServer.resume`` asks it, or another, again."""


class PageLost(VhostUserError):
    """The source is fine, but does not have these pages and never will."""


class Ask(NamedTuple):
    """What to bring: ``length`` bytes from guest address ``guest``, whole pages of one region."""

    guest: int
    length: int
    demanded: bool
    """Somebody waits for it."""


class Feed(Protocol):
    """What a source knows of the server. Any of its threads may call any method."""

    def next(self, *, background: bool = True, most: int = 1 << 18, until: int = -1) -> Ask | None:
        """What to bring next, waiting for it; None when the source has to end, or the descriptor ``until`` is readable.

        background: also what nobody waits for, at most ``most`` bytes of it at a time and always whole pages. What is
        demanded is one page. Each thing is named once, until the source was lost; a page that somebody begins to wait
        for after it was named as background is named again.
        """

    def ask_again(self) -> None:
        """Names everything that is missing once more, to whoever asks: part of a source was lost, and others go on."""

    @property
    def ended(self) -> bool:
        """Whether the source has to end: the server was closed, or another source takes over."""

    def end(self) -> None:
        """Ends ``next`` for every thread of the source, which cannot bring anything any more."""

    def place(self, guest: int, data: bytes | bytearray | memoryview | int) -> int:
        """Places bytes at guest address ``guest``, or, if ``data`` is a number, so many zero bytes; whole pages of one
        region. Pages that are there already are dropped. Returns how many were placed."""

    def lose(self, guest: int, length: int) -> None:
        """These pages never come: whoever touches one of them gets SIGBUS, as after ``FaultServer.poison``. Where the
        kernel has no UFFDIO_POISON they go on waiting."""


@runtime_checkable
class PageSource(Protocol):
    """A source that is asked."""

    threads: int
    """How many threads run ``run``."""

    def run(self, feed: Feed, number: int) -> None:
        """Brings pages until ``feed.next`` returns None; on thread ``number``, from 0.

        Raises SourceLost or OSError. Any other exception, and an end before that None, count as the loss of the source
        too.
        """

    def interrupt(self) -> None:
        """Ends what ``run`` may wait for, apart from ``feed.next``. From any thread, at any time."""

    def close(self) -> None:
        """Lets go of what it has. Not while it runs."""


class MappedPiece(NamedTuple):
    """``size`` bytes for guest address ``guest`` lie at address ``host`` of this process."""

    guest: int
    size: int
    host: int


@runtime_checkable
class MappedSource(Protocol):
    """A source that is memory of this process. The pieces are read by the kernel only, and not while placing has
    ended."""

    pieces: Sequence[MappedPiece]

    def close(self) -> None:
        """Unmaps. The server must have been closed before."""


class FilePiece(NamedTuple):
    """``size`` bytes for guest address ``guest`` begin at ``offset`` of the file behind descriptor ``fd``."""

    guest: int
    size: int
    fd: int
    offset: int = 0


class MappedFile:
    """Files mapped read-only: lazy restore from an image, or another memory on the same machine.

    A page that the disk has not yet read holds up the whole fault thread: for slow media take ``FileSource``. A file
    that is truncated meanwhile pauses the server (EFAULT).
    """

    def __init__(self, *files: FilePiece) -> None:
        """The descriptors stay the caller's and may be closed at once. Offsets are multiples of the page size."""
        self._maps = [mmap.mmap(file.fd, file.size, prot=mmap.PROT_READ, offset=file.offset) for file in files]
        self._views = [ffi.from_buffer(each) for each in self._maps]
        self.pieces: Sequence[MappedPiece] = tuple(
            MappedPiece(file.guest, file.size, int(ffi.cast("uintptr_t", view)))
            for file, view in zip(files, self._views, strict=True)
        )

    def close(self) -> None:
        """Again: nothing."""
        while self._views:
            ffi.release(self._views.pop())
            self._maps.pop().close()


class CallableSource:
    """A function that returns bytes.

    fetch(guest, length): exactly ``length`` bytes; raises SourceLost or OSError if they cannot be had now, PageLost if
    some of them never can: in the background they are then skipped, and who waits for one gets an error. It is called
    by ``threads`` threads at a time, of which all but one, if there are several, also bring background pages, at most
    ``most`` bytes in a call.
    """

    def __init__(self, fetch: Callable[[int, int], bytes], *, threads: int = 2, most: int = 1 << 18) -> None:
        if threads < 1 or most < 1:
            raise ValueError(f"threads and most must be 1 or more, not {threads} and {most}")
        self.threads = threads
        self._fetch = fetch
        self._most = most

    def run(self, feed: Feed, number: int) -> None:
        background = number > 0 or self.threads == 1
        while (ask := feed.next(background=background, most=self._most)) is not None:
            try:
                data = self._fetch(ask.guest, ask.length)
            except PageLost:
                if ask.demanded:
                    feed.lose(ask.guest, ask.length)
                continue
            if len(data) != ask.length:
                raise SourceLost(f"{len(data)} bytes for guest address {ask.guest:#x}, {ask.length} were asked for")
            feed.place(ask.guest, data)

    def interrupt(self) -> None:
        """``fetch`` has to come back by itself."""

    def close(self) -> None:
        """Nothing to let go of."""


class FileSource(CallableSource):
    """Files that are read with pread: a slow disk holds up only those who wait for it. The descriptors are the caller's
    and stay open while the source is in use; ``threads`` pages are read at a time."""

    def __init__(self, *files: FilePiece, threads: int = 4) -> None:
        self._files = files
        super().__init__(self._read, threads=threads)

    @classmethod
    def image(cls, path: Path, regions: Sequence[tuple[int, int]]) -> Self:
        """A file in which the regions (guest address, bytes) lie one after the other."""
        source = cls(*image_pieces(os.open(path, os.O_RDONLY | os.O_CLOEXEC), regions))
        source._opened = [source._files[0].fd]
        return source

    _opened: Sequence[int] = ()

    def _read(self, guest: int, length: int) -> bytes:
        for file in self._files:
            if file.guest <= guest and guest + length <= file.guest + file.size:
                data = os.pread(file.fd, length, file.offset + guest - file.guest)
                if len(data) == length:
                    return data
                raise SourceLost(f"the file ends before guest address {guest + length:#x}")
        raise SourceLost(f"no file holds {length} bytes at guest address {guest:#x}")

    def close(self) -> None:
        """Closes what ``image`` has opened. Again: nothing."""
        for fd in self._opened:
            os.close(fd)
        self._opened = ()


def image_pieces(fd: int, regions: Sequence[tuple[int, int]]) -> list[FilePiece]:
    """The pieces of a file in which the regions (guest address, bytes) lie one after the other."""
    pieces, offset = [], 0
    for guest, size in regions:
        pieces.append(FilePiece(guest, size, fd, offset))
        offset += size
    return pieces
