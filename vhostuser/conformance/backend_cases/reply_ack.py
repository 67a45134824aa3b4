"""Who answers what, and when nothing is answered. Section "VHOST_USER_PROTOCOL_F_REPLY_ACK"."""

from __future__ import annotations

from vhostuser.conformance.bench import Need
from vhostuser.conformance.peer import PLAIN, Kind, Peer
from vhostuser.conformance.suite import Theme, check, equal
from vhostuser.frontend import DRIVABLE_PROTOCOL
from vhostuser.protocol import (
    NEED_REPLY,
    REPLY,
    U64,
    VERSION,
    Empty,
    FrontendRequest,
    Payload,
    ProtocolFeature,
    VringAddress,
    VringFd,
    VringState,
)

F, P = FrontendRequest, ProtocolFeature
CASES: Theme[Peer] = Theme("reply-ack", "VHOST_USER_PROTOCOL_F_REPLY_ACK")
ACK = P.REPLY_ACK
NOWHERE = 255


async def _unowned(peer: Peer, wanted: int = ~0) -> None:
    """Negotiates, and leaves SET_OWNER, which may come once (rust-vmm), to the case."""
    frontend = peer.frontend
    await frontend.get_features()
    await frontend.set_protocol_features(await frontend.get_protocol_features() & DRIVABLE_PROTOCOL & wanted)
    await frontend.set_features(PLAIN)


@CASES.must("ack", "A request that asks for it is acknowledged: a u64 of 0, flags 0x5.", ACK)
async def _(peer: Peer) -> None:
    await _unowned(peer)
    reaction = await peer.react(F.SET_OWNER)
    equal("flags and payload of the acknowledgement", (reaction.flags, reaction.body), (VERSION | REPLY, U64(0).pack()))


@CASES.must("unasked", "A request that does not ask is not acknowledged.", ACK)
async def _(peer: Peer) -> None:
    await _unowned(peer)
    await peer.send(F.SET_OWNER)
    await peer.answers()


@CASES.must("unnegotiated", "Without REPLY_ACK nothing is acknowledged, asked or not.")
async def _(peer: Peer) -> None:
    await _unowned(peer, ~ACK.mask)
    await peer.send(F.SET_OWNER, flags=VERSION | NEED_REPLY)
    await peer.answers()


@CASES.must("once", "A request with a reply of its own is answered once, also if it asks.", ACK)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    for code in (F.GET_FEATURES, F.GET_PROTOCOL_FEATURES):
        await peer.react(code, flags=VERSION | NEED_REPLY)
    await peer.answers()


@CASES.must("own-reply-flags", "A reply of a request's own does not keep the flag that asked for it.", ACK)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    equal(
        "the flags of the reply", (await peer.react(F.GET_FEATURES, flags=VERSION | NEED_REPLY)).flags, VERSION | REPLY
    )


@CASES.must("vring-base-once", "GET_VRING_BASE is answered once, also if it asks.", ACK)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    await peer.react(F.GET_VRING_BASE, VringState(peer.index), flags=VERSION | NEED_REPLY)
    await peer.answers()


@CASES.must("switched-off", "REPLY_ACK given back is not used any more.", ACK)
async def _(peer: Peer) -> None:
    await _unowned(peer)
    await peer.send(F.SET_PROTOCOL_FEATURES, U64(peer.frontend.session.protocol_features & ~ACK.mask))
    await peer.send(F.SET_OWNER, flags=VERSION | NEED_REPLY)
    await peer.answers()


@CASES.must("in-order", "Acknowledgements come in the order of the requests.", ACK)
async def _(peer: Peer) -> None:
    await _unowned(peer)
    codes = (F.SET_OWNER, F.GET_FEATURES, F.SET_VRING_NUM, F.GET_PROTOCOL_FEATURES)
    for code in codes:
        size = VringState(0, 64) if code is F.SET_VRING_NUM else Empty()
        await peer.send(code, size, flags=VERSION | NEED_REPLY)
    for code in codes:
        equal(f"the answer to {code.name}", (await peer.reaction(code)).kind, Kind.DONE)


@CASES.should("refusal-keeps-connection", "After a refusal the connection goes on.", ACK, Need.NO_RING_255)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    await peer.refuses(F.SET_VRING_NUM, VringState(NOWHERE, 64))
    await peer.answers()


# ---- what cannot be done must not be acknowledged


def _never(name: str, rule: str, code: FrontendRequest, payload: Payload, *, binding: bool = True) -> None:
    add = CASES.must if binding else CASES.should
    needs = (ACK, Need.NO_RING_255) if name.startswith("no-queue") and name != "no-queue-wide" else (ACK,)

    @add(name, rule, *needs, section=code.clause)
    async def _(peer: Peer) -> None:
        await peer.negotiate()
        await peer.share()
        await peer.refuses(code, payload)


_never("no-queue-num", "The size of a ring that does not exist is not set.", F.SET_VRING_NUM, VringState(NOWHERE, 64))
_never("no-queue-base", "The base of a ring that does not exist is not set.", F.SET_VRING_BASE, VringState(NOWHERE))
_never("no-queue-enable", "A ring that does not exist is not enabled.", F.SET_VRING_ENABLE, VringState(NOWHERE, 1))
_never("no-queue-kick", "A ring that does not exist has no kick.", F.SET_VRING_KICK, VringFd(NOWHERE, has_fd=False))
_never("no-queue-call", "A ring that does not exist has no call.", F.SET_VRING_CALL, VringFd(NOWHERE, has_fd=False))
_never("no-queue-err", "A ring that does not exist has no err.", F.SET_VRING_ERR, VringFd(NOWHERE, has_fd=False))
_never(
    "no-queue-addr", "A ring that does not exist has no addresses.", F.SET_VRING_ADDR,
    VringAddress(NOWHERE, 0, 0, 0, 0, 0),
)  # fmt: skip
_never(
    "no-queue-wide", "An index beyond all queues is not cut down to one that exists.", F.SET_VRING_NUM,
    VringState(1 << 16, 64),
)  # fmt: skip
_never("size-0", "A ring of no entries is refused.", F.SET_VRING_NUM, VringState(0, 0))
_never("size-3", "A split ring whose size is not a power of two is refused.", F.SET_VRING_NUM, VringState(0, 3))
_never("size-64k", "A ring of more than 32768 entries is refused.", F.SET_VRING_NUM, VringState(0, 65536))
_never("size-4g", "The size of a ring is a 32-bit number, not its lower half.", F.SET_VRING_NUM, VringState(0, 0x10040))
_never("enable-2", "A ring is enabled by 1, disabled by 0.", F.SET_VRING_ENABLE, VringState(0, 2), binding=False)


@CASES.must("no-queue-get-base", "A ring that does not exist has no base: no process dies of the question.")
async def _(peer: Peer) -> None:
    await peer.negotiate()
    await peer.react(F.GET_VRING_BASE, VringState(NOWHERE))
    await peer.serves_another()


@CASES.should(
    "reserved-index-bits", "Bits 9 and up of a ring's index in SET_VRING_CALL are not taken for a ring.",
    ACK, Need.NO_RING_255,
)  # fmt: skip
async def _(peer: Peer) -> None:
    await peer.negotiate()
    reaction = await peer.react(F.SET_VRING_CALL, U64(1 << 40 | 0x100 | NOWHERE))
    check(reaction.kind in (Kind.REFUSED, Kind.CLOSED), "a refusal, or the connection closed", str(reaction))
