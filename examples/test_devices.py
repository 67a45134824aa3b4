"""Tests of the small devices: no virtual machine, no socket file, no root. Run with: pytest test_devices.py"""

import asyncio
import errno
import struct
from collections.abc import Callable

import pytest
from echo import BYTES, Echo
from keyboard import EVENT, KEY, KEYS, LED, SCROLL_LOCK, STATUS, SYN, Keyboard, Select
from notebook import ANSWER, ATTRIBUTES, FORGET, HEADER, NOTE, READ_WRITE, ROOT, Notebook
from rng import Rng

from vhostuser.frontend import load_state, save_state
from vhostuser.metrics import value_in
from vhostuser.protocol import RequestRefused
from vhostuser.testing.pair import Pair

pytest_plugins = ["vhostuser.testing.plugin"]
pytestmark = [pytest.mark.asyncio, pytest.mark.usefixtures("no_leaks")]

Pairs = Callable[..., Pair]
LOOK_UP, GET_ATTRIBUTES, SET_ATTRIBUTES, READ, WRITE, LIST = 1, 3, 4, 15, 16, 28  # of FUSE


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


# ---- notebook


async def done(pair: Pair, operation: int, node: int = NOTE, body: bytes = b"") -> bytes:
    """What a FUSE operation answers. Raises OSError for its error."""
    header = HEADER.pack(HEADER.size + len(body), operation, 77, node)
    answer = await pair.ask(header + body, 4096, ring=1)
    size, error, unique = ANSWER.unpack_from(answer)
    assert (size, unique) == (len(answer), 77)
    if error:
        raise OSError(-error, "an answer")
    return answer[ANSWER.size :]


async def noted(pair: Pair, offset: int = 0, size: int = 1000) -> bytes:
    return await done(pair, READ, body=READ_WRITE.pack(offset, size))


async def note(pair: Pair, offset: int, text: bytes) -> None:
    assert await done(pair, WRITE, body=READ_WRITE.pack(offset, len(text)) + text) == struct.pack("<II", len(text), 0)


async def opened(pairs: Pairs, text: bytes = b"") -> Pair:
    pair = pairs(Notebook(text))
    await pair.set_up(rings=2)
    return pair


async def test_what_was_noted_is_read_and_its_size_is_told(pairs: Pairs) -> None:
    pair = await opened(pairs)
    await note(pair, 0, b"hello")
    await note(pair, 7, b"world")
    assert await noted(pair) == b"hello\0\0world"
    assert await noted(pair, 7, 3) == b"wor"
    assert await noted(pair, 100) == b""
    assert ATTRIBUTES.unpack((await done(pair, GET_ATTRIBUTES))[16:])[1] == 12
    await done(pair, SET_ATTRIBUTES, body=struct.pack("<I12xQ64x", 8, 2))
    assert await noted(pair) == b"he"


async def test_the_note_is_found_and_nothing_else(pairs: Pairs) -> None:
    pair = await opened(pairs)
    assert struct.unpack_from("<Q", await done(pair, LOOK_UP, ROOT, b"note\0")) == (NOTE,)
    for node, name in ((ROOT, b"other\0"), (NOTE, b"note\0")):
        with pytest.raises(FileNotFoundError):
            await done(pair, LOOK_UP, node, name)


async def test_the_directory_is_listed_in_pieces_too(pairs: Pairs) -> None:
    pair = await opened(pairs)
    whole = await done(pair, LIST, ROOT, READ_WRITE.pack(0, 4096))
    pieces = [await done(pair, LIST, ROOT, READ_WRITE.pack(place, 40)) for place in range(4)]
    assert b"".join(pieces) == whole
    assert b"note" in whole


@pytest.mark.parametrize(
    ("operation", "body", "error"),
    [
        (WRITE, READ_WRITE.pack(65530, 10) + b"0123456789", errno.ENOSPC),
        (WRITE, READ_WRITE.pack(1 << 63, 1) + b"x", errno.ENOSPC),
        (SET_ATTRIBUTES, struct.pack("<I12xQ64x", 8, 1 << 63), errno.ENOSPC),
        (READ, b"short", errno.EINVAL),
        (99, b"", errno.ENOSYS),
    ],
)
async def test_what_cannot_be_done_is_an_error_and_changes_nothing(
    pairs: Pairs, operation: int, body: bytes, error: int
) -> None:
    pair = await opened(pairs, b"as it was")
    with pytest.raises(OSError) as raised:
        await done(pair, operation, body=body)
    assert raised.value.errno == error
    assert await noted(pair) == b"as it was"


async def test_a_request_without_a_header_gets_nothing_and_the_next_is_served(pairs: Pairs) -> None:
    pair = await opened(pairs, b"text")
    assert await pair.ask(b"short", 100, ring=1) == b""
    assert await pair.ask(HEADER.pack(48, FORGET, 1, NOTE) + bytes(8)) == b"", "nobody waits for an answer"
    assert await noted(pair) == b"text"


async def test_the_note_moves_with_its_guest(pairs: Pairs) -> None:
    source, destination = await opened(pairs), pairs(Notebook())
    await note(source, 0, b"take me along")
    with pytest.raises(RequestRefused):
        await save_state(source.frontend)  # a ring runs
    for ring in source.rings:
        await source.frontend.stop_ring(ring)
    await destination.frontend.negotiate()
    await load_state(destination.frontend, await save_state(source.frontend))
    await destination.set_up(rings=2)
    assert await noted(destination) == b"take me along"


async def test_more_than_a_note_is_refused_and_changes_nothing(pairs: Pairs) -> None:
    pair = pairs(Notebook(b"mine"))
    await pair.frontend.negotiate()
    with pytest.raises(RequestRefused):
        await load_state(pair.frontend, bytes(65537))
    assert await save_state(pair.frontend) == b"mine"
