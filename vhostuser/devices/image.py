"""A raw disk image: a regular file or a block device, and who may write to it.

What belongs here: opening, size, alignment, the page cache and the lock, with errors that say what helps. What does
not: requests (``native/blk.c``) and configuration space (``blk``).

Between hosts on shared storage the image is handed over while a guest migrates. So it is open and locked only while
rings run: what the other host wrote is read anew, and what we wrote is on the medium before the lock is given back.

Everything here may block on slow storage; nothing may be called on the control thread but the constructor.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import stat
import struct
import threading

SECTOR = 512

# struct flock: type, whence, start, length (0: to the end), pid (0 for locks of an open file description).
_FLOCK = struct.Struct("hhqqi0q")


class ImageError(Exception):
    """The image cannot be used: one line with the path, what is wrong and what helps."""


class ImageBusy(ImageError):
    """Another process holds the lock; it may be about to hand the image over."""


class Image:
    """Describes the image at ``path`` and checks that it can be opened; the descriptor is closed again.

    ``block_size`` in bytes is a power of two of at least 512; the size must be a multiple of it. ``direct`` goes around
    the page cache (O_DIRECT). Raises ImageError.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, read_only: bool = False, direct: bool = False, block_size: int = SECTOR
    ) -> None:
        if block_size < SECTOR or block_size & (block_size - 1):
            raise ImageError(f"block size {block_size} is not a power of two of at least {SECTOR}")
        self.path = os.fspath(path)
        self.read_only = read_only
        self.direct = direct
        self.block_size = block_size
        self.size = 0
        """Bytes, when the image was last looked at."""
        self._open().close()

    @property
    def sectors(self) -> int:
        """The capacity: whole blocks, in sectors of 512 bytes."""
        return self.size // self.block_size * (self.block_size // SECTOR)

    def _open(self) -> OpenImage:
        """The image, open and checked, not locked."""
        flags = (os.O_RDONLY if self.read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            fd = os.open(self.path, flags | (os.O_DIRECT if self.direct else 0))
        except OSError as error:
            raise ImageError(f"{self.path}: {_reason(error, self)}") from None
        opened = OpenImage(self, fd)
        try:
            opened.check()
        except BaseException:
            opened.close()
            raise
        return opened

    def open(self) -> OpenImage:
        """Opens, locks and forgets what the page cache holds of it.

        Raises ImageBusy while another process has it locked, ImageError for anything else.
        """
        opened = self._open()
        try:
            opened.lock()
        except BaseException:
            opened.close()
            raise
        os.posix_fadvise(opened.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        opened.refresh()  # only now nobody else may be changing it
        return opened


class OpenImage:
    """Owns an open descriptor and, with it, the lock. ``refresh`` and ``close`` may be called from several threads."""

    def __init__(self, image: Image, fd: int) -> None:
        self._image = image
        self._guard = threading.Lock()
        self.fd = fd
        """The descriptor; -1 once closed."""

    def check(self) -> None:
        """Raises ImageError if requests could not be served."""
        path, block = self._image.path, self._image.block_size
        kind = os.fstat(self.fd).st_mode
        if not stat.S_ISREG(kind) and not stat.S_ISBLK(kind):
            raise ImageError(f"{path}: neither a regular file nor a block device")
        self.refresh()
        size = self._image.size
        if not size:
            raise ImageError(f"{path}: empty; give it a size, for example with truncate --size=1G")
        if size % block:
            raise ImageError(
                f"{path}: {size} bytes is not a multiple of the block size {block};"
                f" make it {size + block - size % block} with truncate --size"
            )
        if self._image.direct:
            self._check_direct()

    def _check_direct(self) -> None:
        """A medium with larger sectors than ours refuses unaligned lengths, which shows only when it is read."""
        with mmap.mmap(-1, max(self._image.block_size, mmap.PAGESIZE)) as page:
            try:
                os.preadv(self.fd, [memoryview(page)[: self._image.block_size]], 0)
            except OSError as error:
                larger = "; its sectors are larger: use --block-size=4096" if error.errno == errno.EINVAL else ""
                raise ImageError(f"{self._image.path}: direct read: {error.strerror}{larger}") from None

    def lock(self) -> None:
        """Locks the whole file, for writing or for reading; QEMU's own image locks are bytes of it, so they count."""
        kind = fcntl.F_RDLCK if self._image.read_only else fcntl.F_WRLCK
        try:
            fcntl.fcntl(self.fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0))
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise ImageBusy(f"{self._image.path}: another process has it open for writing") from None
            raise ImageError(f"{self._image.path}: cannot be locked: {error.strerror}") from None

    def refresh(self) -> None:
        """Puts the size of now into ``Image.size``; leaves it as it is when the storage does not tell."""
        with self._guard, contextlib.suppress(OSError):
            if self.fd >= 0:
                self._image.size = os.lseek(self.fd, 0, os.SEEK_END)

    def sync(self) -> None:
        """Raises ImageError if what was written did not reach the medium."""
        try:
            os.fdatasync(self.fd)
        except OSError as error:
            raise ImageError(f"{self._image.path}: writes were lost: {error.strerror}") from None

    def close(self) -> None:
        """Closes the descriptor, which gives the lock back."""
        with self._guard:
            if self.fd >= 0:
                os.close(self.fd)
                self.fd = -1


def _reason(error: OSError, image: Image) -> str:
    """What went wrong when it was opened, and the cure where there is one."""
    match error.errno:
        case errno.EINVAL if image.direct:
            return "this file system has no direct I/O: use --cache=writeback"
        case errno.EROFS:
            return "on a read-only file system: use --read-only"
        case errno.EACCES | errno.EPERM if not image.read_only and os.access(image.path, os.R_OK, effective_ids=True):
            return "may be read but not written: use --read-only, or change its mode"
        case errno.EISDIR:
            return "a directory, not an image"
        case errno.ENXIO:
            return "neither a regular file nor a block device"
        case _:
            return error.strerror or str(error)
