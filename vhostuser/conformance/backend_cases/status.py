"""The device status and resets. Sections SET_STATUS, GET_STATUS and RESET_DEVICE; virtio 1.3, sections 2.1 and 2.4."""

from __future__ import annotations

import asyncio

from vhostuser.conformance.bench import Need
from vhostuser.conformance.lane import Lane
from vhostuser.conformance.peer import Kind, Peer
from vhostuser.conformance.suite import Skipped, Theme, check, equal
from vhostuser.protocol import U64, BackendRequest, DeviceStatus, FrontendRequest, ProtocolFeature, VirtioFeature

F, P, S = FrontendRequest, ProtocolFeature, DeviceStatus
CASES: Theme[Peer] = Theme("status", "VHOST_USER_SET_STATUS")
RESET: Theme[Peer] = Theme("reset", "VHOST_USER_RESET_DEVICE")
RINGS, STATUS, ACK = Need.RINGS, P.STATUS, P.REPLY_ACK
BIT_30 = VirtioFeature.PROTOCOL_FEATURES
FIELD, INITIALISATION, DEVICE_RESET = "Device Status Field", "Device Initialization", "Device Reset"
AGREED = S.ACKNOWLEDGE | S.DRIVER | S.FEATURES_OK
READY = AGREED | S.DRIVER_OK


async def _lane(peer: Peer, status: DeviceStatus = READY) -> Lane:
    """The usual opening, with a status."""
    await peer.negotiate(also=(STATUS,))
    await peer.share()
    lane = peer.make_lane()
    await lane.start()
    await peer.frontend.set_status(status)
    return lane


async def _again(peer: Peer, lane: Lane) -> None:
    """Sees a request come back that is offered after everything about the ring was said anew."""
    lane.base = lane.raw.used_index
    await lane.start()
    await lane.works()


# ---- the register


@CASES.must("initial", "The status is 0 at first.", STATUS, section="VHOST_USER_GET_STATUS")
async def _(peer: Peer) -> None:
    await peer.negotiate(also=(STATUS,))
    equal("the status", await peer.frontend.get_status(), 0)


@CASES.must("read-back", "GET_STATUS tells what SET_STATUS has said.", STATUS, section="VHOST_USER_GET_STATUS")
async def _(peer: Peer) -> None:
    await peer.negotiate(also=(STATUS,))
    for status in (S.ACKNOWLEDGE, S.ACKNOWLEDGE | S.DRIVER, AGREED):
        await peer.frontend.set_status(status)
        equal("the status", await peer.frontend.get_status(), int(status))


@CASES.must("read-back-0", "A status of 0 is read back too, after the driver's reset.", STATUS, section=DEVICE_RESET)
async def _(peer: Peer) -> None:
    await peer.negotiate(also=(STATUS,))
    await peer.frontend.set_status(AGREED)
    await peer.frontend.set_status(0)
    equal("the status", await peer.frontend.get_status(), 0)


@CASES.must("of-one-connection", "The next front-end finds a status of 0.", STATUS, section=FIELD)
async def _(peer: Peer) -> None:
    await peer.negotiate(also=(STATUS,))
    await peer.frontend.set_status(AGREED)
    await peer.again()
    await peer.negotiate(also=(STATUS,))
    equal("the status", await peer.frontend.get_status(), 0)


@CASES.must(
    "features-refused", "FEATURES_OK does not stay if features were refused.", STATUS, ACK, section=INITIALISATION
)
async def _(peer: Peer) -> None:
    await peer.negotiate(also=(STATUS,))
    unknown = ~peer.frontend.session.features_offered & (1 << 60)
    if not unknown:
        raise Skipped("the back-end offers feature 60")
    reaction = await peer.react(F.SET_FEATURES, U64(peer.frontend.session.features | unknown))
    if reaction.kind is Kind.CLOSED:
        return  # which says it as well
    check(reaction.kind is Kind.REFUSED, "a refusal, or the connection closed", str(reaction))
    await peer.frontend.set_status(AGREED)
    check(not await peer.frontend.get_status() & S.FEATURES_OK, "FEATURES_OK gone", "it stays")


# ---- rings


@CASES.must("before-driver-ok", "Nothing is consumed before DRIVER_OK.", STATUS, RINGS, section=FIELD)
async def _(peer: Peer) -> None:
    lane = await _lane(peer, AGREED)
    lane.offer()
    lane.kick()
    await lane.idle()


@CASES.must("driver-ok", "What was kicked before DRIVER_OK is served from then on.", STATUS, RINGS, section=FIELD)
async def _(peer: Peer) -> None:
    lane = await _lane(peer, AGREED)
    lane.offer()
    lane.kick()
    await peer.frontend.get_features()
    await peer.frontend.set_status(READY)
    await lane.served()


