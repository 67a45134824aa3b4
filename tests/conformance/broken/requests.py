"""What a disk makes of its requests."""

from __future__ import annotations

from typing import Any

from tests.conformance.broken.registry import crash, fault
from tests.conformance.plain import Disk, override
from tests.conformance.plain.disk import IOERR, OK, Outcome
from tests.conformance.plain.queue import Chain
from vhostuser.devices.image import SECTOR
from vhostuser.drivers.blk import BlkStatus, BlkType

# ---- data


@fault("blk.read-back", "blk.many")
def writes_nothing() -> None:
    override(Disk, write=lambda disk, chain, sector: OK)


@fault("blk.many")
def writes_what_it_wrote_before() -> None:
    """A buffer that several requests share: it is filled again before its content has left."""
    right, before = Disk.write, [b""]

    def write(disk: Disk, chain: Chain, sector: int) -> BlkStatus:
        own, read = chain.read(16), chain.read
        chain.read = lambda *_: before[0] if len(before[0]) == len(own) else read(16)  # type: ignore[method-assign]
        before[0] = before[0] or own
        return right(disk, chain, sector)

    override(Disk, write=write)


@fault("blk.write-length")
def counts_what_it_read_as_written() -> None:
    right = Disk.serve
    override(Disk, serve=lambda disk, chain: right(disk, chain) + max(0, chain.to_read - 16))


@fault("blk.write-zeroes")
def zeroes_nothing() -> None:
    override(Disk, zero=lambda disk, sector, sectors: None)


@fault("blk.write-zeroes", "blk.discard")
def zeroes_a_sector_more() -> None:
    right = Disk.zero
    override(Disk, zero=lambda disk, sector, sectors: right(disk, sector, sectors + 1))


@fault("blk.discard-unmap")
def looks_at_no_flags_of_ranges() -> None:
    right = Disk.change
    override(Disk, change=lambda disk, chain, kind: right(disk, chain, BlkType.WRITE_ZEROES))


# ---- bounds


@fault("blk.write-zeroes-beyond", "blk.discard-beyond")
def ranges_end_with_the_disk() -> None:
    right = Disk.change

    def change(disk: Disk, chain: Chain, kind: int) -> BlkStatus:
        status = right(disk, chain, kind)
        return OK if status is IOERR else status

    override(Disk, change=change)


def _inside(judge: Any) -> None:
    override(Disk, inside=judge)


@fault("blk.read-beyond")
def reads_zeros_behind_the_end() -> None:
    right = Disk.read

    def read(disk: Disk, chain: Chain, sector: int) -> Outcome:
        if disk.size <= sector * SECTOR < 1 << 63:
            chain.write(bytes(chain.room - 1))
            return OK, chain.room - 1
        return right(disk, chain, sector)

    override(Disk, read=read)


@fault("blk.read-wraps")
def its_end_of_a_request_wraps() -> None:
    right = Disk.read

    def read(disk: Disk, chain: Chain, sector: int) -> Outcome:
        if (sector * SECTOR + chain.room - 1) % (1 << 64) <= disk.size < sector * SECTOR:
            chain.write(bytes(chain.room - 1))
            return OK, chain.room - 1
        return right(disk, chain, sector)

    override(Disk, read=read)


@fault("blk.write-beyond")
def writes_vanish_behind_the_end() -> None:
    right = Disk.write

    def write(disk: Disk, chain: Chain, sector: int) -> BlkStatus:
        return OK if sector * SECTOR >= disk.size else right(disk, chain, sector)

    override(Disk, write=write)


@fault("blk.part-of-sector")
def reads_any_number_of_bytes() -> None:
    _inside(lambda disk, sector, length: sector * SECTOR + length <= disk.size)


# ---- types


@fault("blk.flush")
def flushes_only_what_was_not_written() -> None:
    right = Disk.act
    written: list[Disk] = []

    def act(disk: Disk, chain: Chain, kind: int, sector: int) -> Outcome:
        if kind == BlkType.OUT:
            written.append(disk)
        return (IOERR, 0) if kind == BlkType.FLUSH and disk in written else right(disk, chain, kind, sector)

    override(Disk, act=act)


@fault("blk.unknown")
def takes_the_unknown_for_done() -> None:
    right = Disk.act

    def act(disk: Disk, chain: Chain, kind: int, sector: int) -> Outcome:
        status, written = right(disk, chain, kind, sector)
        return (OK, 0) if status is BlkStatus.UNSUPP else (status, written)

    override(Disk, act=act)


@fault("blk.unknown")
def fails_the_unknown() -> None:
    right = Disk.act

    def act(disk: Disk, chain: Chain, kind: int, sector: int) -> Outcome:
        status, written = right(disk, chain, kind, sector)
        return (IOERR, 0) if status is BlkStatus.UNSUPP else (status, written)

    override(Disk, act=act)


@fault("blk.flush")
def answers_no_flush_of_what_was_written() -> None:
    right = Disk.serve
    written: list[Disk] = []

    def serve(disk: Disk, chain: Chain) -> int:
        kind = int.from_bytes(chain.read(0, 4), "little")
        if kind == BlkType.OUT:
            written.append(disk)
        return 0 if kind == BlkType.FLUSH and disk in written else right(disk, chain)

    override(Disk, serve=serve)


@fault("blk.get-id")
def ends_its_name_with_nothing() -> None:
    def get_id(disk: Disk, chain: Chain) -> Outcome:
        chain.write(disk.serial)
        return OK, 20

    override(Disk, get_id=get_id)


# ---- requests that are none


@fault("hostile.header-short")
def makes_up_what_a_short_header_lacks() -> None:
    right = Chain.read

    def read(chain: Chain, offset: int = 0, length: int = 1 << 32) -> bytes:
        data = right(chain, offset, length)
        return data.ljust(16, b"\0") if length == 16 and data else data

    override(Chain, read=read)


@fault("hostile.header-missing")
def makes_up_a_missing_header() -> None:
    right = Chain.read

    def read(chain: Chain, offset: int = 0, length: int = 1 << 32) -> bytes:
        return right(chain, offset, length) if chain.readable else bytes(16)

    override(Chain, read=read)


@fault("hostile.status-missing")
def dies_without_room_for_a_status() -> None:
    _dies(lambda chain: chain.readable and not chain.room)


@fault("hostile.nothing")
def dies_of_nothing() -> None:
    _dies(lambda chain: not chain.readable and not chain.room)


def _dies(condition: Any) -> None:
    right = Disk.serve

    def serve(disk: Disk, chain: Chain) -> int:
        if condition(chain):
            crash()
        return right(disk, chain)

    override(Disk, serve=serve)
