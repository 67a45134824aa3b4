"""What a back-end counts: of rings, messages, connections, of the device, and that nothing of it ever goes back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator

import pytest

from tests.runtime.echo import Echo, answer, ask
from vhostuser import measures, watch
from vhostuser.backend import Backend
from vhostuser.metrics import Kind, Metric, Sample, as_json, as_text, value_in
from vhostuser.protocol import FrontendRequest, RequestRefused, VringState
from vhostuser.testing.pair import Pair

F = FrontendRequest
SHOUTED = Metric("vhostuser_shouted_total", Kind.COUNTER, "Words.", labels=("length",))
LOUD = Metric("vhostuser_loud", Kind.GAUGE, "How loud.")


class Shout(Echo):
    """An Echo with numbers of its own."""

    metrics = (SHOUTED, LOUD)

    def __init__(self) -> None:
        super().__init__()
        self.shouted = 0

    def measure(self) -> Iterator[Sample]:
        yield SHOUTED.sample(self.shouted, length=1)
        yield LOUD.sample(11)


def value(backend: Backend, metric: Metric, **labels: object) -> float:
    return value_in(as_json(backend.measure()), metric, **labels)


async def test_rings_messages_and_connections_are_counted(pairs: Callable[..., Pair]) -> None:
    pair = pairs(Echo())
    backend = pair.backend
    assert value(backend, measures.REQUESTS, queue=1) == 0
    await pair.set_up()
    for word in (b"one", b"three"):
        await ask(pair, word)
        await answer(pair)
    assert value(backend, measures.REQUESTS, queue=0) == 2
    assert value(backend, measures.BYTES, queue=0, direction="from_driver") == 8
    assert value(backend, measures.BYTES, queue=0, direction="to_driver") == 8
    assert value(backend, measures.LATENCY, queue=0) == 2
    assert value(backend, measures.KICKS, queue=0) >= 1
    assert value(backend, measures.STATE, queue=0, state="running") == 1
    assert value(backend, measures.STATE, queue=1, state="running") == 0
    assert value(backend, measures.MESSAGES, message="SET_VRING_KICK") == 1
    assert value(backend, measures.CONNECTIONS) == 1
    assert value(backend, measures.MEMORY) == 4 << 20


async def test_what_is_in_flight_has_an_age(pairs: Callable[..., Pair]) -> None:
    device = Echo()
    pair = pairs(device)
    await pair.set_up()
    device.gate.clear()
    await ask(pair, b"slow")
    await device.taken(b"slow")
    age = value(pair.backend, measures.OLDEST, queue=0)
    assert value(pair.backend, measures.IN_FLIGHT, queue=0) == 1
    while value(pair.backend, measures.OLDEST, queue=0) <= age:
        await pair.frontend.get(F.GET_FEATURES)
    device.release()
    await answer(pair)
    assert value(pair.backend, measures.IN_FLIGHT, queue=0) == 0
    assert value(pair.backend, measures.OLDEST, queue=0) == 0


@pytest.mark.parametrize("make", ["device", "factory"])
async def test_counters_stay_when_their_front_end_has_gone_and_gauges_do_not(
    pairs: Callable[..., Pair], make: str
) -> None:
    made: list[Shout] = []

    def factory() -> Shout:
        made.append(Shout())
        return made[-1]

    pair = pairs(factory() if make == "device" else factory)
    await pair.set_up()
    made[-1].shouted = 5
    await ask(pair, b"word")
    await answer(pair)
    backend = pair.backend
    await pair.close()
    assert value(backend, SHOUTED, length=1) == 5
    assert value(backend, measures.REQUESTS, queue=0) == 1
    assert value(backend, measures.LATENCY, queue=0) == 1
    assert value(backend, measures.MESSAGES, message="SET_VRING_KICK") == 1
    assert value(backend, measures.ACCEPTED) == 1
    assert value(backend, measures.CONNECTIONS) == 0
    assert value(backend, measures.MEMORY) == 0
    assert value(backend, LOUD) == (11 if make == "device" else 0), "a device without a front-end is still there"


async def test_a_refusal_and_a_breach_of_the_protocol_are_counted(pairs: Callable[..., Pair]) -> None:
    pair = pairs(Echo())
    await pair.set_up()
    await ask(pair, b"word")
    await answer(pair)
    with pytest.raises(RequestRefused):
        await pair.frontend.request(F.SET_VRING_BASE, VringState(0, 3))
    assert value(pair.backend, measures.REFUSED, message="SET_VRING_BASE") == 1
    await pair.frontend.send_raw(bytes.fromhex("e7030000 09000000 00000000"))
    await asyncio.wait_for(pair.serving, 5)
    assert value(pair.backend, measures.CUT_OFF, reason="protocol") == 1


async def test_a_device_that_cannot_be_measured_hides_nothing_else(
    pairs: Callable[..., Pair], caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Shout):
        def measure(self) -> Iterator[Sample]:
            yield SHOUTED.sample(1, length=1)
            raise ZeroDivisionError("no words")

    pair = pairs(Broken)
    await pair.set_up()
    assert value(pair.backend, measures.CONNECTIONS) == 1
    await pair.close()
    assert "the device cannot be measured: ZeroDivisionError: no words" in caplog.text


def test_every_metric_of_the_runtime_that_is_shown_is_declared() -> None:
    async def shown() -> set[str]:
        return {sample.metric.name for sample in Backend(Echo()).measure()}

    assert asyncio.run(shown()) <= {metric.name for metric in measures.ALL}


async def test_the_text_of_a_whole_back_end_can_be_read(pairs: Callable[..., Pair]) -> None:
    pair = pairs(Shout())
    await pair.set_up()
    text = as_text(pair.backend.measure())
    assert 'vhostuser_queue_state{queue="0",state="enabled"} 1\n' in text
    assert 'vhostuser_shouted_total{length="1"} 0\n' in text


# ---- messages that take long


async def test_a_message_that_takes_long_is_told_with_its_ring_and_what_it_waits_for(
    pairs: Callable[..., Pair], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "LONG", 0.01)
    device = Echo()
    pair = pairs(device)
    await pair.set_up()
    device.gate.clear()
    await ask(pair, b"slow")
    await device.taken(b"slow")
    stopping = asyncio.ensure_future(pair.frontend.stop_ring(pair.rings[0]))
    reason = "it waits for ring 0 to stop: 1 request is under way, the oldest for "
    await until(lambda: sum(reason in line for line in told(caplog)) >= 2)
    assert value(pair.backend, measures.WAITING) > 0
    device.release()
    await stopping
    assert value(pair.backend, measures.WAITING) == 0
    assert all(line.startswith("test: GET_VRING_BASE of ring 0 takes long (") for line in told(caplog))
    assert any(line.startswith("test: GET_VRING_BASE of ring 0 took ") for line in caplog.messages)


async def test_a_device_that_takes_long_is_what_a_message_waits_for(
    pairs: Callable[..., Pair], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "LONG", 0.01)
    going = asyncio.Event()

    class Slow(Echo):
        async def stop(self) -> None:
            await going.wait()

    device = Slow()
    pair = pairs(device)
    await pair.set_up()
    await ask(pair, b"word")
    await answer(pair)
    stopping = asyncio.ensure_future(pair.frontend.stop_ring(pair.rings[0]))
    await until(lambda: any("it waits for the device to stop" in line for line in told(caplog)))
    device.data.call_soon_threadsafe(going.set)
    await stopping


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not holds():  # noqa: ASYNC110 - what is waited for is a line of the log
            await asyncio.sleep(0.001)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings about this message; on a busy machine others may take long too."""
    warnings = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    return [line for line in warnings if "GET_VRING_BASE" in line and "takes long" in line]