@CASES.must("served", "A ring works under a status.", STATUS, RINGS)
async def _(peer: Peer) -> None:
    lane = await _lane(peer)
    for _ in range(3):
        await lane.works()


@CASES.should("reset", "After a status of 0 nothing more is consumed.", STATUS, RINGS, section=DEVICE_RESET)
async def _(peer: Peer) -> None:
    lane = await _lane(peer)
    await lane.works()
    await peer.frontend.set_status(0)
    lane.offer()
    lane.kick()
    await lane.idle()


@CASES.must("reset-and-again", "After a status of 0 it can be set up anew.", STATUS, RINGS, section=DEVICE_RESET)
async def _(peer: Peer) -> None:
    lane = await _lane(peer)
    await lane.works()
    await lane.stop()
    await peer.frontend.set_status(0)
    await peer.frontend.set_status(AGREED)
    await peer.frontend.set_status(READY)
    await _again(peer, lane)


# ---- a device that cannot go on


async def _break(lane: Lane) -> None:
    """Makes more available than the ring has."""
    await lane.works()
    lane.raw.available_index += 1000
    lane.kick()
    await lane.reported()


@CASES.should("needs-reset", "A device whose ring is broken has NEEDS_RESET set.", STATUS, RINGS, section=FIELD)
async def _(peer: Peer) -> None:
    await _break(await _lane(peer))
    check(bool(await peer.frontend.get_status() & S.NEEDS_RESET), "NEEDS_RESET", "it is not set")


async def _needs_reset(peer: Peer, lane: Lane) -> None:
    """The same. Raises Skipped for a device that asks for no reset then."""
    await _break(lane)
    if not await peer.frontend.get_status() & S.NEEDS_RESET:
        raise Skipped("a broken ring does not make the device ask for a reset")


@CASES.must("needs-reset-kept", "A driver cannot take NEEDS_RESET away but by a reset.", STATUS, RINGS, section=FIELD)
async def _(peer: Peer) -> None:
    await _needs_reset(peer, await _lane(peer))
    await peer.frontend.set_status(READY)
    check(bool(await peer.frontend.get_status() & S.NEEDS_RESET), "NEEDS_RESET", "it is gone")
    await peer.frontend.set_status(0)
    equal("the status", await peer.frontend.get_status(), 0)


@CASES.must(
    "needs-reset-announced", "With NEEDS_RESET a change of the configuration is announced.",
    STATUS, RINGS, P.CONFIG, P.BACKEND_REQ, section=FIELD,
)  # fmt: skip
async def _(peer: Peer) -> None:
    lane = await _lane(peer)
    channel = await peer.frontend.serve_backend()
    await _needs_reset(peer, lane)
    event = await asyncio.wait_for(channel.next(), peer.patience)
    check(event.code is BackendRequest.CONFIG_CHANGE_MSG, "CONFIG_CHANGE_MSG", event.code.name)


# ---- RESET_DEVICE


@RESET.must("stops", "RESET_DEVICE leaves no ring running.", P.RESET_DEVICE, RINGS)
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    await lane.works()
    await peer.frontend.reset_device()
    lane.offer()
    lane.kick()
    await lane.idle()


@RESET.must("disables", "RESET_DEVICE disables all rings.", P.RESET_DEVICE, RINGS, BIT_30)
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    await lane.works()
    await lane.stop()
    await peer.frontend.reset_device()
    await lane.start(enable=False)
    lane.offer()
    lane.kick()
    await lane.without_effect()


@RESET.must("again", "After RESET_DEVICE the device can be set up anew, memory and owner stay.", P.RESET_DEVICE, RINGS)
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    await lane.works()
    await lane.stop()
    await peer.frontend.reset_device()
    await _again(peer, lane)


@RESET.must("before-anything", "RESET_DEVICE of a device that nobody has used is done.", P.RESET_DEVICE, ACK)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    await peer.frontend.reset_device()
    await peer.answers()


@RESET.must("answers", "After RESET_DEVICE the connection goes on.", P.RESET_DEVICE, RINGS)
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    await lane.works()
    for _ in range(2):
        await peer.frontend.reset_device()
    await peer.answers()


@RESET.must("status", "RESET_DEVICE leaves a status of 0.", P.RESET_DEVICE, STATUS, section=DEVICE_RESET)
async def _(peer: Peer) -> None:
    await peer.negotiate(also=(STATUS,))
    await peer.frontend.set_status(AGREED)
    await peer.frontend.reset_device()
    equal("the status", await peer.frontend.get_status(), 0)
