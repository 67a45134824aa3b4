"""The rings of a network device: pairs, disabling, stops in the middle of traffic, notifications.

What belongs here: what the themes about rings cannot try with a ring alone. What does not: what lies in the rings
(``net_transmit``, ``net_receive``), migration (``net_migration``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from vhostuser.conformance.backend_cases.net_receive import kicked_when_wanted
from vhostuser.conformance.bench import Need
from vhostuser.conformance.frames import NetFeature, frame, number_of, same
from vhostuser.conformance.nic import Arrival, Nic, plug
from vhostuser.conformance.peer import Peer
from vhostuser.conformance.suite import Theme, check, equal
from vhostuser.protocol import FrontendRequest, VirtioFeature

F, N, V = FrontendRequest, NetFeature, VirtioFeature
CASES: Theme[Peer] = Theme("net", "Ring states")
LOOP, PAIRS = Need.LOOP, Need.TWO_PAIRS

# ---- pairs


async def _pairs(peer: Peer, count: int = 2) -> list[Nic]:
    await peer.negotiate(N.MQ)
    await peer.share()
    nics = [Nic(peer, pair) for pair in range(count)]
    for nic in nics:
        await nic.start()
    return nics


MULTIQUEUE = "Multiple queue support"


@CASES.must("pairs.each", "Each pair carries frames of its own.", PAIRS, section=MULTIQUEUE)
async def _(peer: Peer) -> None:
    for number, nic in enumerate(await _pairs(peer)):
        await nic.works(number)


@CASES.must("pairs.together", "Pairs carry frames at the same time, each in its order.", PAIRS, section=MULTIQUEUE)
async def _(peer: Peer) -> None:
    nics = await _pairs(peer)
    for nic in nics:
        nic.post(count=20)
    for number in range(20):
        for pair, nic in enumerate(nics):
            nic.transmit(frame(100, 100 * pair + number))
    for pair, nic in enumerate(nics):
        await nic.sent()
        came = [number_of(arrival.frame) for arrival in await nic.received(20)]
        equal(f"the frames of pair {pair}", came, list(range(100 * pair, 100 * pair + 20)))


@CASES.must("pairs.stopped", "When a pair stops the others go on.", PAIRS, section=MULTIQUEUE)
async def _(peer: Peer) -> None:
    first, second = await _pairs(peer)
    await first.works(1)
    await second.works(2)
    for half in (first.receive, first.send):
        await half.stop()
    await second.works(3)


@CASES.must("pairs.one-alone", "A pair works while others were never set up.", PAIRS, section=MULTIQUEUE)
async def _(peer: Peer) -> None:
    (nic,) = await _pairs(peer, 1)
    for number in range(10):
        await nic.works(number)


@CASES.must("pairs.disabled", "A pair that is set up and disabled keeps nothing from the others.", PAIRS)
async def _(peer: Peer) -> None:
    first, second = await _pairs(peer)
    for half in (second.receive, second.send):
        await half.enable(False)
    second.post(count=4)
    for number in range(10):
        await first.works(number)
    equal("frames in the pair that is disabled", len(second.arrived()), 0)


# ---- disabled


@CASES.must("disabled.transmit", "What a disabled ring transmits is taken, and goes nowhere.", LOOP)
async def _(peer: Peer) -> None:
    nic = await plug(peer)
    await nic.works(1)
    await nic.send.enable(False)
    nic.post(count=4)
    for number in (2, 3):
        nic.transmit(frame(100, number))
    await nic.sent()
    await nic.silence()
    await nic.send.enable()
    await nic.echo(frame(100, 4))


@CASES.must("disabled.receive", "A receive ring that is disabled is given no frames.", LOOP)
async def _(peer: Peer) -> None:
    nic = await plug(peer)
    await nic.works(1)
    nic.post(count=4)
    await nic.receive.enable(False)
    for number in (2, 3):
        nic.transmit(frame(100, number))
    await nic.sent()
    await nic.silence()


@CASES.must("disabled.receive-again", "When it is enabled again frames come.", LOOP)
async def _(peer: Peer) -> None:
    nic = await plug(peer)
    await nic.works(1)
    await nic.receive.enable(False)
    await nic.receive.enable()
    await nic.works(2)


@CASES.must("disabled.from-the-start", "A pair that was never enabled receives nothing.", LOOP, V.PROTOCOL_FEATURES)
async def _(peer: Peer) -> None:
    nic = await plug(peer, enable=False)
    nic.post(count=2)
    await nic.send.enable()
    nic.transmit(frame())
    await asyncio.sleep(peer.quiet)
    await nic.silence()


@CASES.must(
    "disabled.without-bit-30", "Without PROTOCOL_FEATURES rings are enabled from the start.", LOOP,
    section=F.SET_VRING_ENABLE.clause,
)  # fmt: skip
async def _(peer: Peer) -> None:
    await peer.frontend.negotiate(V.VERSION_1.mask | peer.format, 0)
    await peer.share()
    nic = Nic(peer)
    await nic.start()
    await nic.works()


# ---- stops in the middle of traffic

STOP = F.GET_VRING_BASE.clause


async def _traffic(peer: Peer, *, transmit: bool) -> tuple[list[Arrival], int]:
    """Frames, and one of the rings stopped and started among them, again and again; what came, and how many were
    sent."""
    nic = await plug(peer, size=256)
    half = nic.send if transmit else nic.receive
    nic.post(*(128,) * 240)
    count, came = 0, []
    for _ in range(15):
        for _ in range(8):
            nic.transmit(frame(100, count))
            count += 1
        base = await half.stop()
        equal("the base at a stop: all that was taken is returned", base, half.bytes.drained(base))
        await half.start()
        half.kick()
        await nic.sent()
        came += nic.arrived()
    nic.transmit(frame(100, count))
    await nic.sent()
    while not came or number_of(came[-1].frame) != count:
        came += await nic.received()
    return came, count + 1


@CASES.must(
    "stop.transmit", "A stop in the middle of traffic sends no frame twice, and keeps their order.", LOOP, section=STOP
)
async def _(peer: Peer) -> None:
    came, _ = await _traffic(peer, transmit=True)
    _once(came)


@CASES.should("stop.transmit-all", "A stop in the middle of traffic loses no frame.", LOOP, section=STOP)
async def _(peer: Peer) -> None:
    came, count = await _traffic(peer, transmit=True)
    equal("frames that came", len(came), count)


@CASES.must("stop.receive", "A receive ring that is stopped among frames brings none twice.", LOOP, section=STOP)
async def _(peer: Peer) -> None:
    came, _ = await _traffic(peer, transmit=False)
    _once(came)


def _once(came: Sequence[Arrival]) -> None:
    numbers = [number_of(arrival.frame) for arrival in came]
    equal("the frames that came, in order and once", numbers, sorted(set(numbers)))
    for arrival in came:
        same(arrival.frame, frame(100, number_of(arrival.frame)))


@CASES.must("stop.buffers-left", "Buffers that were not used are there again after a stop.", LOOP, section=STOP)
async def _(peer: Peer) -> None:
    nic = await plug(peer)
    nic.post(count=6)
    await nic.echo(frame(100, 1))
    equal("the base of the receive ring", await nic.receive.stop(), nic.receive.bytes.base_at(1))
    await nic.receive.start()
    nic.receive.kick()
    for number in range(2, 7):
        await nic.echo(frame(100, number))


@CASES.must(
    "stop.silent", "A receive ring that is stopped is not written to, whatever comes.", LOOP,
    section="Suspended device state",
)  # fmt: skip
async def _(peer: Peer) -> None:
    nic = await plug(peer)
    await nic.works(1)
    (place,) = nic.post()
    nic.peer.memory.write(place, bytes(128))
    await nic.receive.stop()
    for number in (2, 3):
        nic.transmit(frame(100, number))
    await asyncio.sleep(2 * peer.quiet)
    equal("frames that came", len(nic.arrived()), 0)
    check(not any(nic.peer.memory.read(place, 128)), "the buffer left alone", "something written")


@CASES.should("reconnect.old-frames", "A front-end gets no frames that another one was to get.", LOOP)
async def _(peer: Peer) -> None:
    nic = await plug(peer)
    for number in range(4):
        nic.transmit(frame(100, number))  # and no buffer for any of them
    await nic.sent()
    await peer.again()
    nic = await plug(peer)
    nic.post(count=8)
    nic.transmit(frame(100, 99))
    await nic.sent()
    equal("the first frame that comes", number_of((await nic.received())[0].frame), 99)


@CASES.must("reconnect.in-traffic", "After a front-end that left among frames the next is served.", LOOP)
async def _(peer: Peer) -> None:
    for round_ in range(3):
        nic = await plug(peer)
        await nic.works(round_)
        nic.post(count=2)
        for number in range(8):
            nic.transmit(frame(100, number))
        await peer.again()


# ---- notifications

CALLED, KICKED = "Used Buffer Notification Suppression", "Available Buffer Notification Suppression"


async def _ready(peer: Peer, *features: VirtioFeature) -> Nic:
    """A pair that has carried a frame and is at rest."""
    nic = await plug(peer, *features)
    await nic.works()
    nic.post(count=4)
    await nic.receive.calm()
    return nic


@CASES.must("called.receive", "The driver is called when a frame has come.", LOOP, section=CALLED)
async def _(peer: Peer) -> None:
    nic = await _ready(peer)
    for number in range(3):
        nic.transmit(frame(100, number))
        check(await nic.receive.called(), "a call for the frame", "none")
        await nic.received()
        await nic.receive.calm()


@CASES.should("called.not-wanted", "A driver that asks for no calls for frames gets none.", LOOP, section=CALLED)
async def _(peer: Peer) -> None:
    nic = await _ready(peer)
    nic.receive.bytes.want_no_calls()
    await nic.echo(frame())
    check(not await nic.receive.called(within=peer.quiet), "no call", "a call")


@CASES.must(
    "called.event-idx", "With EVENT_IDX the driver is called for the frame that it named.", LOOP, V.RING_EVENT_IDX,
    section=CALLED,
)  # fmt: skip
async def _(peer: Peer) -> None:
    nic = await _ready(peer, V.RING_EVENT_IDX)
    nic.receive.bytes.want_call(1)
    await nic.echo(frame(100, 1))
    early = await nic.receive.called(within=peer.quiet)
    await nic.echo(frame(100, 2))
    check(early or await nic.receive.called(), "a call for the second frame", "none")


@CASES.should(
    "called.event-idx-far", "With EVENT_IDX there are no calls before that frame.", LOOP, V.RING_EVENT_IDX,
    section=CALLED,
)  # fmt: skip
async def _(peer: Peer) -> None:
    nic = await _ready(peer, V.RING_EVENT_IDX)
    nic.receive.bytes.want_call(late=True)
    await nic.echo(frame(100, 1))
    check(not await nic.receive.called(within=peer.quiet), "no call", "a call")


@CASES.must(
    "called.each-ring", "Frames that come call on the descriptor of their own ring alone.", LOOP, section=CALLED
)
async def _(peer: Peer) -> None:
    nic = await _ready(peer)
    nic.send.bytes.want_no_calls()
    await nic.send.calm()
    await nic.echo(frame())
    check(await nic.receive.called(), "a call of the receive ring", "none")
    check(not await nic.send.called(within=peer.quiet), "no call of the ring that asked for none", "a call")


@CASES.must(
    "kicked.event-idx", "With EVENT_IDX too a device in which frames wait asks for a kick.", LOOP, V.RING_EVENT_IDX,
    section=KICKED,
)  # fmt: skip
async def _(peer: Peer) -> None:
    await kicked_when_wanted(await plug(peer, V.RING_EVENT_IDX))
