"""What is odd on the wire: served, refused, or the connection closed with a reason; no descriptor stays open."""

import asyncio
import os
from collections.abc import Callable

import pytest

from tests.runtime.echo import Echo
from vhostuser.protocol import (
    U64,
    FrontendRequest,
    RemoteProtocolError,
    RequestRefused,
    VringFd,
)
from vhostuser.testing.pair import Pair

pytestmark = pytest.mark.usefixtures("no_leaks")


async def test_need_reply_on_a_request_that_replies_gets_one_reply(pairs: Callable[..., Pair]) -> None:
    """libblkio asks for acknowledgements everywhere."""
    pair = pairs(Echo())
    await pair.frontend.negotiate()
    for _ in range(3):
        payload, _ = await pair.frontend.request(FrontendRequest.GET_QUEUE_NUM, need_reply=True)
        assert payload == U64(2)


async def test_a_violation_closes_the_connection_and_every_descriptor(pairs: Callable[..., Pair]) -> None:
    pair = pairs(Echo())
    await pair.set_up()
    fds = tuple(os.memfd_create("stray") for _ in range(5))
    await pair.frontend.send_raw(bytes.fromhex("01000000 01000000 00000000"), fds)
    for fd in fds:
        os.close(fd)
    await asyncio.wait_for(pair.serving, 5)


async def test_253_descriptors_are_closed(pairs: Callable[..., Pair]) -> None:
    pair = pairs(Echo())
    fd = os.memfd_create("many")
    await pair.frontend.send_raw(bytes.fromhex("05000000 01000000 28000000"), (fd,) * 253)
    os.close(fd)
    await asyncio.wait_for(pair.serving, 5)


async def test_a_message_in_single_bytes_is_one_message(pairs: Callable[..., Pair]) -> None:
    pair = pairs(Echo())
    for byte in bytes.fromhex("01000000 01000000 00000000"):
        await pair.frontend.send_raw(bytes([byte]))
        await asyncio.sleep(0)
    data = b""
    while len(data) < 20:
        data += (await pair.frontend.receive_raw(20 - len(data)))[0]
    assert data[:12] == bytes.fromhex("01000000 05000000 08000000")


async def test_the_end_of_the_stream_inside_a_message_is_no_traceback(
    pairs: Callable[..., Pair], caplog: pytest.LogCaptureFixture
) -> None:
    pair = pairs(Echo())
    await pair.frontend.send_raw(b"\1\0\0")
    await pair.close()
    assert "closed with" in caplog.text
    assert "Traceback" not in caplog.text


async def test_a_reply_to_a_closed_front_end_ends_quietly(pairs: Callable[..., Pair]) -> None:
    pair = pairs(Echo())
    await pair.frontend.send_raw(bytes.fromhex("01000000 01000000 00000000") * 1000)
    await pair.close()


async def test_a_plain_file_as_kick_is_refused(pairs: Callable[..., Pair], tmp_path: object) -> None:
    pair = pairs(Echo())
    await pair.set_up()
    fd = os.memfd_create("not an eventfd")
    with pytest.raises(RequestRefused):
        await pair.frontend.request(FrontendRequest.SET_VRING_KICK, VringFd(0), (fd,))
    os.close(fd)


async def test_a_back_end_channel_that_is_no_socket_is_refused(pairs: Callable[..., Pair]) -> None:
    pair = pairs(Echo())
    await pair.frontend.negotiate()
    fd = os.memfd_create("not a socket")
    with pytest.raises(RequestRefused):
        await pair.frontend.request(FrontendRequest.SET_BACKEND_REQ_FD, fds=(fd,))
    os.close(fd)


async def test_ungated_use_closes_with_a_reason(pairs: Callable[..., Pair], caplog: pytest.LogCaptureFixture) -> None:
    pair = pairs(Echo())
    await pair.frontend.send_raw(bytes.fromhex("25000000 01000000 28000000") + bytes(40))
    await asyncio.wait_for(pair.serving, 5)
    assert "ADD_MEM_REG" in caplog.text


async def test_unknown_requests_close(pairs: Callable[..., Pair]) -> None:
    pair = pairs(Echo())
    await pair.frontend.send_raw(bytes.fromhex("e7030000 01000000 00000000"))
    await asyncio.wait_for(pair.serving, 5)
    with pytest.raises((RemoteProtocolError, ConnectionError)):
        await pair.frontend.get(FrontendRequest.GET_FEATURES)
