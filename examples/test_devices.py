"""Tests of the small devices: no virtual machine, no socket file, no root. Run with: pytest test_devices.py"""

import asyncio
import struct
from collections.abc import Callable

import pytest
from echo import BYTES, Echo
from keyboard import EVENT, KEY, KEYS, LED, SCROLL_LOCK, STATUS, SYN, Keyboard, Select
from rng import Rng

from vhostuser.frontend import load_state, save_state
from vhostuser.metrics import value_in
from vhostuser.protocol import RequestRefused
from vhostuser.testing.pair import Pair

pytest_plugins = ["vhostuser.testing.plugin"]
pytestmark = [pytest.mark.asyncio, pytest.mark.usefixtures("no_leaks")]

Pairs = Callable[..., Pair]


# ---- random numbers


async def test_the_whole_request_is_filled_and_never_twice_the_same(pairs: Pairs) -> None:
    pair = pairs(Rng())
    await pair.set_up()
    first, second = await asyncio.gather(pair.ask(room=64), pair.ask(room=64))
    assert len(first) == len(second) == 64
    assert first != second


async def test_what_has_no_room_gets_nothing_and_the_next_is_served(pairs: Pairs) -> None:
    pair = pairs(Rng())
    await pair.set_up()
    assert await pair.ask(b"no room") == b""
    assert len(await pair.ask(room=1)) == 1


# ---- echo


@pytest.mark.parametrize("ring", [0, 1])
async def test_what_is_sent_comes_back_as_far_as_there_is_room(pairs: Pairs, ring: int) -> None:
    pair = pairs(Echo())
    await pair.set_up(rings=2)
    assert await pair.ask(b"hello", 64, ring=ring) == b"hello"
    assert await pair.ask(b"hello", 2, ring=ring) == b"he"
    assert value_in(pair.backend.state()["metrics"], BYTES) == 7


async def test_a_long_request_comes_back_whole(pairs: Pairs) -> None:
    pair = pairs(Echo())
    await pair.set_up()
    ring, sent = pair.rings[0], bytes(range(251)) * 800
    pair.memory.write(1 << 20, sent)
    ring.queue.offer(readable=[(1 << 20, len(sent))], writable=[(2 << 20, len(sent))])
    ring.queue.publish()
    ring.kick()
    assert await ring.returned() == (0, len(sent))
    assert pair.memory.read(2 << 20, len(sent)) == sent


# ---- keyboard


def key(letter: str, down: int) -> bytes:
    return EVENT.pack(KEY, KEYS[letter], down)


async def light(pair: Pair, lamp: int = SCROLL_LOCK, on: int = 1) -> None:
    await pair.ask(EVENT.pack(LED, lamp, on), ring=STATUS)


async def typed(pair: Pair, count: int) -> list[bytes]:
    """So many events, without the reports (SYN) between them."""
    events = [await pair.ask(room=EVENT.size) for _ in range(2 * count)]
    assert events[1::2] == [EVENT.pack(SYN, 0, 0)] * count
    return events[::2]


async def shown(pair: Pair, select: int, of: int = 0) -> bytes:
    """What the driver sees in the window of configuration space."""
    await pair.frontend.set_config(0, bytes([select]))
    await pair.frontend.set_config(1, bytes([of]))
    size = (await pair.frontend.get_config(2, 1))[0]
    return await pair.frontend.get_config(8, size) if size else b""


async def test_the_window_shows_what_was_asked_for(pairs: Pairs) -> None:
    pair = pairs(Keyboard("a"))
    await pair.frontend.negotiate()
    assert await shown(pair, Select.ID_NAME) == b"typist"
    keys = await shown(pair, Select.EV_BITS, KEY)
    assert {n for n in range(8 * len(keys)) if keys[n // 8] >> n % 8 & 1} == set(KEYS.values())
    assert await shown(pair, Select.EV_BITS, LED) == b"\7"
    assert await shown(pair, Select.EV_BITS, 3) == b"", "it has no axes"
    await pair.frontend.set_config(0, struct.pack("<BB134x", Select.ID_NAME, 0))
    assert await pair.frontend.get_config(0, 3) == b"\1\0\6", "the whole space was written, as QEMU does"
    with pytest.raises(RequestRefused):
        await pair.frontend.set_config(8, b"x")


async def test_a_text_is_typed_each_time_that_the_lamp_is_lit(pairs: Pairs) -> None:
    pair = pairs(Keyboard("hi"))
    await pair.set_up(rings=2)
    for _ in range(2):
        await light(pair)
        assert await typed(pair, 4) == [key("h", 1), key("h", 0), key("i", 1), key("i", 0)]
        await light(pair, on=0)


async def test_nothing_is_typed_before_and_a_ring_that_waits_can_be_stopped(pairs: Pairs) -> None:
    device = Keyboard("hi")
    pair = pairs(device)
    await pair.set_up(rings=2)
    waiting = asyncio.create_task(pair.ask(room=EVENT.size))
    await light(pair, lamp=1)
    assert device.state() == {"typed": 8, "lamps": [1]}
    assert not waiting.done()
    assert await pair.frontend.stop_ring(pair.rings[0]) == 0, "the driver's buffer was not taken"
    waiting.cancel()


async def test_a_short_event_lights_nothing_and_ends_nothing(pairs: Pairs) -> None:
    device = Keyboard("hi")
    pair = pairs(device)
    await pair.set_up(rings=2)
    await pair.ask(b"short", ring=STATUS)
    await light(pair)
    assert len(await typed(pair, 4)) == 4


async def test_a_guest_that_moves_in_the_middle_gets_the_rest(pairs: Pairs) -> None:
    source, destination = pairs(Keyboard("hi")), pairs(Keyboard("hi"))
    await source.set_up(rings=2)
    await light(source)
    assert await typed(source, 2) == [key("h", 1), key("h", 0)]
    for ring in source.rings:
        await source.frontend.stop_ring(ring)
    await destination.frontend.negotiate()
    await load_state(destination.frontend, await save_state(source.frontend))
    await destination.set_up(rings=2)
    assert await typed(destination, 2) == [key("i", 1), key("i", 0)]


@pytest.mark.parametrize("state", [b"", b"short", struct.pack("<II", 9, 0), bytes(9)])
async def test_no_state_of_such_a_keyboard_is_refused_and_changes_nothing(pairs: Pairs, state: bytes) -> None:
    device = Keyboard("hi")
    pair = pairs(device)
    await pair.frontend.negotiate()
    before = await save_state(pair.frontend)
    with pytest.raises(RequestRefused):
        await load_state(pair.frontend, state)
    assert await save_state(pair.frontend) == before


async def test_a_ring_that_runs_has_no_state_to_save(pairs: Pairs) -> None:
    pair = pairs(Keyboard("hi"))
    await pair.set_up(rings=2)
    await light(pair)
    with pytest.raises(RequestRefused):
        await save_state(pair.frontend)
