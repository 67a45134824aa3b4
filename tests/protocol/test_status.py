"""The device status between the two sessions: SET_STATUS, GET_STATUS, and what RESET_DEVICE makes of it."""

import pytest

from tests.protocol.samples import ALL_PROTOCOL, Pair, connect
from tests.protocol.test_session import BIT_30, fresh, send
from vhostuser.protocol import U64, DeviceStatus, RemoteProtocolError, RequestRefused, VringState
from vhostuser.protocol import FrontendRequest as F
from vhostuser.protocol import ProtocolFeature as P
from vhostuser.protocol import VirtioFeature as V

S = DeviceStatus
AGREED = S.ACKNOWLEDGE | S.DRIVER | S.FEATURES_OK


def status(pair: Pair) -> int:
    answer = pair.call(F.GET_STATUS)
    assert isinstance(answer.payload, U64)
    return answer.payload.value


def test_the_status_is_read_back() -> None:
    pair = connect()
    assert status(pair) == 0
    pair.call(F.SET_STATUS, U64(AGREED))
    assert status(pair) == AGREED == pair.front.status


def test_rings_may_be_served_from_driver_ok_on() -> None:
    """Virtio 1.3, 2.1.2: the device MUST NOT consume buffers before DRIVER_OK."""
    pair = connect()
    pair.call(F.SET_STATUS, U64(AGREED))
    assert not pair.back.ready
    pair.call(F.SET_STATUS, U64(AGREED | S.DRIVER_OK))
    assert pair.back.ready
    pair.call(F.SET_STATUS, U64(0))
    assert not pair.back.ready


def test_features_ok_of_the_front_end_s_own_is_all_that_it_may_say() -> None:
    """QEMU 7.2 sets this one bit, and never DRIVER_OK for a device whose last ring it does not know."""
    pair = connect()
    assert not pair.back.ready
    pair.call(F.SET_STATUS, U64(S.FEATURES_OK))
    assert pair.back.ready
    pair.call(F.SET_STATUS, U64(AGREED))
    assert not pair.back.ready, "now a driver speaks"


def test_without_the_feature_rings_are_always_ready() -> None:
    assert fresh(protocol_features=ALL_PROTOCOL & ~P.STATUS.mask).back.ready


@pytest.mark.parametrize("ask", [False, True])
def test_features_that_were_refused_leave_no_features_ok(ask: bool) -> None:
    """Virtio 1.3, 3.1.1. Where nobody asked for an ack this is how it is told, and the connection stays."""
    pair = connect(V.VERSION_1.mask | BIT_30)
    answer = pair.back.finish(send(pair, F.SET_FEATURES, U64(BIT_30), ask=ask), RequestRefused("VERSION_1 is missing"))
    assert (answer is not None) == ask
    pair.call(F.SET_STATUS, U64(AGREED | S.DRIVER_OK))
    assert (status(pair), pair.back.ready) == (AGREED & ~S.FEATURES_OK | S.DRIVER_OK, False)
    pair.call(F.SET_FEATURES, U64(V.VERSION_1.mask | BIT_30))
    pair.call(F.SET_STATUS, U64(AGREED | S.DRIVER_OK))
    assert (status(pair), pair.back.ready) == (AGREED | S.DRIVER_OK, True)


def test_without_the_feature_refused_features_close_the_connection() -> None:
    pair = fresh(protocol_features=ALL_PROTOCOL & ~P.STATUS.mask)
    with pytest.raises(RemoteProtocolError, match="no way to tell"):
        pair.back.finish(send(pair, F.SET_FEATURES, U64(BIT_30)), RequestRefused("VERSION_1 is missing"))


@pytest.mark.parametrize("reset", [F.SET_STATUS, F.RESET_DEVICE])
def test_needs_reset_is_the_device_s_and_stays_until_a_reset(reset: F) -> None:
    """Virtio 1.3, 2.1.2. QEMU reads the status and writes it back with one bit more."""
    pair = connect()
    pair.call(F.SET_STATUS, U64(AGREED | S.NEEDS_RESET))
    assert status(pair) == AGREED, "a driver cannot set it"
    pair.back.ask_for_reset()
    assert status(pair) == AGREED | S.NEEDS_RESET
    pair.call(F.SET_STATUS, U64(AGREED | S.DRIVER_OK))
    assert status(pair) == AGREED | S.DRIVER_OK | S.NEEDS_RESET, "nor clear it"
    pair.call(reset, U64(0) if reset is F.SET_STATUS else None)
    assert status(pair) == 0


def test_a_status_of_0_stops_every_ring_and_leaves_it_enabled() -> None:
    """The driver's reset (virtio 1.3, 2.4). RESET_DEVICE disables them too."""
    pair = connect()
    for index in (0, 1):
        pair.call(F.SET_VRING_ENABLE, VringState(index, 1))
        pair.back.kicked(index)
    pair.call(F.SET_STATUS, U64(AGREED))
    assert not pair.back.suspended
    pair.call(F.SET_STATUS, U64(0))
    assert pair.back.suspended
    assert all(ring.enabled for ring in pair.back.rings)
    assert pair.front.suspended, "the other end has followed"
