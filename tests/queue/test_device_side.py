"""The native device side of split rings against the plain model: whatever lies in the ring, both see the same."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.queue import model
from tests.queue.guest import ALL, EVENT_IDX, INDIRECT, INDIRECT_DESC, NEXT, WRITE, Guest, Ring, descriptor
from vhostuser._native import ffi, lib
from vhostuser.memory import DirtyLog
from vhostuser.protocol import QueueBroken
from vhostuser.virtqueue import DeviceQueue, Request

REGIONS = ((0, 1 << 20), (1 << 20, 1 << 16), (1 << 32, 1 << 20))
DATA, TABLES = 0x20000, 0xFFF00
"""Buffers; and indirect tables, close before the border of two regions."""


@pytest.fixture(scope="module")
def world() -> Iterator[Guest]:
    guest = Guest(*REGIONS)
    yield guest
    guest.close()


def segments(request: Request) -> model.Chain:
    """What the native code made of a chain, in the model's terms."""
    chain = request._chain
    found = [
        (segment.guest, segment.length) for segment in chain.segments[0 : chain.readable_count + chain.writable_count]
    ]
    for segment in chain.segments[0 : chain.readable_count + chain.writable_count]:
        assert int(ffi.cast("uintptr_t", segment.host)) == request._queue.memory.guest_to_host(segment.guest)
    parsed = model.Chain(chain.head, found[: chain.readable_count], found[chain.readable_count :])
    assert request.readable == model.size(parsed.readable) and request.writable == model.size(parsed.writable)
    return parsed


def pop_all(queue: DeviceQueue) -> tuple[list[model.Chain], int]:
    """Chains in their order, then 0 or the code that broke the ring."""
    chains: list[model.Chain] = []
    try:
        while batch := queue.pop():
            chains += map(segments, batch)
    except QueueBroken as broken:
        return chains, broken.code
    return chains, 0


# ---- anything at all in the ring

addresses = st.sampled_from(
    [0, 1, DATA, TABLES, (1 << 20) - 8, 1 << 20, (1 << 20) + (1 << 16) - 1, 1 << 30, (1 << 32) + 5, (1 << 64) - 16]
)
lengths = st.sampled_from([0, 1, 15, 16, 32, 48, 64, 0x1000, 0x20000, 1 << 31, (1 << 32) - 1])
flag_bits = st.sampled_from([0, NEXT, WRITE, NEXT | WRITE, INDIRECT, INDIRECT | NEXT, INDIRECT | WRITE, 0xFFF8])
rows = st.tuples(addresses, lengths, flag_bits, st.integers(0, 9))


@settings(max_examples=400, deadline=None)
@given(
    size=st.sampled_from([1, 2, 4, 8]),
    features=st.sampled_from([ALL, EVENT_IDX, INDIRECT_DESC, 0]),
    table=st.lists(rows, min_size=8, max_size=8),
    inner=st.lists(rows, min_size=4, max_size=4),
    heads=st.lists(st.integers(0, 9), max_size=9),
    base=st.sampled_from([0, 5, 0xFFFE]),
    extra=st.sampled_from([0, 0, 0, 1, 0x8000]),
)
def test_any_bytes_in_a_ring_mean_what_the_model_says(
    world: Guest,
    size: int,
    features: int,
    table: list[tuple[int, int, int, int]],
    inner: list[tuple[int, int, int, int]],
    heads: list[int],
    base: int,
    extra: int,
) -> None:
    ring = Ring(world, size, features=features)
    for index, row in enumerate(table[:size]):
        ring.describe(index, *row)
    for at in (DATA, TABLES, 1, (1 << 20) - 8, (1 << 32) + 5):
        world.put(at, b"".join(descriptor(*row) for row in inner))
    ring.offer(base, heads[:size])
    ring.available += extra
    queue = ring.open(base=base)
    assert pop_all(queue) == model.pop(ring, base, set())
    queue.close()


# ---- what drivers write

buffers = st.lists(
    st.tuples(st.integers(DATA, (1 << 20) + (1 << 16) - 70000) | st.integers(1 << 32, (1 << 32) + 60000),
              st.integers(1, 300) | st.integers(4000, 66000)),
    max_size=4,
)  # fmt: skip
offers = st.tuples(buffers, buffers, st.sampled_from([None, TABLES, (1 << 20) - 24, 0x1001]), st.integers(0, 2))


