"""Kicks, calls and errors as messages. Section "In-band notifications"."""

from __future__ import annotations

import asyncio
import select
import socket

from vhostuser.conformance.bench import Need
from vhostuser.conformance.lane import Lane
from vhostuser.conformance.peer import Peer
from vhostuser.conformance.suite import Theme, check
from vhostuser.frontend import notifying
from vhostuser.protocol import NEED_REPLY, BackendRequest, Header, ProtocolFeature
from vhostuser.protocol.codec import HEADER_SIZE

P = ProtocolFeature
CASES: Theme[Peer] = Theme("inband", "In-band notifications")
NEEDS = (P.INBAND_NOTIFICATIONS, P.BACKEND_REQ, P.REPLY_ACK, Need.RINGS)
KICK, CALL, ERR = "VHOST_USER_SET_VRING_KICK", "VHOST_USER_SET_VRING_CALL", "VHOST_USER_SET_VRING_ERR"


async def _ring(peer: Peer) -> Lane:
    """A ring that was given no descriptors."""
    # Notify pages are told on the same channel.
    await peer.negotiate(also=(P.INBAND_NOTIFICATIONS,), without=(P.HOST_NOTIFIER,))
    await peer.share()
    lane = peer.make_lane()
    await lane.start(in_band=True)
    return lane


async def _heard(peer: Peer) -> Lane:
    """The same; calls and errors that come as messages are taken for those of the ring's eventfds."""
    lane = await _ring(peer)
    await peer.frontend.serve_backend(notifying([lane.ring]))
    return lane


async def _watched(peer: Peer, lane: Lane) -> socket.socket:
    """The channel, which nobody reads, and so nobody answers."""
    ours, theirs = socket.socketpair()
    peer.own(ours.close)
    with theirs:
        await peer.frontend.set_backend_req_fd(theirs.fileno())
    ours.setblocking(False)
    return ours


async def _asked(lane: Lane) -> None:
    """Offers a request, kicks by message and sees it come back."""
    lane.offer()
    await lane.frontend.vring_kick(lane.index)
    await lane.served()


def _first(sock: socket.socket, within: float) -> Header | None:
    """The header of the next message, which is taken; None: none came."""
    if not select.select([sock], [], [], within)[0]:
        return None
    header = Header.unpack(sock.recv(HEADER_SIZE))
    sock.recv(header.size)
    return header


# ---- kicks


@CASES.must("kick", "A ring without a kick descriptor starts with VRING_KICK.", *NEEDS, section=KICK)
async def _(peer: Peer) -> None:
    lane = await _heard(peer)
    lane.offer()
    await lane.idle()
    await peer.frontend.vring_kick(lane.index)
    await lane.served()


@CASES.must("kicks", "Each VRING_KICK is seen.", *NEEDS)
async def _(peer: Peer) -> None:
    lane = await _heard(peer)
    for _ in range(10):
        await _asked(lane)
        await asyncio.sleep(peer.quiet / 10)  # it may be asleep again


@CASES.must("stop-and-kick", "A ring that was stopped starts again with VRING_KICK.", *NEEDS, section="Ring states")
async def _(peer: Peer) -> None:
    lane = await _heard(peer)
    await _asked(lane)
    await lane.stop()
    lane.offer()
    await lane.idle()
    await peer.frontend.vring_kick(lane.index)
    await lane.served()


# ---- calls


@CASES.must("call", "A driver without a call descriptor is called by VRING_CALL.", *NEEDS)
async def _(peer: Peer) -> None:
    lane = await _heard(peer)
    for _ in range(3):
        await lane.calm()
        await _asked(lane)
        check(await lane.called(), "VRING_CALL", "none")


@CASES.should("call-asks", "VRING_CALL asks for an acknowledgement, so that calls do not pile up.", *NEEDS)
async def _(peer: Peer) -> None:
    lane = await _ring(peer)
    ours = await _watched(peer, lane)
    await _asked(lane)
    header = await asyncio.to_thread(_first, ours, peer.patience)
    check(header is not None and header.request == BackendRequest.VRING_CALL, "VRING_CALL", str(header))
    assert header is not None
    check(bool(header.flags & NEED_REPLY), "need_reply set", f"flags {header.flags:#x}")


@CASES.must("call-descriptor", "A call descriptor is used instead of messages.", *NEEDS, section=CALL)
async def _(peer: Peer) -> None:
    lane = await _ring(peer)
    ours = await _watched(peer, lane)
    await peer.frontend.set_vring_call(lane.index, lane.ring.call_fd)
    await _asked(lane)
    check(await lane.called(), "a call by the descriptor", "none")
    check(_first(ours, peer.quiet) is None, "no message", "one came")


@CASES.must("call-polled", "A driver that says it polls is not called by message.", *NEEDS, section=CALL)
async def _(peer: Peer) -> None:
    lane = await _ring(peer)
    ours = await _watched(peer, lane)
    await peer.frontend.set_vring_call(lane.index, None)
    await _asked(lane)
    await peer.frontend.get_features()
    check(_first(ours, peer.quiet) is None, "no message", "one came")


@CASES.must("unread", "A front-end that does not read its channel is served all the same.", *NEEDS)
async def _(peer: Peer) -> None:
    lane = await _ring(peer)
    await _watched(peer, lane)
    for _ in range(10):
        await _asked(lane)
    await lane.stop()


@CASES.must("suspended", "A suspended device sends no calls.", *NEEDS, section="Suspended device state")
async def _(peer: Peer) -> None:
    lane = await _heard(peer)
    await _asked(lane)
    await lane.calm()
    ours = await _watched(peer, lane)
    await lane.stop()
    while _first(ours, 0) is not None:
        pass  # from before
    lane.offer()
    await peer.frontend.get_features()
    check(_first(ours, peer.quiet) is None, "silence", "a message")


# ---- errors


async def _break(lane: Lane) -> None:
    """Makes more available than the ring has."""
    await _asked(lane)
    lane.raw.available_index += 1000
    await lane.frontend.vring_kick(lane.index)


@CASES.should("err", "A broken ring without an err descriptor is told by VRING_ERR.", *NEEDS)
async def _(peer: Peer) -> None:
    lane = await _heard(peer)
    await _break(lane)
    check(await lane.reported(), "VRING_ERR", "none")


@CASES.should("err-descriptor", "An err descriptor is preferred to VRING_ERR.", *NEEDS, section=ERR)
async def _(peer: Peer) -> None:
    lane = await _ring(peer)
    await peer.frontend.set_vring_call(lane.index, None)
    await peer.frontend.set_vring_err(lane.index, lane.ring.err_fd)
    ours = await _watched(peer, lane)
    await _break(lane)
    check(await lane.reported(), "the err eventfd signalled", "it is not")
    check(_first(ours, peer.quiet) is None, "no message", "one came")
