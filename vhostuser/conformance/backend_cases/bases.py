"""Where a ring left off, and where it goes on. Sections of GET_VRING_BASE and SET_VRING_BASE."""

from __future__ import annotations

import asyncio

from vhostuser.conformance.bench import Need
from vhostuser.conformance.peer import Peer
from vhostuser.conformance.suite import Theme, check, equal
from vhostuser.protocol import FrontendRequest

F = FrontendRequest
CASES: Theme[Peer] = Theme("base", F.GET_VRING_BASE.clause)
RINGS = Need.RINGS


@CASES.must("count", "The base is the number of chains that were taken.", RINGS)
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    for _ in range(5):
        await lane.works()
    equal("the base", await lane.stop(), lane.queue.base)


@CASES.must("given", "The base of a ring in which nothing was taken is the one that was set.", RINGS)
async def _(peer: Peer) -> None:
    lane = await peer.lane(enable=False)
    await peer.frontend.set_vring_base(lane.index, lane.bytes.base_at(7))
    equal("the base", await lane.stop(), lane.bytes.base_at(7))


@CASES.must("untouched", "A ring that was never set up has base 0, and a question for it does no harm.")
async def _(peer: Peer) -> None:
    await peer.negotiate()
    equal("the base", await peer.frontend.get_vring_base(peer.index), 0)


@CASES.must("before-negotiation", "GET_VRING_BASE as the first message does no harm.")
async def _(peer: Peer) -> None:
    await peer.react(F.GET_VRING_BASE, bytes(8))
    await peer.serves_another()


@CASES.must("twice", "A second GET_VRING_BASE gives the same base.", RINGS)
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    await lane.works()
    await lane.works()
    equal("the bases", (await lane.stop(), await lane.stop()), (lane.queue.base,) * 2)


@CASES.must("index", "The answer names the ring that was asked for.", RINGS)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    reaction = await peer.react(F.GET_VRING_BASE, peer.index.to_bytes(4, "little") + bytes(4))
    equal("the index in the answer", int.from_bytes(reaction.body[:4], "little"), peer.index)


@CASES.must("goes-on", "A ring that starts from its base goes on where it was, again and again.", RINGS)
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    for _ in range(5):
        await lane.works()
        equal("the base", await lane.stop(), lane.queue.base)
        await lane.start()


@CASES.must("drained", "When the base is told, what was taken has been returned: used index and base are equal.", RINGS)
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    for _ in range(20):
        lane.offer(count=12)
        lane.kick()
        await asyncio.sleep(0.0005)
        base = await lane.stop()
        equal("the base", base, lane.bytes.drained(base))
        await lane.start()
        lane.kick()
        await lane.served()


@CASES.must(
    "not-taken-later", "Requests that were not taken before the stop are left alone, and served after a start.", RINGS
)
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    await lane.works()
    await lane.stop()
    lane.offer(count=3)
    await lane.idle()
    await lane.start()
    lane.kick()
    await lane.served()


@CASES.must("silent-after-stop", "A suspended device notifies nobody.", RINGS, section="Suspended device state")
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    await lane.works()
    await lane.stop()
    await lane.calm()
    lane.offer()
    check(not await lane.called(within=peer.quiet), "no call", "a call after GET_VRING_BASE")


@CASES.must(
    "answers-after-stop", "A suspended device still answers the front-end.", RINGS, section="Suspended device state"
)
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    await lane.works()
    await lane.stop()
    await peer.answers()


@CASES.must("wrap", "Indexes go on from 65535 to 0.", RINGS, section=F.SET_VRING_BASE.clause)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    await peer.share()
    lane = peer.make_lane(size=16)
    lane.base = lane.raw.available_index = lane.raw.used_index = 65534
    lane.usual_chain()
    await lane.start()
    for expected in (65535, 0, 1):
        lane.push(0)
        lane.kick()
        await lane.used_to(expected)
    equal("the base", await lane.stop(), 1)


@CASES.must(
    "set", "A ring begins with the chain at its base, not with the first.", RINGS, section=F.SET_VRING_BASE.clause
)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    await peer.share()
    lane = peer.make_lane(size=16)
    lane.usual_chain()
    lane.push(5, 5, 0)  # 5 is described nowhere
    lane.base = 2
    lane.raw.used_index = 2
    await lane.start()
    lane.kick()
    await lane.used_to(3)
    equal("the used entry", lane.raw.used_entry(2)[0], 0)
