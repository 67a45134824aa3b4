"""The little HTTP that metrics take: what it answers, and that no client can keep it or the back-end from others."""

import argparse
import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from vhostuser.device import Device
from vhostuser.devices.blk import Blk
from vhostuser.metrics import Distribution, Kind, Metric, Sample
from vhostuser.protocol import FrontendRequest
from vhostuser.testing.pair import Pair
from vhostuser.tools import exporter
from vhostuser.tools.exporter import Address, Exporter, address

WORDS = Metric("vhostuser_words_total", Kind.COUNTER, 'Words with "quotes" and a \\.', labels=("said",))
WAITS = Metric("vhostuser_wait_seconds", Kind.HISTOGRAM, "Waits.", unit="seconds")


def measure() -> Iterator[Sample]:
    yield WORDS.sample(3, said='a "b" \\ c\nd')
    yield WAITS.sample(Distribution.of([5, 0, 2], 9_000))


def ask(request: bytes) -> tuple[bytes, dict[bytes, bytes], bytes]:
    """The status line, headers and body of the answer to a whole request."""
    head, _, body = Exporter(measure).answer(request).partition(b"\r\n\r\n")
    status, *headers = head.split(b"\r\n")
    return status, dict(header.split(b": ", 1) for header in headers), body


def get(path: str, method: str = "GET", version: str = "HTTP/1.1") -> bytes:
    return f"{method} {path} {version}\r\nHost: here\r\nAccept: */*\r\n\r\n".encode()


# ---- answers


def test_the_text_is_what_prometheus_reads() -> None:
    status, headers, body = ask(get("/metrics"))
    assert (status, headers[b"Connection"]) == (b"HTTP/1.1 200 OK", b"close")
    assert headers[b"Content-Type"].startswith(b"text/plain; version=0.0.4")
    assert int(headers[b"Content-Length"]) == len(body)
    words, waits = text_string_to_metric_families(body.decode())
    assert (words.name, words.type, words.documentation) == ("vhostuser_words", "counter", WORDS.help)
    assert [(s.labels, s.value) for s in words.samples] == [({"said": 'a "b" \\ c\nd'}, 3)]
    counted = {sample.labels.get("le", sample.name): sample.value for sample in waits.samples}
    assert (counted["2e-06"], counted["4e-06"], counted["+Inf"]) == (5, 5, 7)
    assert (counted["vhostuser_wait_seconds_sum"], counted["vhostuser_wait_seconds_count"]) == (9e-06, 7)


async def test_the_text_of_a_back_end_and_of_a_disk_is_what_prometheus_reads(
    pairs: Callable[..., Pair], disk: Blk
) -> None:
    pair = pairs(disk)
    await pair.set_up()
    text = Exporter(pair.backend.measure).answer(get("/metrics")).partition(b"\r\n\r\n")[2].decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert all(family.documentation for family in families.values())
    assert families["vhostuser_queue_request_seconds"].type == "histogram"
    declared = {metric.name.removesuffix("_total") for metric in Blk.metrics}
    assert declared <= families.keys()


def test_the_json_has_the_same() -> None:
    status, headers, body = ask(get("/metrics.json?pretty"))
    assert (status, headers[b"Content-Type"]) == (b"HTTP/1.1 200 OK", b"application/json")
    assert json.loads(body)[WORDS.name] == [{"labels": {"said": 'a "b" \\ c\nd'}, "value": 3}]


def test_head_is_get_without_the_body() -> None:
    status, headers, body = ask(get("/metrics", "HEAD"))
    assert (status, body) == (b"HTTP/1.1 200 OK", b"")
    assert int(headers[b"Content-Length"]) == len(ask(get("/metrics"))[2])


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (get("/"), b"404"),
        (get("/metrics/"), b"404"),
        (get("//metrics"), b"404"),
        (get("/metrics", "POST"), b"405"),
        (get("/metrics", "get"), b"405"),
        (get("/metrics", version="HTTP/2"), b"400"),
        (b"GET /metrics\r\n\r\n", b"400"),
        (b"\x16\x03\x01\r\n\r\n", b"400"),
        (b"\r\n\r\n", b"400"),
        (b"GET /metrics HTTP/1.1\r\n" + b"X: y\r\n" * 2000, b"400"),
    ],
)
def test_what_is_not_asked_for_properly_is_told_so(request_: bytes, status: bytes) -> None:
    found, headers, body = ask(request_)
    assert found.split(b" ")[1] == status
    assert int(headers[b"Content-Length"]) == len(body) > 0


