"""A disk's requests (virtio 1.3, section 5.2.6), one at a time.

What belongs here: types, bounds, status bytes. What does not: rings and threads (``engine``).
"""

from __future__ import annotations

import os
from struct import Struct
from typing import Any

from tests.conformance.plain.engine import Engine
from tests.conformance.plain.queue import Chain
from vhostuser.devices.image import SECTOR, Image
from vhostuser.drivers.blk import BlkStatus, BlkType

OK, IOERR, UNSUPP = BlkStatus.OK, BlkStatus.IOERR, BlkStatus.UNSUPP
_HEADER = Struct("<I4xQ")
_RANGE = Struct("<QII")
_UNMAP = 1
_MOST_RANGES = 64

Outcome = tuple[BlkStatus, int]
"""The status, and how many bytes of data were written into the chain."""


class Disk(Engine):
    """Stands in for ``vhostuser.devices.blk.BlkEngine``."""

    def __init__(self, fd: int, image: Image, settings: Any, *, writeback: bool) -> None:
        self.fd = fd
        self.size = image.sectors * SECTOR
        self.read_only = image.read_only
        self.serial = settings.serial.encode()
        self.writeback = writeback
        self.served = 0

    # ---- what the device asks for

    def set_writeback(self, on: bool) -> None:
        self.writeback = on

    def set_sectors(self, sectors: int) -> None:
        self.size = sectors * SECTOR

    def stats(self) -> dict[str, int]:
        return {"completed": self.served}

    # ---- one request

    def serve(self, chain: Chain) -> int:
        self.served += 1
        if not chain.room:
            return 0  # no room for a status: nothing is done
        status, written = self.execute(chain)
        self.answer(chain, status)
        return written + 1

    def answer(self, chain: Chain, status: int) -> None:
        """The status is the last byte."""
        chain.write(bytes([status]), chain.room - 1)

    def execute(self, chain: Chain) -> Outcome:
        header = chain.read(0, _HEADER.size)
        if len(header) < _HEADER.size:
            return IOERR, 0
        kind, sector = _HEADER.unpack(header)
        return self.act(chain, kind, sector)

    def act(self, chain: Chain, kind: int, sector: int) -> Outcome:
        match kind:
            case BlkType.IN:
                return self.read(chain, sector)
            case BlkType.OUT:
                return self.write(chain, sector), 0
            case BlkType.FLUSH:
                return self.flush(), 0
            case BlkType.GET_ID:
                return self.get_id(chain)
            case BlkType.DISCARD | BlkType.WRITE_ZEROES:
                return self.change(chain, kind), 0
        return UNSUPP, 0

    def inside(self, sector: int, length: int) -> bool:
        """Whole sectors of the disk?"""
        return not length % SECTOR and sector * SECTOR + length <= self.size

    def read(self, chain: Chain, sector: int) -> Outcome:
        length = chain.room - 1
        if not self.inside(sector, length):
            return IOERR, 0
        data = os.pread(self.fd, length, sector * SECTOR)
        chain.write(data)
        return (OK, length) if len(data) == length else (IOERR, len(data))

    def write(self, chain: Chain, sector: int) -> BlkStatus:
        data = chain.read(_HEADER.size)
        if self.read_only or not self.inside(sector, len(data)):
            return IOERR
        os.pwrite(self.fd, data, sector * SECTOR)
        return OK if self.writeback else self.flush()

    def flush(self) -> BlkStatus:
        os.fdatasync(self.fd)
        return OK

    def get_id(self, chain: Chain) -> Outcome:
        said = self.serial.ljust(20, b"\0")[: chain.room - 1]
        chain.write(said)
        return OK, len(said)

    def change(self, chain: Chain, kind: int) -> BlkStatus:
        """All ranges are judged before the first is changed."""
        data = chain.read(_HEADER.size)
        if self.read_only or not data or len(data) % _RANGE.size or len(data) // _RANGE.size > _MOST_RANGES:
            return IOERR
        ranges = list(_RANGE.iter_unpack(data))
        for sector, sectors, flags in ranges:
            if flags & ~(_UNMAP if kind == BlkType.WRITE_ZEROES else 0):
                return UNSUPP
            if not self.inside(sector, sectors * SECTOR):
                return IOERR
        for sector, sectors, _ in ranges:
            self.zero(sector, sectors)
        return OK

    def zero(self, sector: int, sectors: int) -> None:
        """What is forgotten may as well be zeros."""
        os.pwrite(self.fd, bytes(sectors * SECTOR), sector * SECTOR)
