"""Chains and indexes of split rings."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tests.conformance.broken.registry import fault
from tests.conformance.plain import Disk, Queue, override
from tests.conformance.plain.disk import IOERR, Outcome
from tests.conformance.plain.packed import PackedRing
from tests.conformance.plain.queue import Chain
from tests.conformance.plain.ring import INDIRECT, NEXT, Bad, Descriptor, Ring
from vhostuser._native import lib
from vhostuser.protocol import VirtioFeature

# ---- indexes


@fault("split.size-4")
def thinks_that_rings_have_sixteen_entries() -> None:
    _places(lambda ring, position: position % max(ring.size, 16))


@fault("split.size-256")
def thinks_that_rings_have_no_more_than_128_entries() -> None:
    _places(lambda ring, position: position % min(ring.size, 128))


def _places(place: Callable[[Ring, int], int]) -> None:
    """Finds a position of the ring there."""
    override(Ring, avail_head=lambda ring, position: ring._load(ring.avail + 4 + 2 * place(ring, position)))
    override(Ring, used_entry_at=lambda ring, position: ring.used + 4 + 8 * place(ring, position))
    override(PackedRing, descriptor=lambda ring, position: ring.descriptor_at(ring.desc, place(ring, position)))
    override(PackedRing, used_entry_at=lambda ring, position: ring.desc + 16 * place(ring, position))


@fault("split.full", "split.indirect", "split.both", "setup.resized")
def takes_more_than_four_chains_for_a_mistake() -> None:
    right = Queue.waiting

    def waiting(queue: Queue) -> int:
        if (ahead := right(queue)) > queue.ring.size // 4 and queue.ring.size == 16:
            raise Bad(lib.VU_E_INDEX)
        return ahead

    override(Queue, waiting=waiting)


@fault("split.batch", "split.full", "blk.many")
def serves_one_request_a_kick() -> None:
    finish, waiting, arm = Disk.finish, Queue.waiting, Queue.arm
    done: set[Queue] = set()

    def finished(disk: Disk, queue: Queue, chain: Chain) -> None:
        finish(disk, queue, chain)
        if not queue.setup.features & (VirtioFeature.RING_EVENT_IDX.mask | VirtioFeature.RING_INDIRECT_DESC.mask):
            done.add(queue)

    def left(queue: Queue) -> int:
        return 0 if queue in done else waiting(queue)

    def armed(queue: Queue) -> bool:
        arm(queue)
        found = queue in done
        done.discard(queue)
        return not found and bool(waiting(queue))

    override(Queue, waiting=left, arm=armed)
    override(Disk, finish=finished)


@fault("split.event-idx", "split.both")
def returns_nothing_before_the_driver_wants_a_call() -> None:
    right = Queue.put_index

    def put_index(queue: Queue) -> None:
        event = queue.ring.used_event()
        if not queue.has(VirtioFeature.RING_EVENT_IDX) or queue.passed(event, queue.used, queue.signalled):
            right(queue)

    override(Queue, put_index=put_index)


@fault("split.event-idx-called", "split.event-idx-stress")
def event_index_is_one_late() -> None:
    right = Queue.passed
    override(Queue, passed=lambda queue, event, now, before: right(queue, event + now - before, now, before))


@fault("split.event-idx-kick")
def asks_for_the_kick_of_the_request_before() -> None:
    right = Queue.put_and_mark

    def put(queue: Queue, guest: int, value: int) -> None:
        right(queue, guest, (value - 1) % 65536 if guest == queue.ring.avail_event_at else value)

    override(Queue, put_and_mark=put)


# ---- indirect tables


@fault("split.indirect", "split.both", "split.indirect-after-direct", "split.indirect-write-flag")
def knows_no_indirect_tables() -> None:
    def table(queue: Queue, descriptor: Descriptor) -> Iterator[Descriptor]:
        yield descriptor

    override(Queue, table=table)


@fault("split.indirect-after-direct")
def wants_a_table_to_be_the_whole_chain() -> None:
    right = Queue.chained

    def chained(queue: Queue, head: int) -> Iterator[Descriptor]:
        first = queue.ring.descriptor(head)
        for descriptor in queue.linked(queue.ring.desc, queue.ring.size, head):
            if descriptor.flags & INDIRECT and descriptor != first:
                raise Bad(lib.VU_E_INDIRECT)
        return right(queue, head)

    override(Queue, chained=chained)


@fault("split.indirect-write-flag")
def wants_no_flag_beside_indirect() -> None:
    right = Queue.check_table

    def check(queue: Queue, descriptor: Descriptor) -> None:
        right(queue, descriptor)
        if descriptor.flags != INDIRECT:
            raise Bad(lib.VU_E_INDIRECT)

    override(Queue, check_table=check)


@fault("hostile.indirect-unnegotiated")
def follows_tables_that_were_not_negotiated() -> None:
    right = Queue.has
    override(Queue, has=lambda queue, feature: feature is VirtioFeature.RING_INDIRECT_DESC or right(queue, feature))


# ---- how chains are cut


@fault("split.cut-header")
def wants_the_header_in_one_piece() -> None:
    right = Disk.execute

    def execute(disk: Disk, chain: Chain) -> Outcome:
        return (IOERR, 0) if chain.readable and chain.readable[0][1] < 16 else right(disk, chain)

    override(Disk, execute=execute)


@fault("split.cut-data", "split.across-regions")
def wants_data_in_whole_sectors() -> None:
    right = Disk.read

    def read(disk: Disk, chain: Chain, sector: int) -> Outcome:
        cut = any(length % 512 for _, length in chain.writable[:-1])
        return (IOERR, 0) if cut else right(disk, chain, sector)

    override(Disk, read=read)


@fault("split.empty-buffer")
def takes_an_empty_buffer_for_a_mistake() -> None:
    right = Queue.add

    def add(queue: Queue, chain: Chain, descriptor: Descriptor) -> None:
        if not descriptor.length:
            raise Bad(lib.VU_E_SIZE)
        right(queue, chain, descriptor)

    override(Queue, add=add)


@fault("split.joined-status")
def wants_a_descriptor_for_the_status() -> None:
    def answer(disk: Disk, chain: Chain, status: int) -> None:
        chain.write(bytes([status]), chain.room - chain.writable[-1][1])

    override(Disk, answer=answer)


@fault("split.order-of-table")
def takes_chains_for_neighbours() -> None:
    _follows(lambda index, descriptor: index + 1)


@fault("split.link-ignored")
def judges_the_link_of_a_last_descriptor() -> None:
    right = Queue.linked

    def linked(queue: Queue, table: int, count: int, index: int) -> Iterator[Descriptor]:
        for descriptor in right(queue, table, count, index):
            if descriptor.after >= count:
                raise Bad(lib.VU_E_HEAD)
            yield descriptor

    override(Queue, linked=linked)


def _follows(after: Callable[[int, Descriptor], int]) -> None:
    def linked(queue: Queue, table: int, count: int, index: int) -> Iterator[Descriptor]:
        for _ in range(count):
            if index >= count:
                raise Bad(lib.VU_E_HEAD)
            descriptor = queue.ring.descriptor_at(table, index)
            yield descriptor
            if not descriptor.flags & NEXT:
                return
            index = after(index, descriptor)
        raise Bad(lib.VU_E_LOOP)

    override(Queue, linked=linked)


@fault("split.across-regions")
def wants_a_buffer_in_one_region() -> None:
    right = Queue.add

    def add(queue: Queue, chain: Chain, descriptor: Descriptor) -> None:
        before = len(chain.readable) + len(chain.writable)
        right(queue, chain, descriptor)
        if len(chain.readable) + len(chain.writable) > before + 1:
            raise Bad(lib.VU_E_RANGE)

    override(Queue, add=add)


@fault("memory.high", "memory.one-file", "address.user")
def guest_addresses_have_32_bits() -> None:
    right = Queue.add

    def add(queue: Queue, chain: Chain, descriptor: Descriptor) -> None:
        right(queue, chain, descriptor._replace(guest=descriptor.guest & 0xFFFFFFFF))

    override(Queue, add=add)


# ---- returning


@fault("split.used-length")
def used_length_is_without_the_status() -> None:
    right = Disk.serve
    override(Disk, serve=lambda disk, chain: max(0, right(disk, chain) - 1))
