"""Kicks, calls, and the order in which a ring is set up. Sections of the SET_VRING_ messages."""

from __future__ import annotations

import asyncio
import os

from vhostuser.conformance.bench import Need
from vhostuser.conformance.lane import Lane
from vhostuser.conformance.peer import Peer
from vhostuser.conformance.suite import Theme, check, equal
from vhostuser.driverqueue import RingParts
from vhostuser.protocol import FrontendRequest, ProtocolFeature, VirtioFeature, VringFd

F, P, V = FrontendRequest, ProtocolFeature, VirtioFeature
RINGS, BIT_30 = Need.RINGS, V.PROTOCOL_FEATURES

SETUP: Theme[Peer] = Theme("setup", "Ring states")
KICK: Theme[Peer] = Theme("kick", F.SET_VRING_KICK.clause)
CALL: Theme[Peer] = Theme("call", F.SET_VRING_CALL.clause)


# ---- setting up


@SETUP.must("without-bit-30", "Without bit 30 every ring is enabled by SET_FEATURES.", RINGS)
async def _(peer: Peer) -> None:
    await peer.frontend.negotiate(V.VERSION_1.mask | peer.format, 0)
    await peer.share()
    lane = peer.make_lane()
    await lane.start()
    await lane.works()


@SETUP.must("without-protocol-features", "A ring works where no protocol feature is used.", RINGS, BIT_30)
async def _(peer: Peer) -> None:
    await peer.frontend.negotiate(V.VERSION_1.mask | BIT_30.mask | peer.format, 0)
    await peer.share()
    lane = peer.make_lane()
    await lane.start()
    await lane.works()


async def _set_up(peer: Peer, order: str) -> Lane:
    """Sends the messages that these letters stand for, in this order, and gives the ring its first request."""
    await peer.negotiate()
    memory = await peer.share()
    lane = peer.make_lane()
    await lane.pair()
    frontend, index, user, queue = peer.frontend, lane.index, memory.map.guest_to_host, lane.queue
    parts = {"desc": user(queue.desc), "avail": user(queue.avail), "used": user(queue.used)}
    for letter in order:
        match letter:
            case "n":
                await frontend.set_vring_num(index, queue.size)
            case "b":
                await frontend.set_vring_base(index, queue.first_base)
            case "a":
                await frontend.set_vring_addr(index, **parts)
            case "k":
                await frontend.set_vring_kick(index, lane.ring.kick_fd)
            case "c":
                await frontend.set_vring_call(index, lane.ring.call_fd)
            case "e":
                await lane.enable()
    return lane


for _order, _rule in {
    "nbakce": "KICK may come before CALL",
    "nbacke": "CALL may come before KICK",
    "ecnbak": "CALL and ENABLE may come before anything else about the ring",
    "nbake": "a ring needs no SET_VRING_CALL: its driver polls",
    "nakce": "a ring that is given no base begins at 0",
    "banke": "base and addresses may come before the size",
}.items():

    def _add(order: str, rule: str) -> None:
        @SETUP.must(order, f"Setting a ring up ({order}): {rule}.", RINGS, BIT_30)
        async def _(peer: Peer) -> None:
            lane = await _set_up(peer, order)
            await lane.works()

    _add(_order, _rule)


@SETUP.should("kecnba", "A ring whose kick descriptor comes first is started when the rest is there.", RINGS, BIT_30)
async def _(peer: Peer) -> None:
    lane = await _set_up(peer, "kecnba")
    await lane.works()


@SETUP.must("no-addresses", "A ring without addresses that is enabled and kicked does no harm.", RINGS, BIT_30)
async def _(peer: Peer) -> None:
    lane = await _set_up(peer, "nbkce")
    lane.kick()
    await lane.idle()


@SETUP.must("no-size", "A ring without a size that is enabled and kicked does no harm.", RINGS, BIT_30)
async def _(peer: Peer) -> None:
    lane = await _set_up(peer, "bakce")
    lane.kick()
    await peer.answers()


@SETUP.must("moved", "A ring that was stopped may go on at another address.", RINGS)
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    await lane.works()
    await lane.stop()
    moved = peer.make_lane(at=512 * 1024)
    await moved.start()
    await moved.works()


@SETUP.must("resized", "A ring that was stopped may go on with another size.", RINGS)
async def _(peer: Peer) -> None:
    lane = await peer.lane(size=64)
    await lane.works()
    await lane.stop()
    resized = peer.make_lane(size=16)
    await resized.start()
    for _ in range(4):
        resized.offer(count=5)
        resized.kick()
        await resized.served()


