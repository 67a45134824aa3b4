"""Frames that a guest transmits: their pieces, their headers, their lengths."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

from tests.conformance.broken.registry import FAULTS, Fault, crash, net_fault
from tests.conformance.broken.split_rings import knows_no_indirect_tables
from tests.conformance.plain import Interface, Queue, install, override
from tests.conformance.plain.net import ETHER, LARGEST, Frame
from tests.conformance.plain.queue import Chain
from tests.conformance.plain.ring import INDIRECT, Bad, Descriptor
from vhostuser._native import lib
from vhostuser.conformance.bench import Device
from vhostuser.drivers.net import NetHeader
from vhostuser.protocol import QueueBroken

FAULTS["plain_interface"] = Fault(install, (), Device.NET)

# ---- pieces


def _gathers(change: Callable[[Interface, Chain, bytes], bytes]) -> None:
    """What is read of a chain."""
    right = Interface.gather
    override(Interface, gather=lambda device, chain: change(device, chain, right(device, chain)))


def _drops(wrong: Callable[[Interface, Chain], bool]) -> None:
    """Frames in such chains are lost."""
    right = Interface.parse
    override(Interface, parse=lambda device, chain: None if wrong(device, chain) else right(device, chain))


@net_fault("net.transmit.joined")
def loses_the_last_byte_of_a_first_descriptor_of_middling_size() -> None:
    def change(_: Interface, chain: Chain, data: bytes) -> bytes:
        return data[:-1] if 256 < chain.readable[0][1] < 512 else data

    _gathers(change)


@net_fault("net.transmit.apart", "net.transmit.indirect-apart", "net.frame.14", "net.frame.64", "net.frame.1514")
def wants_some_of_the_frame_in_the_first_descriptor() -> None:
    def wrong(device: Interface, chain: Chain) -> bool:
        return chain.readable[0][1] == device.header_size() and len(chain.readable) == 2

    _drops(wrong)


@net_fault("net.transmit.header-and-more")
def takes_a_first_descriptor_for_the_header_alone() -> None:
    def change(device: Interface, chain: Chain, data: bytes) -> bytes:
        size, first = device.header_size(), chain.readable[0][1]
        return data[:size] + data[first:] if len(chain.readable) > 1 and first > size else data

    _gathers(change)


@net_fault("net.transmit.header-cut", "net.transmit.header-across", "net.transmit.bytewise")
def wants_a_header_to_transmit_in_one_piece() -> None:
    _drops(lambda device, chain: bool(chain.readable) and chain.readable[0][1] < device.header_size())


@net_fault("net.transmit.bytewise", "net.transmit.many", "net.transmit.indirect-many")
def takes_eight_pieces_at_most() -> None:
    _drops(lambda _, chain: len(chain.readable) > 8)


@net_fault("net.transmit.odd", "net.transmit.many")
def reads_words_of_pieces_in_the_middle() -> None:
    def gather(_: Interface, chain: Chain) -> bytes:
        last = len(chain.readable) - 1
        return b"".join(
            chain.memory.read(guest, length & ~1 if 1 < number < last else length)
            for number, (guest, length) in enumerate(chain.readable)
        )

    override(Interface, gather=gather)


@net_fault("net.transmit.empty-parts", "net.transmit.nothing", "net.receive.empty-parts")
def takes_an_empty_descriptor_for_a_mistake() -> None:
    right = Queue.add

    def add(queue: Queue, chain: Chain, descriptor: Descriptor) -> None:
        if not descriptor.length:
            raise Bad(lib.VU_E_SIZE)
        right(queue, chain, descriptor)

    override(Queue, add=add)


@net_fault("net.transmit.indirect", "net.transmit.indirect-apart", "net.transmit.indirect-many", "net.receive.indirect")
def takes_tables_for_frames() -> None:
    knows_no_indirect_tables()


@net_fault("net.transmit.indirect-behind")
def looks_for_a_table_at_the_head_alone() -> None:
    right = Queue.chained

    def chained(queue: Queue, head: int) -> Iterator[Descriptor]:
        if queue.ring.descriptor(head).flags & INDIRECT:
            yield from right(queue, head)
        else:
            yield from queue.linked(queue.ring.desc, queue.ring.size, head)

    override(Queue, chained=chained)


# ---- lengths


@net_fault("net.frame.14", "net.frame.60")
def pads_short_frames_to_64_bytes() -> None:
    _changes(lambda frame: frame._replace(data=frame.data.ljust(64, b"\0")))


def _changes(change: Callable[[Frame], Frame | None]) -> None:
    """What comes of a frame that may pass."""
    right = Interface.judged

    def judged(device: Interface, frame: Frame) -> Frame | None:
        found = right(device, frame)
        return None if found is None else change(found)

    override(Interface, judged=judged)


@net_fault("net.frame.64")
def takes_the_end_of_the_shortest_frame_for_its_checksum() -> None:
    _changes(lambda frame: frame._replace(data=frame.data[:60]) if len(frame.data) == 64 else frame)


@net_fault("net.frame.1514", "net.frame.9000", "net.mtu.carried", "net.receive.used-length", "net.log.receive")
def takes_the_mtu_for_the_length_of_a_frame() -> None:
    override(Interface, sized=lambda device, length: ETHER <= length <= 1500)


@net_fault("net.frame.9000")
def knows_no_jumbo_frames() -> None:
    override(Interface, sized=lambda device, length: ETHER <= length <= 8192 or 10000 < length <= LARGEST)


@net_fault("net.frame.tso", "net.frame.tso-merged")
def counts_in_sixteen_bits() -> None:
    override(Interface, sized=lambda device, length: ETHER <= length < 65536)


@net_fault("net.transmit.oversize-dropped", "net.frame.9000")
def sends_the_beginning_of_what_is_too_long() -> None:
    override(Interface, sized=lambda device, length: length >= ETHER)
    _gathers(lambda device, chain, data: data[: device.header_size() + 1514] if len(data) > 8192 else data)


@net_fault("net.transmit.short-header", "net.transmit.only-header", "net.transmit.runt", "net.transmit.oversize")
def takes_a_bad_length_for_a_broken_ring() -> None:
    def sized(device: Interface, length: int) -> bool:
        if not ETHER <= length <= LARGEST:
            raise Bad(lib.VU_E_SIZE)
        return True

    override(Interface, sized=sized)


# ---- headers


@net_fault("net.header.modern", "net.header.mergeable", "net.header.legacy", "net.header.legacy-mergeable")
def remembers_the_header_of_its_first_driver() -> None:
    sizes: list[int] = []

    def header_size(device: Interface) -> int:
        if not sizes:
            sizes.append(NetHeader.size(device.features))
        return sizes[0]

    override(Interface, header_size=header_size)


@net_fault("net.header.legacy")
def has_twelve_bytes_of_header_for_everybody() -> None:
    override(Interface, header_size=lambda device: 12)


@net_fault("net.transmit.hdr-len")
def believes_in_hdr_len() -> None:
    right = Interface.judged

    def judged(device: Interface, frame: Frame) -> Frame | None:
        return right(device, frame) if frame.header.hdr_len <= len(frame.data) else None

    override(Interface, judged=judged)


def _wants(good: Callable[[Frame], bool]) -> None:
    """Frames that are not so are dropped."""
    right = Interface.judged
    override(Interface, judged=lambda device, frame: right(device, frame) if good(frame) else None)


@net_fault("net.transmit.unknown-flags")
def wants_no_flags_that_it_does_not_know() -> None:
    _wants(lambda frame: not frame.header.flags & ~3)


@net_fault("net.transmit.checksum-unused")
def judges_a_place_that_is_not_used() -> None:
    _wants(lambda frame: frame.header.csum_start + frame.header.csum_offset <= len(frame.data))


@net_fault("net.transmit.num-buffers")
def wants_num_buffers_to_be_zero() -> None:
    _wants(lambda frame: not frame.header.num_buffers)


@net_fault("net.transmit.checksum-completed")
def leaves_checksums_as_they_are() -> None:
    override(Interface, completed=lambda device, frame: frame.data)


@net_fault("net.transmit.checksum-partial", "net.receive.segment-flags")
def forgets_where_the_checksum_goes() -> None:
    _changes(lambda frame: frame._replace(header=replace(frame.header, csum_offset=frame.header.csum_offset and 6)))


@net_fault("net.transmit.checksum-outside")
def takes_any_place_for_a_checksum() -> None:
    override(Interface, sum_fits=lambda device, frame: True)


@net_fault("net.transmit.segment-without-size")
def cuts_into_pieces_of_nothing() -> None:
    right = Interface.judged

    def judged(device: Interface, frame: Frame) -> Frame | None:
        header = frame.header
        return right(device, frame._replace(header=replace(header, gso_size=header.gso_size or 1)))

    override(Interface, judged=judged)


@net_fault("net.transmit.unknown-segment")
def sends_segments_of_any_kind() -> None:
    override(Interface, sends=lambda device, kind: True, takes=lambda device, kind: True)


# ---- order


@net_fault("net.frame.order")
def delays_frames_of_odd_length() -> None:
    right = Interface.forward

    def forward(device: Interface, pair: int, frame: Frame) -> None:
        if len(frame.data) % 2:
            threading.Timer(0.01, right, (device, pair, frame)).start()
        else:
            right(device, pair, frame)

    override(Interface, forward=forward)


@net_fault("net.transmit.one-kick")
def sends_one_of_many_frames_a_kick() -> None:
    finish, waiting, arm = Interface.finish, Queue.waiting, Queue.arm
    done: set[Queue] = set()

    def finished(device: Interface, queue: Queue, chain: Chain) -> None:
        finish(device, queue, chain)
        done.add(queue)

    def left(queue: Queue) -> int:
        return 0 if queue in done and waiting(queue) > 50 else waiting(queue)

    def armed(queue: Queue) -> bool:
        arm(queue)
        found = queue in done and waiting(queue) > 50
        done.discard(queue)
        return not found and bool(waiting(queue))

    override(Queue, waiting=left, arm=armed)
    override(Interface, finish=finished)


# ---- what no driver does


@net_fault("net.transmit.used-length")
def says_that_it_wrote_frames_of_117_bytes() -> None:
    right = Interface.serve

    def serve(device: Interface, chain: Chain) -> int:
        right(device, chain)
        return chain.to_read if chain.to_read - device.header_size() == 117 else 0

    override(Interface, serve=serve)


@net_fault("net.transmit.writable-behind")
def writes_a_status_behind_frames() -> None:
    right = Interface.serve

    def serve(device: Interface, chain: Chain) -> int:
        chain.write(b"\0")
        return right(device, chain)

    override(Interface, serve=serve)


@net_fault("net.transmit.writable")
def reads_what_is_to_be_written() -> None:
    _ignores_write(lambda queue: queue.index % 2 == 1, 0)


@net_fault("net.receive.readable", "net.receive.readable-before")
def writes_what_is_to_be_read() -> None:
    _ignores_write(lambda queue: queue.index % 2 == 0, 2)


def _ignores_write(where: Callable[[Queue], bool], flags: int) -> None:
    right = Queue.add

    def add(queue: Queue, chain: Chain, descriptor: Descriptor) -> None:
        right(queue, chain, descriptor._replace(flags=flags) if where(queue) else descriptor)

    override(Queue, add=add)


@net_fault(
    *(f"net.{half}.{what}" for half in ("transmit", "receive") for what in ("loop", "outside", "over-the-end")),
    "net.transmit.huge",
)
def dies_of_a_broken_ring() -> None:
    right = Queue.broken_by

    def broken_by(queue: Queue, code: int, head: int = -1) -> QueueBroken:
        if queue.started and code != lib.VU_E_FAULT:
            crash()
        return right(queue, code, head)

    override(Queue, broken_by=broken_by)
