"""How messages are cut out of the stream: header, flags, pieces, descriptors, ends. Section "Message Specification".

The specification says what a message looks like and not what becomes of one that does not. That a back-end outlives it
and does not take it for done is a MUST here; how it says so is its own affair.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress

from vhostuser.conformance.peer import Kind, Peer, Reaction
from vhostuser.conformance.suite import Theme, check, equal
from vhostuser.protocol import NEED_REPLY, REPLY, U64, VERSION, FrontendRequest, Header, ProtocolFeature, VringState

F = FrontendRequest
CASES: Theme[Peer] = Theme("framing", "Message Specification")

ACK = ProtocolFeature.REPLY_ACK
UNKNOWN = 250
NUMBERS = {F.GET_QUEUE_NUM: ProtocolFeature.MQ, F.GET_MAX_MEM_SLOTS: ProtocolFeature.CONFIGURE_MEM_SLOTS}
QUESTION = Header(F.GET_FEATURES, VERSION, 0).pack()


# ---- flags


@CASES.must("reply-flags", "A reply carries version 1 and the reply flag, and no other bit.")
async def _(peer: Peer) -> None:
    for code, reaction in await _answers(peer):
        equal(f"the flags of the reply to {code.name}", reaction.flags, VERSION | REPLY)


@CASES.must("reply-size", "The reply to a question for a number is a u64 and has no descriptors.")
async def _(peer: Peer) -> None:
    for code, reaction in await _answers(peer):
        equal(f"bytes and descriptors of the reply to {code.name}", (len(reaction.body), reaction.fds), (8, 0))


async def _answers(peer: Peer) -> list[tuple[FrontendRequest, Reaction]]:
    """To every question for a number that this back-end knows."""
    await peer.negotiate()
    has = peer.frontend.session.has
    asked = [F.GET_FEATURES, *[code for code, feature in NUMBERS.items() if has(feature)]]
    return [(code, await peer.react(code, flags=VERSION)) for code in asked]


@CASES.should("version-0", "A request of version 0 is not taken for one of version 1.")
async def _(peer: Peer) -> None:
    reaction = await peer.react(F.GET_FEATURES, flags=0)
    check(reaction.kind is not Kind.DONE, "no answer, or the connection closed", str(reaction))


@CASES.should("version-2", "A request of version 2 is not taken for one of version 1.")
async def _(peer: Peer) -> None:
    reaction = await peer.react(F.GET_FEATURES, flags=2)
    check(reaction.kind is not Kind.DONE, "no answer, or the connection closed", str(reaction))


@CASES.should("reply-flag-on-request", "What has the reply flag is no request and is not answered.")
async def _(peer: Peer) -> None:
    reaction = await peer.react(F.GET_FEATURES, flags=VERSION | REPLY)
    check(reaction.kind is not Kind.DONE, "no answer, or the connection closed", str(reaction))


@CASES.should("reserved-flags", "Reserved flags in a request do not show up in its reply.")
async def _(peer: Peer) -> None:
    reaction = await peer.react(F.GET_FEATURES, flags=VERSION | 0x10)
    fine = reaction.kind in (Kind.CLOSED, Kind.REFUSED) or reaction.flags == VERSION | REPLY
    check(fine, "a reply with flags 0x5, or the connection closed", f"{reaction} with flags {reaction.flags:#x}")


# ---- requests that do not exist


@CASES.must("unknown", "A request that does not exist and asks for an answer is not acknowledged.", ACK)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    await peer.refuses(UNKNOWN)


@CASES.must("unknown-with-payload", "The payload of an unknown request is not read as the next message.", ACK)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    await peer.refuses(UNKNOWN, QUESTION * 2)
    with suppress(ConnectionError):
        await peer.send(F.GET_QUEUE_NUM)
        reaction = await peer.reaction(F.GET_QUEUE_NUM)
        check(reaction.kind in (Kind.DONE, Kind.CLOSED), "the next request answered, or no more", str(reaction))


@CASES.must("id-0", "Request 0 does not exist: it does not end the process, nor is it acknowledged.", ACK)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    await peer.refuses(0)
    await peer.serves_another()


@CASES.should("descriptor-of-unknown", "A descriptor that comes with an unknown request is closed.")
async def _(peer: Peer) -> None:
    await peer.negotiate()
    read, write = peer.pipe()
    await peer.react(UNKNOWN, fds=(write,))
    check(await peer.let_go(read, write), "the descriptor closed", "it is still open in the back-end")


# ---- pieces


@CASES.must("byte-by-byte", "A message may come in any number of pieces.", ACK)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    message = Header(F.SET_VRING_NUM, VERSION | NEED_REPLY, 8).pack() + VringState(peer.index, 64).pack()
    await _in_pieces(peer, [message[n : n + 1] for n in range(len(message))])
    equal("the answer", (await peer.reaction(F.SET_VRING_NUM)).body, U64(0).pack())


@CASES.must("payload-apart", "The payload may come after the header, in a piece of its own.", ACK)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    header = Header(F.SET_VRING_NUM, VERSION | NEED_REPLY, 8).pack()
    await _in_pieces(peer, [header, VringState(peer.index, 64).pack()])
    equal("the answer", (await peer.reaction(F.SET_VRING_NUM)).body, U64(0).pack())


async def _in_pieces(peer: Peer, pieces: Sequence[bytes]) -> None:
    for piece in pieces:
        await peer.frontend.send_raw(piece)
        await asyncio.sleep(0.002)  # or the kernel would join them


@CASES.must("glued", "Requests that come in one piece are answered one by one, in their order.", ACK)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    number = Header(F.SET_VRING_NUM, VERSION | NEED_REPLY, 8).pack() + VringState(peer.index, 64).pack()
    await peer.frontend.send_raw(QUESTION + number + QUESTION + number)
    for code in (F.GET_FEATURES, F.SET_VRING_NUM, F.GET_FEATURES, F.SET_VRING_NUM):
        equal(f"the answer to {code.name}", (await peer.reaction(code)).kind, Kind.DONE)


@CASES.must("pipelined", "Many requests may wait for their answers at once; none is lost or answered out of turn.")
async def _(peer: Peer) -> None:
    await peer.frontend.send_raw(QUESTION * 100)
    for _ in range(100):
        equal("the answer", (await peer.reaction(F.GET_FEATURES)).kind, Kind.DONE)


@CASES.must("glued-descriptors", "Descriptors belong to the message with whose first byte they come.", ACK)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    await peer.frontend.send_raw(QUESTION * 3)
    await peer.send(F.SET_VRING_CALL, U64(peer.index), (peer.eventfd(),), flags=VERSION | NEED_REPLY)
    for code in (*[F.GET_FEATURES] * 3, F.SET_VRING_CALL):
        equal(f"the answer to {code.name}", (await peer.reaction(code)).kind, Kind.DONE)


# ---- ends


@CASES.must("end-in-header", "A connection that ends within a header does no harm: the next front-end is served.")
async def _(peer: Peer) -> None:
    await peer.frontend.send_raw(QUESTION[:5])
    await peer.serves_another()


@CASES.must("end-in-payload", "A connection that ends within a payload does no harm: the next front-end is served.")
async def _(peer: Peer) -> None:
    await peer.negotiate()
    await peer.frontend.send_raw(Header(F.SET_MEM_TABLE, VERSION, 40).pack() + bytes(8))
    await peer.serves_another()


@CASES.must("end-unread", "A front-end that leaves without reading its answers does no harm: the next one is served.")
async def _(peer: Peer) -> None:
    await peer.frontend.send_raw(QUESTION * 1000)  # more answers than a socket holds
    await peer.serves_another()


@CASES.must("end-at-once", "A front-end that leaves before it says anything does no harm: the next one is served.")
async def _(peer: Peer) -> None:
    for _ in range(5):
        await peer.serves_another()


# ---- sizes and descriptors beyond all bounds


@CASES.must("size-huge", "A message that announces 4 GiB of payload is not waited for with that much memory.")
async def _(peer: Peer) -> None:
    await peer.negotiate()
    with suppress(ConnectionError):
        await peer.frontend.send_raw(Header(F.SET_MEM_TABLE, VERSION | NEED_REPLY, 0xFFFFFFFF).pack() + bytes(4096))
    await peer.serves_another()


@CASES.must("size-over", "A payload that no message can have is not taken for done.", ACK)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    await peer.refuses(F.SET_OWNER, bytes(16384))


@CASES.should("descriptors-many", "More descriptors than any message has are closed.")
async def _(peer: Peer) -> None:
    await peer.negotiate()
    read, write = peer.pipe()
    await peer.react(F.SET_VRING_CALL, U64(peer.index), (peer.eventfd(), *[write] * 16))
    check(await peer.let_go(read, write), "the descriptors closed", "one is still open in the back-end")


@CASES.should("descriptors-253", "As many descriptors as the kernel passes do no harm: the next front-end is served.")
async def _(peer: Peer) -> None:
    await peer.negotiate()
    read, write = peer.pipe()
    await peer.react(F.GET_FEATURES, fds=[write] * 253)
    check(await peer.let_go(read, write), "the descriptors closed", "one is still open in the back-end")
    await peer.serves_another()


@CASES.should("descriptors-late", "Descriptors that come with a payload are closed, with the connection at the latest.")
async def _(peer: Peer) -> None:
    await peer.negotiate()
    read, write = peer.pipe()
    with suppress(ConnectionError):
        await peer.frontend.send_raw(Header(F.SET_VRING_NUM, VERSION, 8).pack())
        await peer.frontend.send_raw(VringState(peer.index, 64).pack(), (write,))
    await peer.again()
    check(await peer.let_go(read, write), "the descriptor closed", "it is still open in the back-end")


@CASES.must("no-leak", "Connections leave no descriptor behind in the back-end.")
async def _(peer: Peer) -> None:
    await peer.negotiate()
    await peer.share()
    before = await _settled(peer)
    for _ in range(20):
        await peer.again()
        await peer.negotiate()
        await peer.share()
    check(await _settled(peer) <= before, f"{before} descriptors", f"{peer.open_fds()} after 20 connections")


async def _settled(peer: Peer) -> int:
    await peer.frontend.get_features()
    return peer.open_fds()
