"""Requests that are bytes both ways: any number at once, whatever order they are answered in, given up or not."""

import asyncio
from collections.abc import Callable

import pytest

from vhostuser.device import Device
from vhostuser.drivers.plain import Plain
from vhostuser.testing.pair import MIB, Pair
from vhostuser.virtqueue import Request

pytestmark = pytest.mark.usefixtures("no_leaks")


class Late(Device):
    """Answers in upper case; what begins with a lower-case letter waits until something else has come."""

    virtio_id = 63

    def __init__(self) -> None:
        self.waiting: list[asyncio.Event] = []

    async def handle(self, request: Request) -> None:
        text = request.read()
        if text[:1].islower():
            self.waiting.append(asyncio.Event())
            await self.waiting[-1].wait()
        else:
            while self.waiting:
                self.waiting.pop().set()
        request.write(text.upper())


async def test_each_task_gets_the_answer_to_its_own_request(pairs: Callable[..., Pair]) -> None:
    pair = pairs(Late())
    await pair.set_up()
    asking = [asyncio.create_task(pair.ask(f"late {number}".encode(), 6)) for number in range(3)]
    await asyncio.sleep(0)
    assert await pair.ask(b"Now", 3) == b"NOW"
    assert await asyncio.gather(*asking) == [f"LATE {number}".encode() for number in range(3)]


async def test_more_than_there_are_slots_take_turns(pairs: Callable[..., Pair]) -> None:
    pair = pairs(Late())
    await pair.set_up()
    plain = Plain(pair.rings[0], MIB, most=8, slots=2)
    answers = await asyncio.gather(*(plain.ask(f"N{number}".encode(), 8) for number in range(20)))
    assert answers == [f"N{number}".encode() for number in range(20)]


async def test_the_buffers_of_a_request_that_was_given_up_stay_the_devices(pairs: Callable[..., Pair]) -> None:
    pair = pairs(Late())
    await pair.set_up()
    plain = Plain(pair.rings[0], MIB, most=8, slots=3)
    given_up = asyncio.create_task(plain.ask(b"late", 4))
    await asyncio.sleep(0)
    given_up.cancel()
    with pytest.raises(asyncio.CancelledError):
        await given_up
    assert await plain.ask(b"Now", 3) == b"NOW"
    assert [await plain.ask(b"One", 3) for _ in range(4)] == [b"ONE"] * 4


async def test_a_request_may_have_one_side_only(pairs: Callable[..., Pair]) -> None:
    pair = pairs(Late())
    await pair.set_up()
    assert await pair.ask(b"Said") == b""
    assert await pair.ask(room=5) == b""


@pytest.mark.parametrize(("data", "room"), [(b"", 0), (bytes(4097), 1), (b"x", 4097)])
async def test_what_fits_no_buffer_is_said(pairs: Callable[..., Pair], data: bytes, room: int) -> None:
    pair = pairs(Late())
    await pair.set_up()
    with pytest.raises(ValueError, match="at most 4096 each way"):
        await pair.ask(data, room)
    assert await pair.ask(b"More", 4) == b"MORE"
