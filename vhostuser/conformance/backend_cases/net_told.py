"""What a network device is told and says beside its rings: configuration space, MTU, announcements, feature bits."""

from __future__ import annotations

import struct

from vhostuser.conformance.bench import Need
from vhostuser.conformance.frames import NetFeature, announcement, frame, is_announcement, same
from vhostuser.conformance.nic import USUAL, Nic, plug
from vhostuser.conformance.peer import Kind, Peer
from vhostuser.conformance.suite import Theme, check, equal
from vhostuser.protocol import U64, Config, FrontendRequest, ProtocolFeature

F, N, P = FrontendRequest, NetFeature, ProtocolFeature
CASES: Theme[Peer] = Theme("net", "Network Device: Device configuration layout")
LOOP, CONFIG, ACK = Need.LOOP, P.CONFIG, P.REPLY_ACK
SET_MTU, RARP = F.NET_SET_MTU.clause, F.SEND_RARP.clause
MTU = (P.MTU, N.MTU, ACK)
GUEST = bytes.fromhex("5254deadbeef")
_SPACE = struct.Struct("<6sHHHIB")

# ---- configuration space


async def _space(peer: Peer) -> tuple[bytes, int, int, int, int, int]:
    """mac, status, max_virtqueue_pairs, mtu, speed, duplex."""
    await peer.negotiate()
    mac, *numbers = _SPACE.unpack(await peer.frontend.get_config(0, _SPACE.size))
    return (mac, *numbers)


@CASES.must("config.mac", "The address is that of one station.", CONFIG, N.MAC)
async def _(peer: Peer) -> None:
    mac, *_ = await _space(peer)
    check(any(mac) and not mac[0] & 1, "an address of one station", mac.hex(":"))


@CASES.must("config.status", "Of the status only LINK_UP and ANNOUNCE are defined.", CONFIG, N.STATUS)
async def _(peer: Peer) -> None:
    status = (await _space(peer))[1]
    check(not status & ~3, "no bits but 0 and 1", f"{status:#x}")


@CASES.must("config.pairs", "The space says 1 to 0x8000 pairs, as many as GET_QUEUE_NUM.", CONFIG, N.MQ, P.MQ)
async def _(peer: Peer) -> None:
    pairs = (await _space(peer))[2]
    equal("max_virtqueue_pairs", pairs, await peer.frontend.get_queue_num())
    check(1 <= pairs <= 0x8000, "1 to 0x8000 pairs", str(pairs))


@CASES.must("config.mtu", "The MTU is 68 to 65535.", CONFIG, N.MTU)
async def _(peer: Peer) -> None:
    mtu = (await _space(peer))[3]
    check(68 <= mtu <= 65535, "68 to 65535", str(mtu))


@CASES.must("config.speed", "Speed and duplex have values that are defined.", CONFIG, N.SPEED_DUPLEX)
async def _(peer: Peer) -> None:
    *_, speed, duplex = await _space(peer)
    check(speed <= 0x7FFFFFFF or speed == 0xFFFFFFFF, "a speed, or 0xffffffff", f"{speed:#x}")
    check(duplex in (0, 1, 0xFF), "duplex 0, 1 or 255", str(duplex))


@CASES.should("config.read-only", "A driver cannot write to the space.", CONFIG, Need.NET)
async def _(peer: Peer) -> None:
    before = await _space(peer)
    reaction = await peer.react(F.SET_CONFIG, Config(0, 6, 0, b"\x02\x03\x04\x05\x06\x07"))
    check(reaction.kind is not Kind.SILENT, "an answer, or the connection closed", str(reaction))
    await peer.again()
    equal("the space", await _space(peer), before)


# ---- MTU


def _mtu(name: str, rule: str, mtu: int, *, good: bool) -> None:
    @CASES.must(f"mtu.{name}", rule, *MTU, section=SET_MTU)
    async def _(peer: Peer) -> None:
        await peer.negotiate(N.MTU)
        await (peer.accepts if good else peer.refuses)(F.NET_SET_MTU, U64(mtu))
        await peer.answers() if good else None


_mtu("usual", "An MTU of 1500 is valid.", 1500, good=True)
_mtu("least", "An MTU of 68 is valid.", 68, good=True)
_mtu("most", "An MTU of 65535 is valid.", 65535, good=True)
_mtu("zero", "An MTU of 0 is not valid.", 0, good=False)
_mtu("below", "An MTU of 67 is not valid.", 67, good=False)
_mtu("above", "An MTU of 65536 is not valid.", 65536, good=False)
_mtu("64-bits", "An MTU of 2^32 + 1500 is not valid.", 2**32 + 1500, good=False)