def complete(data: st.DataObject, request: Request, writable: list[model.Range], world: Guest) -> set[int]:
    """Writes something somewhere, completes, and says which pages are dirty then."""
    content = os.urandom(data.draw(st.integers(0, min(request.writable, 500)), "written"))
    offset = data.draw(st.integers(0, request.writable - len(content)), "offset")
    assert request.write(content, offset) == len(content)
    told = data.draw(st.none() | st.integers(0, request.writable), "told")
    request.complete(told)
    high = offset + len(content) if content else 0
    # Buffers of a chain may overlap: what was written last stays.
    places = model.addresses(model.prefix(writable, high))[offset:]
    left = dict(zip(places, content, strict=True))
    assert {place: world.get(place, 1)[0] for place in left} == left
    return model.pages(model.prefix(writable, max(told or 0, high)))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), size=st.sampled_from([1, 2, 8, 16]), start=st.sampled_from([0, 0xFFF0, 0xFFFF]))
def test_a_conversation_with_a_plain_driver(world: Guest, data: st.DataObject, size: int, start: int) -> None:
    ring = Ring(world, size)
    driver = model.Driver(ring, start)
    with_log = data.draw(st.booleans(), "log")
    log_fd = os.memfd_create("log")
    os.truncate(log_fd, 1 << 18)
    log = DirtyLog.map(log_fd, 1 << 18) if with_log else None
    queue = ring.open(base=start, log=log)
    out: list[Request] = []
    expected_dirty: set[int] = set()
    signalled = start
    call = os.eventfd(0, os.EFD_NONBLOCK)
    queue.set_call(call)
    for _ in range(data.draw(st.integers(1, 12), "steps")):
        step = data.draw(st.sampled_from(["offer", "pop", "push", "take"]), "step")
        if step == "offer":
            readable, writable, table, direct = data.draw(offers, "chain")
            # A table is written once for each chain that uses it, so only one chain at a time may have it.
            if table is not None and (driver.chains or len(readable) + len(writable) <= direct):
                table = None
            driver.offer(readable, writable, table, direct)
        elif step == "pop":
            before = queue.base
            batch = queue.pop(data.draw(st.integers(1, 5), "most"))
            heads = [chain.head for chain in model.pop(ring, before, set())[0]]
            assert [request._chain.head for request in batch] == heads[: len(batch)]
            assert [segments(request) for request in batch] == [driver.chains[head][1] for head in heads[: len(batch)]]
            out += batch
        elif step == "push":
            done = [out.pop(data.draw(st.integers(0, len(out) - 1), "which")) for _ in range(min(len(out), 3))]
            for request in done:
                expected_dirty |= complete(data, request, driver.chains[request._chain.head][1].writable, world)
            ring.used_event(event := data.draw(st.integers(start, start + 20), "event"))
            queue.flush()
            now = (signalled + len(done)) & 0xFFFF
            assert ring.used_index == now
            assert called(call) == model.wants_event(event & 0xFFFF, signalled, now)
            signalled = now
        else:
            driver.take()
    assert queue.out == len(out) == lib.vu_queue_out(queue.native)
    if log:
        assert model.bits(os.pread(log_fd, 1 << 18, 0)) == expected_dirty
    queue.close()
    for fd in (log_fd, call):
        os.close(fd)


def called(call: int) -> bool:
    try:
        return os.eventfd_read(call) > 0
    except BlockingIOError:
        return False


@pytest.mark.parametrize("size", [1, 32768])
def test_the_smallest_and_the_largest_ring_go_round(world: Guest, size: int) -> None:
    ring = Ring(world, size)
    assert ring.end < TABLES
    queue = ring.open()
    for index in range(size):
        ring.describe(index, (1 << 32) + index, 1, WRITE)
    index = 0
    ring.used_index = 0
    for _ in range(3):
        ring.offer(index, range(size))
        requests = []
        while batch := queue.pop():
            requests += batch
        assert [request._chain.head for request in requests] == list(range(size))
        for request in reversed(requests):
            request.complete(1)
        queue.flush()
        assert ring.used_index == (index + size) & 0xFFFF
        assert [ring.used_entry(index + n) for n in (0, size - 1)] == [(size - 1, 1), (0, 1)]
        index = (index + size) & 0xFFFF
    queue.close()


def test_indexes_wrap_at_65536(world: Guest) -> None:
    ring = Ring(world, 4)
    ring.describe(0, DATA, 1, WRITE)
    ring.describe(1, DATA + 8, 1)
    ring.used_index = 0xFFFD
    queue = ring.open(base=0xFFFD)
    for step in range(8):
        index = (0xFFFD + step) & 0xFFFF
        ring.offer(index, [step & 1])
        (request,) = queue.pop()
        request.complete()
        queue.flush()
        assert ring.used_index == (index + 1) & 0xFFFF == queue.base
        assert ring.used_entry(index) == (step & 1, 0)
        assert queue.arm() is False and ring.avail_event == (index + 1) & 0xFFFF
    queue.close()