@SETUP.must("reset-by-driver", "The used index is read from the ring at a start, not remembered from the last.", RINGS)
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    await lane.works()
    await lane.works()
    await lane.stop()
    fresh = peer.make_lane()  # which clears the ring, as a guest that boots again does
    await fresh.start()
    await fresh.works()
    equal("the used index", fresh.raw.used_index, 1)


@SETUP.must("two-rings", "Two rings work side by side, and the stop of one is not the other's.", Need.BOTH_RINGS)
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    await lane.works()
    if peer.index:  # of a network device, whose first ring was started with it
        await peer.frontend.get_vring_base(0)
        await lane.works()
        return
    other = peer.make_lane(1)
    await other.start()
    await other.works()
    await lane.stop()
    await other.works()


# ---- kicks


@KICK.must("before-enable", "A kick that comes while a ring is disabled is not lost when it is enabled.", RINGS, BIT_30)
async def _(peer: Peer) -> None:
    lane = await peer.lane(enable=False)
    lane.offer()
    lane.kick()
    await peer.frontend.get_features()
    await asyncio.sleep(peer.quiet)
    await lane.enable()
    await lane.served()


@KICK.must("before-message", "A descriptor that is readable when SET_VRING_KICK comes is a kick.", RINGS)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    await peer.share()
    lane = peer.make_lane()
    lane.offer()
    lane.kick()
    await lane.start()
    await lane.served()


@KICK.must("without-request", "A kick with nothing in the ring does no harm.", RINGS)
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    for _ in range(100):
        lane.kick()
    await lane.idle()
    await lane.works()


@KICK.must("counter", "However often it was kicked, a ring is looked at once and no request is made up.", RINGS)
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    os.eventfd_write(lane.ring.kick_fd, 0xFFFF_FFFF_FFFF)
    await lane.idle()
    await lane.works()


@KICK.must("blocking", "A kick descriptor may be a blocking one.", RINGS)
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    os.set_blocking(lane.ring.kick_fd, True)  # a flag of the file, which both sides share
    await lane.works()
    await lane.works()
    await lane.stop()


@KICK.must("each", "No kick is lost, however they fall between requests.", RINGS)
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    for _ in range(300):
        await lane.works()


@KICK.must("replaced", "A new kick descriptor counts from then on, while the ring runs.", RINGS)
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    await lane.works()
    kick = peer.eventfd()
    await peer.frontend.set_vring_kick(lane.index, kick)
    await asyncio.sleep(peer.quiet)  # until it does not look any more, as it may for a while after a request
    lane.offer()
    os.eventfd_write(kick, 1)
    await lane.served()


@KICK.must("replaced-leak", "Kick, call and err descriptors that are replaced are closed.", RINGS)
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    frontend, index = peer.frontend, lane.index
    await lane.works()
    before = peer.open_fds()
    for _ in range(20):
        await frontend.set_vring_kick(index, lane.ring.kick_fd)
        await frontend.set_vring_call(index, lane.ring.call_fd)
        await frontend.set_vring_err(index, lane.ring.err_fd)
    await frontend.get_features()
    check(peer.open_fds() <= before + 1, f"{before} descriptors", f"{peer.open_fds()} after 60 replacements")
    await lane.works()


@KICK.should("polled", "A ring without a kick descriptor is polled: its requests are served without kicks.", RINGS)
async def _(peer: Peer) -> None:
    lane = await peer.lane(polled=True)
    await lane.works(kick=False)
    await lane.works(kick=False)


@KICK.must(
    "polled-index", "Bit 8 of SET_VRING_KICK says that there is no descriptor; it is no part of the index.", P.REPLY_ACK
)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    reaction = await peer.react(F.SET_VRING_KICK, VringFd(peer.index, has_fd=False))
    await peer.serves_another()
    check(reaction.kind.value != "no answer", "an answer", str(reaction))


@KICK.must("no-spin", "A pipe whose writer has gone is no reason to spin or to die.", RINGS)
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    await lane.works()
    read, write = peer.pipe()
    await peer.react(F.SET_VRING_KICK, VringFd(peer.index), (read,))
    os.write(write, b"12345678")
    await asyncio.sleep(peer.quiet)
    peer.drop(write)  # readable for ever, from now on
    check(not await peer.subject.spins(4 * peer.quiet), "a back-end at rest", "one that uses a whole processor")
    await peer.serves_another()


# ---- calls


@CALL.must("called", "The driver is called when a request was returned.", RINGS)
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    await lane.works()  # some call once when a ring starts, whatever comes of it
    await lane.calm()
    await lane.works()
    check(await lane.called(), "a call", "none")


