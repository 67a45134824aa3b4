"""What the tracer passes on: everything, unchanged, and nothing that is not asked for happens to it."""

import asyncio
import os
import random
import socket
from collections.abc import Callable

import pytest

from tests.runtime.echo import DATA, Echo
from tests.trace.conftest import Traced
from vhostuser.backend import Backend
from vhostuser.frontend import Frontend
from vhostuser.protocol import VERSION, Header, Request, encode
from vhostuser.protocol import FrontendRequest as F
from vhostuser.testing.pair import Pair
from vhostuser.tools.trace.descriptors import describe
from vhostuser.tools.trace.events import Notice
from vhostuser.tools.trace.faults import Kind, parse

Make = Callable[..., Traced]


@pytest.fixture
def ends(traced: Make) -> Traced:
    one = traced()
    one.frontend.setblocking(False)
    one.backend.setblocking(False)
    return one


async def received(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count and (more := await asyncio.wait_for(asyncio.get_running_loop().sock_recv(sock, count), 5)):
        data += more
    return data


def texts(one: Traced) -> list[str]:
    return [event.text for event in one.events() if isinstance(event, Notice)]


async def pair_through(one: Traced) -> Pair:
    backend = Backend(Echo)
    pair = Pair(backend, Frontend(one.frontend), asyncio.ensure_future(backend.serve(one.backend, "test")))
    await pair.set_up()
    return pair


async def test_a_device_works_through_it(traced: Make) -> None:
    """Memory, rings, kicks, calls: all descriptors arrive."""
    one = traced()
    pair = await pair_through(one)
    assert pair.memory is not None
    pair.memory.map.write(DATA, b"hello")
    queue = pair.rings[0].queue
    queue.offer(readable=[(DATA, 5)], writable=[(DATA + 4096, 5)])
    queue.publish()
    pair.rings[0].kick()
    while queue.take() is None:
        if not queue.arm():
            await asyncio.wait_for(pair.rings[0].called(), 5)
    assert pair.memory.map.read(DATA + 4096, 5) == b"HELLO"
    await pair.close()
    await one.over()
    passed = one.passed()
    assert not [event.message.complaints for event in passed if event.message.complaints]
    kinds = {event.message.name: [what.kind for what in event.seen.fds] for event in passed if event.seen.fds}
    assert kinds["SET_VRING_KICK"] == kinds["SET_VRING_CALL"] == ["eventfd"]
    assert kinds["ADD_MEM_REG" if "ADD_MEM_REG" in kinds else "SET_MEM_TABLE"] == ["memfd"]
    assert texts(one)[-1] == "over"


async def test_the_back_ends_channel_is_followed(traced: Make) -> None:
    one = traced()
    changed = asyncio.Event()

    def note(request: Request) -> None:
        changed.set()

    devices: list[Echo] = []

    def device() -> Echo:
        devices.append(Echo())
        return devices[-1]

    backend = Backend(device)
    pair = Pair(backend, Frontend(one.frontend), asyncio.ensure_future(backend.serve(one.backend, "test")))
    await pair.set_up()
    await pair.frontend.serve_backend(note)
    pair.rings[0].kick()  # a suspended device announces nothing
    devices[0].config_changed()
    await asyncio.wait_for(changed.wait(), 5)
    await pair.close()
    await one.over()
    assert "BACKEND_CONFIG_CHANGE_MSG" in one.names()
    assert not [event.message.complaints for event in one.passed() if event.message.complaints]


@pytest.mark.parametrize("seed", range(8))
async def test_any_bytes_pass_in_both_directions(ends: Traced, seed: int) -> None:
    rng = random.Random(seed)
    data = rng.randbytes(3000) if seed % 2 else Header(rng.randrange(60), VERSION, 2900).pack() + rng.randbytes(2988)
    for source, sink in ((ends.frontend, ends.backend), (ends.backend, ends.frontend)):
        rest = data
        while rest:
            size = rng.randrange(1, 400)
            source.send(rest[:size])
            rest = rest[size:]
            await asyncio.sleep(0)
        source.shutdown(socket.SHUT_WR)
        assert await received(sink, len(data)) == data
        assert await received(sink, 1) == b""


async def test_half_a_header_passes_before_the_end_of_the_stream(ends: Traced) -> None:
    ends.frontend.send(b"\1\0\0")
    ends.frontend.shutdown(socket.SHUT_WR)
    assert await received(ends.backend, 12) == b"\1\0\0"
    assert await received(ends.backend, 1) == b""


async def test_a_header_passes_before_its_payload_has_come(ends: Traced) -> None:
    header = Header(F.SET_FEATURES, VERSION, 8).pack()
    ends.frontend.send(header)
    assert await received(ends.backend, 12) == header
    ends.frontend.send(bytes(8))
    assert await received(ends.backend, 8) == bytes(8)


async def test_a_message_that_came_whole_goes_on_whole(ends: Traced) -> None:
    whole = Header(F.SET_FEATURES, VERSION, 8).pack() + bytes(8)
    ends.frontend.send(whole)
    assert await asyncio.get_running_loop().sock_recv(ends.backend, 100) == whole


async def test_descriptors_stay_with_their_message(ends: Traced) -> None:
    """The kernel would glue what is read in one piece."""
    reading, writing = os.pipe()
    memory = os.memfd_create("guest")
    socket.send_fds(ends.frontend, [encode(F.SET_OWNER, VERSION)], [])
    socket.send_fds(ends.frontend, [encode(F.SET_LOG_FD, VERSION)], [reading])
    socket.send_fds(ends.frontend, [encode(F.SET_VRING_ERR, VERSION)], [memory, writing])
    for fd in (reading, writing, memory):
        os.close(fd)
    found = []
    while len(found) < 3:
        header, fds = await received_fds(ends.backend, 12)
        found.append((Header.unpack(header).request, [describe(fd).kind for fd in fds]))
        for fd in fds:
            os.close(fd)
    assert found == [(F.SET_OWNER, []), (F.SET_LOG_FD, ["pipe"]), (F.SET_VRING_ERR, ["memfd", "pipe"])]


async def received_fds(sock: socket.socket, count: int) -> tuple[bytes, list[int]]:
    while True:
        try:
            data, fds, _, _ = socket.recv_fds(sock, count, 8)
        except BlockingIOError:
            await asyncio.sleep(0)
        else:
            return data, fds


async def test_what_is_no_socket_passes_as_the_back_ends_channel(ends: Traced) -> None:
    reading, writing = os.pipe()
    socket.send_fds(ends.frontend, [encode(F.SET_BACKEND_REQ_FD, VERSION)], [reading])
    _, (passed,) = await received_fds(ends.backend, 12)
    os.write(writing, b"x")
    assert os.read(passed, 1) == b"x"
    for fd in (reading, writing, passed):
        os.close(fd)


@pytest.mark.parametrize("dying", ["frontend", "backend"])
async def test_who_hangs_up_is_gone_for_the_other(ends: Traced, dying: str) -> None:
    """A front-end that only looks for a hang-up, as QEMU does, must see one."""
    gone, other = (ends.frontend, ends.backend)[:: 1 if dying == "frontend" else -1]
    gone.close()
    await ends.over()
    assert other.recv(1) == b""
    with pytest.raises(BrokenPipeError):
        other.send(b"x")


async def test_descriptors_of_half_a_header_are_closed_with_the_connection(ends: Traced) -> None:
    """They are still ours: nobody has seen them. The fixture counts what is left open."""
    reading, writing = os.pipe()
    socket.send_fds(ends.frontend, [b"half"], [reading, writing])
    os.close(reading)
    os.close(writing)
    await asyncio.sleep(0)
    ends.backend.close()
    await ends.over()


async def test_the_end_of_one_direction_leaves_the_other(ends: Traced) -> None:
    ends.frontend.shutdown(socket.SHUT_WR)
    assert await received(ends.backend, 1) == b""
    ends.backend.send(encode(F.GET_FEATURES, VERSION))
    assert await received(ends.frontend, 12) == encode(F.GET_FEATURES, VERSION)


async def test_an_answer_is_timed(ends: Traced) -> None:
    ends.frontend.send(encode(F.GET_FEATURES, VERSION))
    await received(ends.backend, 12)
    ends.backend.send(Header(F.GET_FEATURES, 5, 8).pack() + bytes(8))
    await received(ends.frontend, 20)
    asked, answered = ends.passed()
    assert answered.latency == answered.seen.at - asked.seen.at > 0


# ---- faults on purpose


async def test_a_message_loses_its_descriptors(traced: Make) -> None:
    one = traced([parse(Kind.DROP_FD, "SET_LOG_FD")])
    one.backend.setblocking(False)
    reading, writing = os.pipe()
    socket.send_fds(one.frontend, [encode(F.SET_LOG_FD, VERSION)], [reading])
    data, fds = await received_fds(one.backend, 12)
    assert (len(data), fds) == (12, [])
    os.close(reading)
    os.close(writing)


async def test_a_payload_is_corrupted(traced: Make) -> None:
    one = traced([parse(Kind.CORRUPT, "GET_FEATURES.reply")])
    one.frontend.setblocking(False)
    one.backend.send(Header(F.GET_FEATURES, 5, 8).pack() + bytes(8))
    assert await received(one.frontend, 20) == Header(F.GET_FEATURES, 5, 8).pack() + b"\xff" + bytes(7)


async def test_both_are_hung_up_on_behind_a_message(traced: Make) -> None:
    one = traced([parse(Kind.KILL_AFTER, "SET_OWNER")])
    one.backend.setblocking(False)
    one.frontend.send(encode(F.SET_OWNER, VERSION) * 2)
    await one.over()
    assert one.backend.recv(100) == encode(F.SET_OWNER, VERSION)
    assert one.backend.recv(1) == one.frontend.recv(0) == b""


async def test_a_delay_is_kept(traced: Make) -> None:
    one = traced([parse(Kind.DELAY, "20@SET_OWNER")])
    one.backend.setblocking(False)
    one.frontend.send(encode(F.SET_OWNER, VERSION))
    await received(one.backend, 12)
    assert one.passed()[0].seen.held >= 19_000_000  # uvloop's timers count whole milliseconds
    assert one.passed()[0].seen.faults == ("delayed by 20 ms",)