@given(st.binary(max_size=300))
def test_any_bytes_are_answered(data: bytes) -> None:
    assert ask(data)[0].split(b" ")[1] in {b"400", b"404", b"405", b"200"}


# ---- clients


@pytest.fixture
async def served() -> AsyncIterator[Callable[[], socket.socket]]:
    """Makes clients that are being served."""
    tasks: list[asyncio.Task[None]] = []
    ours: list[socket.socket] = []

    def make() -> socket.socket:
        mine, theirs = socket.socketpair()
        mine.setblocking(False)
        ours.append(mine)
        tasks.append(asyncio.ensure_future(Exporter(measure).serve(theirs)))
        return mine

    yield make
    for mine in ours:
        mine.close()
    await asyncio.wait_for(asyncio.gather(*tasks), 10)


async def rest(sock: socket.socket) -> bytes:
    """Everything until the other end hangs up."""
    loop = asyncio.get_running_loop()
    found = b""
    async with asyncio.timeout(10):
        while piece := await loop.sock_recv(sock, 65536):
            found += piece
    return found


async def test_a_request_may_come_byte_by_byte(served: Callable[[], socket.socket]) -> None:
    client = served()
    for byte in get("/metrics"):
        client.send(bytes([byte]))
        await asyncio.sleep(0)
    assert (await rest(client)).startswith(b"HTTP/1.1 200 OK\r\n")


async def test_who_asks_nothing_gets_nothing(served: Callable[[], socket.socket]) -> None:
    client = served()
    client.shutdown(socket.SHUT_WR)
    assert await rest(client) == b""


async def test_half_a_request_is_no_request(served: Callable[[], socket.socket]) -> None:
    client = served()
    client.send(get("/metrics")[:-1])
    client.shutdown(socket.SHUT_WR)
    assert (await rest(client)).startswith(b"HTTP/1.1 400 ")


async def test_a_client_that_says_nothing_is_hung_up_on(
    served: Callable[[], socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "_PATIENCE", 0.02)
    assert await rest(served()) == b""


async def test_a_client_that_does_not_read_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "_PATIENCE", 0.02)
    much = b"x" * (8 << 20)  # more than a socket holds
    monkeypatch.setattr(Exporter, "answer", lambda self, head: much)
    ours, theirs = socket.socketpair()
    ours.send(get("/metrics"))
    await asyncio.wait_for(Exporter(measure).serve(theirs), 10)
    ours.setblocking(False)
    assert len(await rest(ours)) < len(much)
    ours.close()


async def test_few_clients_at_once_and_the_back_end_answers_all_the_same(
    pairs: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = pairs(Device())
    loop = asyncio.get_running_loop()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        serving = asyncio.ensure_future(Exporter(pair.backend.measure).listen(listener))
        clients = [socket.create_connection(listener.getsockname()) for _ in range(exporter._CLIENTS + 1)]
        for client in clients:
            client.setblocking(False)
        clients[-1].send(get("/metrics"))
        reading = asyncio.ensure_future(loop.sock_recv(clients[-1], 100))
        for _ in range(20):  # silent ones have all the places
            await pair.frontend.get(FrontendRequest.GET_FEATURES)
        assert not reading.done()
        clients[0].close()
        assert (await asyncio.wait_for(reading, 10)).startswith(b"HTTP/1.1 200 OK\r\n")
        serving.cancel()
        await asyncio.wait((serving,))
        for client in clients:
            client.close()


# ---- addresses


@pytest.mark.parametrize(
    ("text", "expected", "local"),
    [
        ("unix:/run/x", Address(path="/run/x"), True),
        ("127.0.0.1:9780", Address(host="127.0.0.1", port=9780), True),
        ("127.1.2.3:0", Address(host="127.1.2.3"), True),
        ("localhost:1", Address(host="127.0.0.1", port=1), True),
        ("[::1]:80", Address(host="::1", port=80), True),
        ("0.0.0.0:80", Address(host="0.0.0.0", port=80), False),
        ("[::]:80", Address(host="::", port=80), False),
        ("192.0.2.1:80", Address(host="192.0.2.1", port=80), False),
    ],
)
def test_an_address(text: str, expected: Address, local: bool) -> None:
    assert address(text) == expected
    assert expected.local == local


@pytest.mark.parametrize(
    "text", ["", "unix:", "80", ":80", "localhost", "localhost:", "example.org:80", "127.0.0.1:65536"]
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="neither unix:PATH nor HOST:PORT"):
        address(text)