@CALL.must("every-time", "The driver is called again for what is returned after it has looked.", RINGS)
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    for _ in range(50):
        lane.offer()
        lane.kick()
        while not lane.returned():
            check(await lane.called(), "a call for each request", "a request that nobody called for")


@CALL.should(
    "not-wanted", "A driver that asks for no calls gets none.", RINGS, section="Used Buffer Notification Suppression"
)
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    await lane.works()
    lane.bytes.want_no_calls()
    await lane.calm()
    await lane.works()
    check(not await lane.called(within=peer.quiet), "no call", "a call")


async def _runs_empty(peer: Peer, *features: VirtioFeature) -> None:
    await peer.negotiate(V.NOTIFY_ON_EMPTY, *features, legacy=True)
    await peer.share()
    lane = peer.make_lane()
    await lane.start()
    await lane.works()
    lane.bytes.want_no_calls()
    lane.bytes.want_call(late=True)
    await lane.calm()
    await lane.works()
    check(await lane.called(), "a call when nothing is left", "none")


_EMPTY = "Legacy Interface: Reserved Feature Bits"


@CALL.must(
    "on-empty", "With NOTIFY_ON_EMPTY a driver that asks for no calls is called when nothing is left.",
    RINGS, V.NOTIFY_ON_EMPTY, section=_EMPTY,
)  # fmt: skip
async def _(peer: Peer) -> None:
    await _runs_empty(peer)


@CALL.must(
    "on-empty-event-idx", "So is one that asks by the event index for a call later.",
    RINGS, V.NOTIFY_ON_EMPTY, V.RING_EVENT_IDX, section=_EMPTY,
)  # fmt: skip
async def _(peer: Peer) -> None:
    await _runs_empty(peer, V.RING_EVENT_IDX)


@CALL.must("replaced", "A new call descriptor counts from then on, while the ring runs.", RINGS)
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    await lane.works()
    await peer.frontend.set_vring_call(lane.index, peer.eventfd())
    await lane.calm()
    await lane.works()
    check(not await lane.called(within=peer.quiet), "no call on the old descriptor", "a call")
    await peer.frontend.set_vring_call(lane.index, lane.ring.call_fd)
    await lane.calm()
    await lane.works()
    check(await lane.called(), "a call on the new descriptor", "none")


@CALL.must("none", "Without a call descriptor (bit 8) nobody is called, and requests are served.", RINGS)
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    await lane.works()
    await peer.frontend.set_vring_call(lane.index, None)
    await lane.calm()
    await lane.works()
    check(not await lane.called(within=peer.quiet), "no call on the descriptor given before", "a call")


@CALL.should("full", "A call eventfd that nobody reads and that is full holds nothing up.", RINGS)
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    await lane.calm()
    os.eventfd_write(lane.ring.call_fd, 0xFFFF_FFFF_FFFF_FFFE)
    for _ in range(3):
        await lane.works()
    await lane.stop()


@CALL.should(
    "at-start", "A driver is called when its ring starts again: a call may have been lost with the old one.", RINGS
)
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    await lane.works()
    await lane.stop()
    await lane.calm()
    await lane.start()
    lane.kick()
    check(await lane.called(), "a call", "none")


# ---- where a ring may lie


@SETUP.must(
    "least-alignment",
    "The parts of a ring need no more alignment than is written.",
    RINGS,
    section="Virtqueues",
)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    await peer.share()
    lane = peer.make_lane(at=RingParts(0x80010, 0x82004 if peer.packed else 0x82002, 0x84004))
    await lane.start()
    await lane.works()


@SETUP.must("at-the-end", "A ring may lie at the very end of memory.", RINGS, section="Virtqueues")
async def _(peer: Peer) -> None:
    await peer.negotiate()
    memory = await peer.share()
    used = memory.end - 4 - 8 * 16 - 4
    parts = RingParts(used - 1024 & ~15, used - 512, used)
    if peer.packed:
        parts = RingParts(memory.end - 16 * 16, memory.end - 1024, memory.end - 512)
    lane = peer.make_lane(size=16, at=parts)
    await lane.start()
    await lane.works()


@SETUP.must("apart", "The parts of a ring may lie in different regions.", RINGS, section="Memory access")
async def _(peer: Peer) -> None:
    await peer.negotiate()
    await peer.share(peer.make_memory((0, 4 << 20), (8 << 20, 1 << 20), (1 << 32, 1 << 20)))
    lane = peer.make_lane(at=RingParts(0, 8 << 20, 1 << 32))
    await lane.start()
    await lane.works()