@CASES.must("mtu.early", "The MTU may be told before SET_FEATURES, as QEMU does.", *MTU, section=SET_MTU)
async def _(peer: Peer) -> None:
    frontend = peer.frontend
    await frontend.get_features()
    await frontend.set_protocol_features(await frontend.get_protocol_features() & (P.MTU.mask | ACK.mask))
    await peer.accepts(F.NET_SET_MTU, U64(1500))


@CASES.must("mtu.told", "The guest is told the MTU that was set.", *MTU, CONFIG, section=SET_MTU)
async def _(peer: Peer) -> None:
    await peer.negotiate(N.MTU)
    for mtu in (1400, 1500):
        await peer.accepts(F.NET_SET_MTU, U64(mtu))
        (told,) = struct.unpack("<H", await peer.frontend.get_config(10, 2))
        equal("the MTU in the space", told, mtu)


@CASES.must(
    "mtu.refusal-changes-nothing", "An MTU that is refused is not told the guest.", *MTU, CONFIG, section=SET_MTU
)
async def _(peer: Peer) -> None:
    await peer.negotiate(N.MTU)
    await peer.accepts(F.NET_SET_MTU, U64(1500))
    await peer.react(F.NET_SET_MTU, U64(7))
    await peer.again()
    check((await _space(peer))[3] != 7, "an MTU that is valid", "7")


async def _told(peer: Peer, mtu: int) -> Nic:
    """Before rings start, as QEMU tells it; with buffers posted."""
    await peer.negotiate(N.MTU)
    await peer.accepts(F.NET_SET_MTU, U64(mtu))
    await peer.share()
    nic = Nic(peer)
    await nic.start()
    nic.post(count=2)
    return nic


@CASES.must("mtu.carried", "Frames of as much as the MTU pass, in one piece.", LOOP, *MTU)
async def _(peer: Peer) -> None:
    nic = await _told(peer, 1500)
    await nic.echo(frame(1500 + 14))


@CASES.must("mtu.exceeded", "A driver that negotiated the MTU receives no packet that is longer.", LOOP, *MTU)
async def _(peer: Peer) -> None:
    nic = await _told(peer, 1400)
    nic.transmit(frame(1400 + 100))
    await nic.sent()
    await nic.silence()
    await nic.echo(frame(1400 + 14))


# ---- announcements


@CASES.must("rarp.early", "SEND_RARP is answered before there are rings.", P.RARP, ACK, section=RARP)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    await peer.accepts(F.SEND_RARP, U64(int.from_bytes(GUEST + bytes(2), "little")))
    await peer.answers()


@CASES.must(
    "rarp.sent", "SEND_RARP has a reverse ARP request broadcast from the address in its first 6 bytes.", LOOP, P.RARP,
    section=RARP,
)  # fmt: skip
async def _(peer: Peer) -> None:
    nic = await plug(peer)
    nic.post(*(USUAL,) * 8)
    await nic.echo(frame())
    await peer.react(F.SEND_RARP, U64(int.from_bytes(GUEST + b"\xff\xff", "little")))
    nic.transmit(frame())  # a back-end may look only when something is sent
    came = [arrival.frame for arrival in await nic.received()]
    while not any(map(is_announcement, came)):
        came += [arrival.frame for arrival in await nic.received()]
    (found,) = filter(is_announcement, came)
    wanted = announcement(GUEST)
    # RFC 903 says of the senders' protocol addresses that they are undefined.
    same(found[:28], wanted[:28])
    equal("the address that is asked for", found[32:38].hex(":"), GUEST.hex(":"))


# ---- feature bits

REQUIRES = (
    ((N.GUEST_TSO4, N.GUEST_TSO6, N.GUEST_UFO), (N.GUEST_CSUM,)),
    ((N.GUEST_ECN,), (N.GUEST_TSO4, N.GUEST_TSO6)),
    ((N.HOST_TSO4, N.HOST_TSO6, N.HOST_UFO), (N.CSUM,)),
    ((N.HOST_ECN,), (N.HOST_TSO4, N.HOST_TSO6)),
)
"""Features, and those of which each requires one (5.1.3.1)."""


@CASES.must(
    "features.dependencies", "No offload is offered without the one that it requires.", Need.NET,
    section="Network Device: Feature bit requirements",
)  # fmt: skip
async def _(peer: Peer) -> None:
    offered = await peer.frontend.get_features()
    for features, required in REQUIRES:
        for feature in features:
            missing = offered & feature.mask and not any(offered & other.mask for other in required)
            names = " or ".join(other.name for other in required)
            check(not missing, f"{feature.name} with {names}", f"without, in {offered:#x}")
