"""Features of both kinds, owner, queue and slot numbers. Sections "Communication", "Protocol features"."""

from __future__ import annotations

from vhostuser.conformance.bench import Need
from vhostuser.conformance.peer import PLAIN, Peer
from vhostuser.conformance.suite import Theme, check, equal
from vhostuser.protocol import (
    NEED_REPLY,
    U64,
    VERSION,
    FrontendRequest,
    ProtocolFeature,
    VirtioFeature,
    VringState,
)

F, P, V = FrontendRequest, ProtocolFeature, VirtioFeature
CASES: Theme[Peer] = Theme("features", "Communication")

ACK, BIT_30 = P.REPLY_ACK, V.PROTOCOL_FEATURES
SPECIFIED = (1 << 23) - 1
"""Protocol features that have a meaning."""
RESET, MQ, STATES = "VHOST_USER_RESET_OWNER", "Multiple queue support", "Ring states"


@CASES.should("bit-30", "There are protocol features: bit 30 is offered.")
async def _(peer: Peer) -> None:
    check(bool(await peer.frontend.get_features() & BIT_30.mask), "bit 30 offered", "it is not")


@CASES.should("version-1", "The device is not a legacy one: VERSION_1 is offered.")
async def _(peer: Peer) -> None:
    check(bool(await peer.frontend.get_features() & V.VERSION_1.mask), "VERSION_1 offered", "it is not")


@CASES.must("stable", "What is offered does not change while the connection lasts.")
async def _(peer: Peer) -> None:
    before = await peer.frontend.get_features()
    await peer.negotiate()
    equal("GET_FEATURES after SET_FEATURES", await peer.frontend.get_features(), before)


@CASES.must("protocol-stable", "Protocol features that are offered do not change while the connection lasts.", BIT_30)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    before = peer.frontend.session.protocol_features_offered
    equal("GET_PROTOCOL_FEATURES", await peer.frontend.get_protocol_features(), before)


@CASES.must("protocol-set-first", "SET_PROTOCOL_FEATURES works before SET_FEATURES, and holds at once.", ACK)
async def _(peer: Peer) -> None:
    await peer.send(F.SET_PROTOCOL_FEATURES, U64(ACK.mask))
    await peer.accepts(F.SET_OWNER)


@CASES.must("protocol-set-alone", "SET_PROTOCOL_FEATURES works without GET_PROTOCOL_FEATURES before it.", ACK)
async def _(peer: Peer) -> None:
    await peer.frontend.get_features()
    await peer.send(F.SET_PROTOCOL_FEATURES, U64(ACK.mask))
    await peer.send(F.SET_FEATURES, U64(PLAIN))
    await peer.accepts(F.SET_OWNER)


@CASES.must("owner-first", "SET_OWNER may be the first message, or come after the features.", ACK)
async def _(peer: Peer) -> None:
    await peer.send(F.SET_OWNER)
    await peer.frontend.get_features()
    await peer.frontend.set_features(PLAIN)
    await peer.answers()


@CASES.must("no-owner", "A front-end that never sends SET_OWNER is answered.")
async def _(peer: Peer) -> None:
    await peer.answers()
    await peer.answers()


@CASES.must("repeated", "The same features may be set again, as with several queue pairs.", ACK)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    for _ in range(2):
        await peer.accepts(F.SET_FEATURES, U64(PLAIN))
        await peer.accepts(F.SET_PROTOCOL_FEATURES, U64(peer.frontend.session.protocol_features))


@CASES.should("unoffered", "A virtio feature that was not offered is refused.", ACK)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    unoffered = next(1 << bit for bit in range(63, 0, -1) if not peer.frontend.session.features_offered >> bit & 1)
    await peer.refuses(F.SET_FEATURES, U64(PLAIN | unoffered))


@CASES.should("protocol-unoffered", "A protocol feature that was not offered is refused.", ACK)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    session = peer.frontend.session
    unoffered = next(1 << bit for bit in range(63) if not session.protocol_features_offered >> bit & 1)
    await peer.refuses(F.SET_PROTOCOL_FEATURES, U64(session.protocol_features | unoffered))


@CASES.must("subset", "A front-end that wants no protocol feature but REPLY_ACK is served.", ACK)
async def _(peer: Peer) -> None:
    await peer.frontend.negotiate(PLAIN, ACK.mask)
    await peer.accepts(F.SET_VRING_NUM, VringState(0, 64))


@CASES.must("none", "A front-end that wants no protocol feature is served.", BIT_30)
async def _(peer: Peer) -> None:
    await peer.frontend.negotiate(PLAIN, 0)
    await peer.answers()


@CASES.must("without-bit-30", "A front-end that knows nothing of protocol features is served.")
async def _(peer: Peer) -> None:
    await peer.frontend.negotiate(V.VERSION_1.mask, 0)
    await peer.answers()


