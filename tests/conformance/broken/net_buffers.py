"""Frames that a guest receives: what stands in front of them, and the buffers that they take."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from tests.conformance.broken.hostile import dies_of_data_in_the_ring
from tests.conformance.broken.registry import net_fault
from tests.conformance.plain import Interface, Queue, override
from tests.conformance.plain.net import ETHER, Frame
from tests.conformance.plain.queue import Chain
from tests.conformance.plain.ring import Bad
from vhostuser._native import lib
from vhostuser.devices.ends import NetFeature
from vhostuser.drivers.net import NetHeader

# ---- headers


def _fronts(change: Callable[[Interface, NetHeader], NetHeader]) -> None:
    """What stands in front of a frame, num_buffers among it."""

    def front(device: Interface, frame: Frame, buffers: int) -> bytes:
        header = replace(frame.header, num_buffers=buffers)
        return change(device, header).pack()[: device.header_size()]

    override(Interface, front=front)


@net_fault("net.receive.header", "net.receive.no-flags", "net.transmit.unknown-flags")
def has_looked_at_every_checksum() -> None:
    _fronts(lambda _, header: replace(header, flags=header.flags | 2))


@net_fault("net.receive.num-buffers")
def counts_buffers_with_mrg_rxbuf_alone() -> None:
    def change(device: Interface, header: NetHeader) -> NetHeader:
        return header if device.has(NetFeature.MRG_RXBUF) else replace(header, num_buffers=0)

    _fronts(change)


@net_fault("net.receive.segment-flags")
def forgets_that_a_segment_has_no_checksum() -> None:
    _fronts(lambda _, header: replace(header, flags=0) if header.gso_type else header)


@net_fault("net.receive.hdr-len")
def says_nothing_of_the_headers_of_segments() -> None:
    override(Interface, hdr_len=lambda device, frame: 0)


@net_fault("net.receive.no-flags", "net.transmit.checksum-completed")
def leaves_checksums_to_every_driver() -> None:
    override(Interface, fitted=lambda device, frame: frame)


@net_fault("net.receive.no-segments")
def leaves_segments_to_every_driver() -> None:
    override(Interface, takes=lambda device, kind: True)


@net_fault("net.receive.used-length", "net.header.legacy", "net.mtu.carried")
def rounds_the_used_length_up() -> None:
    right = Interface.fill

    def fill(device: Interface, chains: list[Chain], frame: Frame) -> list[tuple[Chain, int]]:
        return [(chain, min(length + 3 & ~3, chain.room)) for chain, length in right(device, chains, frame)]

    override(Interface, fill=fill)


# ---- how a buffer is cut


def _passes_over(wrong: Callable[[Interface, Chain], bool]) -> None:
    """Such buffers come back empty."""
    right = Interface.useless
    override(Interface, useless=lambda device, chain: right(device, chain) or wrong(device, chain))


@net_fault("net.receive.apart", "net.receive.many", "net.receive.indirect")
def wants_some_of_the_frame_in_the_first_piece_of_a_buffer() -> None:
    _passes_over(lambda device, chain: bool(chain.writable) and chain.writable[0][1] == device.header_size())


@net_fault("net.receive.header-cut", "net.receive.header-across", "net.receive.odd", "net.merge.mixed")
def wants_the_room_for_a_header_in_one_piece() -> None:
    _passes_over(lambda device, chain: bool(chain.writable) and chain.writable[0][1] < device.header_size())


@net_fault("net.receive.many", "net.receive.indirect")
def fills_eight_pieces_at_most() -> None:
    _passes_over(lambda _, chain: len(chain.writable) > 8)


def _one_buffer(fits: Callable[[int, int], bool]) -> None:
    """Whether a frame fits into a buffer of so many bytes, where it takes one."""
    right = Interface.enough

    def enough(device: Interface, held: list[Chain], length: int) -> int | None:
        if not held or device.has(NetFeature.MRG_RXBUF):
            return right(device, held, length)
        return int(fits(held[0].room, length))

    override(Interface, enough=enough)


@net_fault("net.receive.exact", "net.frame.60", "net.frame.64")
def wants_a_byte_to_spare() -> None:
    _one_buffer(lambda room, length: room > length)


@net_fault("net.receive.too-small", "net.receive.one-buffer")
def cuts_frames_to_the_size_of_their_buffer() -> None:
    _one_buffer(lambda room, length: True)


@net_fault("net.receive.bounds")
def takes_every_buffer_for_a_large_one() -> None:
    _one_buffer(lambda room, length: True)
    override(Interface, useless=lambda device, chain: False)
    right = Interface.fill

    def fill(device: Interface, chains: list[Chain], frame: Frame) -> list[tuple[Chain, int]]:
        if not device.has(NetFeature.MRG_RXBUF) and len(chains[0].writable) == 1:
            guest, _ = chains[0].writable[0]
            chains[0].memory.write(guest, device.front(frame, 1) + frame.data)
        return right(device, chains, frame)

    override(Interface, fill=fill)


@net_fault("net.receive.split-end")
def clears_the_rest_of_a_buffer() -> None:
    right = Interface.fill

    def fill(device: Interface, chains: list[Chain], frame: Frame) -> list[tuple[Chain, int]]:
        filled = right(device, chains, frame)
        chain, length = filled[-1]
        chain.write(bytes(chain.room - length), length)
        return filled

    override(Interface, fill=fill)


# ---- buffers of no use


@net_fault("net.receive.header-alone")
def takes_a_buffer_for_any_that_holds_a_header() -> None:
    override(Interface, useless=lambda device, chain: chain.room < device.header_size())


@net_fault("net.receive.no-room", "net.receive.one-byte", "net.receive.header-alone")
def waits_for_a_frame_that_fits_for_ever() -> None:
    override(Interface, useless=lambda device, chain: False)


@net_fault("net.receive.unused")
def gives_a_buffer_back_with_every_frame_that_has_plenty() -> None:
    right = Interface.hand_over

    def hand_over(device: Interface, queue: Queue, filled: list[tuple[Chain, int]]) -> None:
        right(device, queue, filled)
        if queue.waiting() > 5:
            chain = queue.take()
            assert chain is not None
            right(device, queue, [(chain, 0)])

    override(Interface, hand_over=hand_over)


@net_fault("net.receive.starved", "net.merge.too-few", "net.receive.asks-for-kick")
def breaks_when_it_runs_out_of_buffers() -> None:
    def ask(device: Interface, queue: Queue) -> bool:
        raise Bad(lib.VU_E_INDEX)

    override(Interface, ask=ask)


@net_fault("net.receive.asks-for-kick", "net.kicked.event-idx")
def waits_for_a_kick_that_it_did_not_ask_for() -> None:
    override(Interface, ask=lambda device, queue: False)


@net_fault("net.receive.over-the-ring")
def dies_of_a_buffer_in_the_ring() -> None:
    dies_of_data_in_the_ring()


# ---- merged buffers


def _merges(change: Callable[[Interface, list[Chain], int, int | None], int | None]) -> None:
    """How many of the buffers a frame takes: changed from what is right."""
    right = Interface.enough

    def enough(device: Interface, held: list[Chain], length: int) -> int | None:
        found = right(device, held, length)
        return change(device, held, length, found) if device.has(NetFeature.MRG_RXBUF) else found

    override(Interface, enough=enough)


@net_fault("net.merge.one")
def keeps_the_header_apart_from_the_frame() -> None:
    def front(device: Interface, held: list[Chain], length: int, found: int | None) -> int | None:
        return None if len(held) < 2 else max(found or 0, 2) if found else found

    _merges(front)
    right = Interface.fill

    def fill(device: Interface, chains: list[Chain], frame: Frame) -> list[tuple[Chain, int]]:
        if not device.has(NetFeature.MRG_RXBUF) or len(chains) != 2 or chains[1].room < len(frame.data):
            return right(device, chains, frame)
        chains[0].write(device.front(frame, 2))
        chains[1].write(frame.data)
        return [(chains[0], device.header_size()), (chains[1], len(frame.data))]

    override(Interface, fill=fill)


@net_fault("net.merge.several", "net.merge.together", "net.merge.mixed", "net.frame.tso-merged")
def merges_three_buffers_at_most() -> None:
    _merges(lambda device, held, length, found: 0 if (found or 0) > 3 else found)


@net_fault("net.frame.tso-merged")
def merges_thirty_buffers_at_most() -> None:
    _merges(lambda device, held, length, found: 0 if (found or 0) > 30 else found)


@net_fault("net.merge.exact")
def wants_room_left_in_the_last_buffer() -> None:
    def change(device: Interface, held: list[Chain], length: int, found: int | None) -> int | None:
        if found and sum(chain.room for chain in held[:found]) == length:
            return found + 1 if len(held) > found else None
        return found

    _merges(change)


@net_fault("net.merge.full")
def leaves_a_byte_of_each_buffer() -> None:
    def change(device: Interface, held: list[Chain], length: int, found: int | None) -> int | None:
        for count in range(1, len(held) + 1):
            if sum(chain.room - 1 for chain in held[:count]) >= length:
                return count
        return None

    _merges(change)
    right = Interface.fill

    def fill(device: Interface, chains: list[Chain], frame: Frame) -> list[tuple[Chain, int]]:
        if not device.has(NetFeature.MRG_RXBUF):
            return right(device, chains, frame)
        data = device.front(frame, len(chains)) + frame.data
        filled = []
        for chain in chains:
            part, data = data[: chain.room - 1], data[chain.room - 1 :]
            chain.write(part)
            filled.append((chain, len(part)))
        return filled

    override(Interface, fill=fill)


@net_fault("net.merge.header-alone")
def wants_more_than_a_header_in_a_buffer() -> None:
    right = Interface.useless

    def useless(device: Interface, chain: Chain) -> bool:
        least = device.header_size() + ETHER
        return chain.room < least if device.has(NetFeature.MRG_RXBUF) else right(device, chain)

    override(Interface, useless=useless)


@net_fault("net.merge.together", "net.merge.several", "net.merge.full")
def returns_the_buffers_of_a_frame_one_by_one() -> None:
    right = Interface.hand_over

    def hand_over(device: Interface, queue: Queue, filled: list[tuple[Chain, int]]) -> None:
        for each in filled:
            right(device, queue, [each])
            if len(filled) > 1:
                time.sleep(0.004)

    override(Interface, hand_over=hand_over)


@net_fault("net.merge.too-few")
def begins_a_frame_with_the_buffers_that_there_are() -> None:
    right = Interface.buffers

    def buffers(device: Interface, queue: Queue, length: int) -> list[Chain] | None:
        found = right(device, queue, length)
        held = device.held[queue.index]
        if found is None and len(held) > 1:
            found, held[:] = held[:], []
        return found

    override(Interface, buffers=buffers)


@net_fault("net.receive.one-buffer", "net.receive.too-small")
def merges_what_was_not_negotiated() -> None:
    right = Interface.enough

    def enough(device: Interface, held: list[Chain], length: int) -> int | None:
        if device.has(NetFeature.MRG_RXBUF) or not held or held[0].room >= length:
            return right(device, held, length)
        for count in range(1, len(held) + 1):
            if sum(chain.room for chain in held[:count]) >= length:
                return count
        return None

    override(Interface, enough=enough)
