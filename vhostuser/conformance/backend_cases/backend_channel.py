"""The back-end's own channel, as far as a back-end that says nothing shows it. Section "Back-end communication"."""

from __future__ import annotations

import asyncio
import os
import select
import socket

from vhostuser.conformance.bench import Need
from vhostuser.conformance.peer import Peer
from vhostuser.conformance.suite import Theme, check
from vhostuser.protocol import FrontendRequest, ProtocolFeature

F, P = FrontendRequest, ProtocolFeature
CASES: Theme[Peer] = Theme("channel", "Back-end communication")
CHANNEL, ACK = P.BACKEND_REQ, P.REPLY_ACK


@CASES.must("accepted", "A channel is taken and acknowledged.", CHANNEL, ACK)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    await peer.frontend.serve_backend()


@CASES.must("works-beside", "A ring works beside the channel.", CHANNEL, Need.RINGS)
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    await peer.frontend.serve_backend()
    await lane.works()


@CASES.must("closed", "A channel whose other end is closed at once does no harm.", CHANNEL)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    channel = await peer.frontend.serve_backend()
    channel.close()
    await asyncio.sleep(peer.quiet)
    await peer.answers()


@CASES.must("replaced", "A new channel takes the place of the old one, which is closed.", CHANNEL)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        await peer.frontend.set_backend_req_fd(theirs.fileno())
        await peer.frontend.serve_backend()
        theirs.close()
        await peer.frontend.get_features()
        ended = bool(select.select([ours], [], [], peer.patience)[0]) and not ours.recv(1)
    check(ended, "the old channel closed", "it is still open in the back-end")


@CASES.must("ends-with-connection", "The channel is closed with the connection.", CHANNEL)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        await peer.frontend.set_backend_req_fd(theirs.fileno())
        theirs.close()
        await peer.frontend.get_features()
        peer.frontend.close()
        ended = bool(select.select([ours], [], [], peer.patience)[0]) and not ours.recv(1)
    check(ended, "the channel closed", "it is still open in the back-end")


@CASES.must("suspended", "A suspended device sends no messages.", CHANNEL, section="Suspended device state")
async def _(peer: Peer) -> None:
    await peer.negotiate()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        await peer.frontend.set_backend_req_fd(theirs.fileno())
        await peer.frontend.get_features()
        spoke = bool(select.select([ours], [], [], peer.quiet)[0])
    check(not spoke, "silence", "a message before any ring was started")


@CASES.should("no-socket", "What is no socket is refused.", CHANNEL, ACK)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    read, _ = peer.pipe()
    await peer.refuses(F.SET_BACKEND_REQ_FD, fds=(read,))


@CASES.must("full", "A channel that nobody reads holds nothing up.", CHANNEL, Need.RINGS)
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setblocking(False)
        try:
            while True:
                theirs.send(bytes(4096))
        except BlockingIOError:
            os.set_blocking(theirs.fileno(), True)
        await peer.frontend.set_backend_req_fd(theirs.fileno())
        await lane.works()
        await lane.stop()