@CASES.should("protocol-known", "Protocol features that have no meaning in the specification are not offered.", BIT_30)
async def _(peer: Peer) -> None:
    await peer.frontend.get_features()
    strange = await peer.frontend.get_protocol_features() & ~SPECIFIED
    check(not strange, "bits 0 to 22 alone", f"{strange:#x} too")


@CASES.must(
    "inband-incomplete",
    "INBAND_NOTIFICATIONS without BACKEND_REQ and REPLY_ACK closes the connection.",
    P.INBAND_NOTIFICATIONS,
    section="In-band notifications",
)
async def _(peer: Peer) -> None:
    await peer.frontend.get_features()
    await peer.send(F.SET_PROTOCOL_FEATURES, U64(P.INBAND_NOTIFICATIONS.mask))
    await peer.refuses(F.GET_FEATURES, flags=VERSION)


@CASES.must("reset-owner", "RESET_OWNER keeps the connection and what was negotiated.", ACK, section=RESET)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    await peer.send(F.RESET_OWNER)
    await peer.accepts(F.SET_OWNER)


@CASES.must(
    "reset-owner-memory",
    "RESET_OWNER at most disables rings: with the memory as it was, one set up anew works.",
    BIT_30,
    Need.RINGS,
    section=RESET,
)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    await peer.share()
    await peer.send(F.RESET_OWNER)
    lane = peer.make_lane()
    await lane.start()
    await lane.works()


@CASES.must(
    "reset-device",
    "RESET_DEVICE keeps the connection, and the device can be set up again.",
    P.RESET_DEVICE,
    Need.RINGS,
    section="VHOST_USER_RESET_DEVICE",
)
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    await lane.works()
    await lane.stop()
    await peer.frontend.reset_device()
    await lane.start()
    await lane.works()


# ---- several queues and slots


@CASES.should("mq", "MQ is offered, also by devices with a fixed number of queues.", BIT_30, section=MQ)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    check(peer.frontend.session.has(P.MQ), "MQ offered", "it is not")


@CASES.must("queue-num", "GET_QUEUE_NUM says 1 to 256.", P.MQ, section=F.GET_QUEUE_NUM.clause)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    queues = await peer.frontend.get_queue_num()
    check(1 <= queues <= 256, "1 to 256", str(queues))


@CASES.must(
    "queue-num-unnegotiated", "GET_QUEUE_NUM works where MQ is merely offered.", P.MQ, section=F.GET_QUEUE_NUM.clause
)
async def _(peer: Peer) -> None:
    await peer.negotiate(without={P.MQ})
    await peer.accepts(F.GET_QUEUE_NUM, flags=VERSION)


@CASES.must(
    "second-ring-without-mq",
    "The second ring of a device that has one can be set up without MQ.",
    ACK,
    Need.TWO_RINGS,
    section=MQ,
)
async def _(peer: Peer) -> None:
    await peer.negotiate(without={P.MQ})
    await peer.frontend.set_vring_num(1, 64)
    await peer.frontend.set_vring_enable(1, True)


@CASES.must(
    "mem-slots", "GET_MAX_MEM_SLOTS says at least 1.", P.CONFIGURE_MEM_SLOTS, section="VHOST_USER_GET_MAX_MEM_SLOTS"
)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    check(await peer.frontend.get_max_mem_slots() >= 1, "1 or more", "0")


@CASES.should(
    "mem-slots-eight", "There are as many slots as a table has regions, eight.", P.CONFIGURE_MEM_SLOTS,
    section="VHOST_USER_GET_MAX_MEM_SLOTS",
)  # fmt: skip
async def _(peer: Peer) -> None:
    await peer.negotiate()
    slots = await peer.frontend.get_max_mem_slots()
    check(slots >= 8, "8 or more", str(slots))


# ---- changes while the device runs


@CASES.must(
    "log-all-while-running", "LOG_ALL may come and go while rings run; they go on.", V.LOG_ALL, P.LOG_SHMFD, Need.RINGS,
    section=STATES,
)  # fmt: skip
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    await lane.works()
    await peer.frontend.start_log(peer.make_log())
    await lane.works()
    await peer.frontend.stop_log()
    await lane.works()


@CASES.must("again-while-running", "The same features set again halt no ring.", ACK, Need.RINGS, section=STATES)
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    await lane.works()
    await peer.frontend.set_features(peer.frontend.session.features)
    await lane.works()


@CASES.must(
    "bit-30-disables-nothing", "SET_FEATURES with bit 30 does not disable a ring that is enabled.", ACK, Need.RINGS,
    section=STATES,
)  # fmt: skip
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    await peer.accepts(F.SET_FEATURES, U64(peer.frontend.session.features), flags=VERSION | NEED_REPLY)
    await lane.works()


@CASES.must(
    "bit-30-enables-nothing", "SET_FEATURES with bit 30 does not enable a ring that is disabled.", Need.RINGS, BIT_30,
    section=STATES,
)  # fmt: skip
async def _(peer: Peer) -> None:
    lane = await peer.lane(enable=False)
    await peer.frontend.set_features(peer.frontend.session.features)
    lane.offer()
    lane.kick()
    await lane.without_effect()
