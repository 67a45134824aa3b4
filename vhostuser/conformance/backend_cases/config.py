"""Configuration space. Sections "VHOST_USER_GET_CONFIG", "VHOST_USER_SET_CONFIG"."""

from __future__ import annotations

import contextlib
import struct

from vhostuser.conformance.bench import Need
from vhostuser.conformance.peer import Kind, Peer
from vhostuser.conformance.suite import Skipped, Theme, check, equal
from vhostuser.protocol import Config, ConfigFlags, FrontendRequest, ProtocolFeature, RequestRefused

F, P = FrontendRequest, ProtocolFeature
CASES: Theme[Peer] = Theme("config", F.GET_CONFIG.clause)
CONFIG, ACK = P.CONFIG, P.REPLY_ACK
SET = F.SET_CONFIG.clause
WRITEBACK, CONFIG_WCE, FLUSH = 32, 11, 9


async def _space(peer: Peer, size: int = 60) -> bytes:
    """So much of its beginning, or a half or a quarter: a graphics device's has fewer bytes than a disk's."""
    await peer.negotiate()
    for shorter in (size, size // 2):
        with contextlib.suppress(RequestRefused):
            return await peer.frontend.get_config(0, shorter)
    return await peer.frontend.get_config(0, size // 4)


@CASES.must("size", "The reply has the size of the request, and says the same offset and size.", CONFIG)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    reaction = await peer.accepts(F.GET_CONFIG, Config(4, 8, 0, bytes(8)))
    equal(
        "bytes, offset and size of the reply",
        (len(reaction.body), *struct.unpack("=II", reaction.body[:8])),
        (20, 4, 8),
    )


@CASES.must("repeated", "The same question has the same answer.", CONFIG)
async def _(peer: Peer) -> None:
    before = await _space(peer)
    equal("the space", await peer.frontend.get_config(0, len(before)), before)


@CASES.must("early", "GET_CONFIG works before SET_FEATURES.", CONFIG)
async def _(peer: Peer) -> None:
    await peer.frontend.get_features()
    await peer.frontend.set_protocol_features(await peer.frontend.get_protocol_features() & (CONFIG.mask | ACK.mask))
    await peer.frontend.get_config(0, 8)


@CASES.must(
    "part",
    "A part of the space is that part: offsets count from its beginning, not from the start of the reply.",
    CONFIG,
)
async def _(peer: Peer) -> None:
    space = await _space(peer, 32)
    for offset, size in ((0, 8), (4, 4), (8, 4), (20, 4), (4, 28)):
        if offset + size > len(space):
            continue
        equal(
            f"{size} bytes from {offset}", await peer.frontend.get_config(offset, size), space[offset : offset + size]
        )


@CASES.must("byte", "Each byte can be read alone.", CONFIG)
async def _(peer: Peer) -> None:
    space = await _space(peer, 24)
    read = b"".join([await peer.frontend.get_config(offset, 1) for offset in range(len(space))])
    equal("the space, byte by byte", read, space)


@CASES.must("request-bytes", "The bytes that a request carries have no meaning.", CONFIG)
async def _(peer: Peer) -> None:
    space = await _space(peer, 16)
    reaction = await peer.accepts(F.GET_CONFIG, Config(0, 16, 0, b"\xa5" * 16))
    equal("the space", reaction.body[12:], space)


@CASES.must("capacity", "A disk says its capacity in the first eight bytes.", CONFIG, Need.BLK)
async def _(peer: Peer) -> None:
    capacity = int.from_bytes(await _space(peer, 8), "little")
    check(0 < capacity < 1 << 55, "a number of sectors", str(capacity))


@CASES.must("whole", "The 60 bytes that QEMU asks a disk for are answered.", CONFIG, Need.BLK)
async def _(peer: Peer) -> None:
    equal("bytes of the space", len(await _space(peer)), 60)


@CASES.must("beyond", "What lies beyond any configuration space is no reason to die.", CONFIG)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    reaction = await peer.react(F.GET_CONFIG, Config(0xFFFFFFF0, 8, 0, bytes(8)))
    check(reaction.kind is not Kind.SILENT, "an error or the end of the connection", str(reaction))
    await peer.serves_another()


@CASES.should("beyond-is-error", "An error is told by a reply without payload.", CONFIG)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    reaction = await peer.react(F.GET_CONFIG, Config(0xFFFFFFF0, 8, 0, bytes(8)))
    check(reaction.kind is not Kind.DONE, "a reply without payload, or the connection closed", str(reaction))


@CASES.should("error-keeps-connection", "After an error the connection goes on.", CONFIG)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    await peer.react(F.GET_CONFIG, Config(0xFFFFFFF0, 8, 0, bytes(8)))
    await peer.answers()


@CASES.must("lying-size", "A size that is not that of the payload is not believed.", CONFIG)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    reaction = await peer.react(F.GET_CONFIG, struct.pack("=III", 0, 4096, 0) + bytes(8))
    fine = reaction.kind in (Kind.REFUSED, Kind.CLOSED) or len(reaction.body) <= 20
    check(fine, "an error, or no more than was sent", f"{len(reaction.body)} bytes")


# ---- writing


@CASES.must("read-only", "A field that is read-only for the driver is not written.", CONFIG, ACK, Need.BLK, section=SET)
async def _(peer: Peer) -> None:
    space = await _space(peer, 8)
    await peer.refuses(F.SET_CONFIG, Config(0, 8, 0, bytes(8)))
    await peer.again()
    equal("the capacity", await _space(peer, 8), space)


@CASES.should("write-beyond", "A write beyond the space is not taken for done.", CONFIG, ACK, section=SET)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    await peer.refuses(F.SET_CONFIG, Config(0xFFFFFFF0, 8, 0, bytes(8)))


@CASES.should(
    "write-lying-size", "A write whose size is not that of its data is not taken for done.", CONFIG, ACK, section=SET
)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    await peer.refuses(F.SET_CONFIG, struct.pack("=III", 0, 256, 1) + bytes(8))


@CASES.should(
    "migration", "After a migration the space may be written as it was read.", CONFIG, ACK, Need.BLK, section=SET
)
async def _(peer: Peer) -> None:
    space = await _space(peer)
    await peer.accepts(F.SET_CONFIG, Config(0, 60, ConfigFlags.LIVE_MIGRATION, space))
    equal("the space", await peer.frontend.get_config(0, 60), space)


@CASES.must(
    "write-cache", "The write cache switch of a disk can be turned, and read back.", CONFIG, ACK, Need.BLK, section=SET
)
async def _(peer: Peer) -> None:
    offered = await peer.frontend.get_features()
    wanted = 1 << CONFIG_WCE | 1 << FLUSH
    if offered & wanted != wanted:
        raise Skipped("the switch is not offered (CONFIG_WCE)")
    await peer.frontend.negotiate(wanted | 1 << 32 | 1 << 30)
    for on in (0, 1, 0):
        await peer.frontend.set_config(WRITEBACK, bytes([on]))
        equal("the switch", (await peer.frontend.get_config(0, WRITEBACK + 1))[WRITEBACK], on)
