"""The life of a ring: the whole truth table, then the messages and kicks that cause each event."""

from itertools import product

import pytest

from tests.protocol.samples import ALL_VIRTIO, connect
from tests.protocol.test_session import send
from vhostuser.protocol import U64, Reply, Ring, VringFd, VringState
from vhostuser.protocol import FrontendRequest as F
from vhostuser.protocol import VirtioFeature as V
from vhostuser.protocol.ring import RING, RingEvent

E = RingEvent

# started, enabled: before; event; after. Written out from section "Ring states", not from the table under test.
TRUTH = {
    (False, False): {
        E.KICK: (True, False), E.POLL: (True, False), E.STOP: (False, False),
        E.ENABLE: (False, True), E.DISABLE: (False, False), E.RESET: (False, False),
    },
    (False, True): {
        E.KICK: (True, True), E.POLL: (True, True), E.STOP: (False, True),
        E.ENABLE: (False, True), E.DISABLE: (False, False), E.RESET: (False, False),
    },
    (True, False): {
        E.KICK: (True, False), E.POLL: (True, False), E.STOP: (False, False),
        E.ENABLE: (True, True), E.DISABLE: (True, False), E.RESET: (False, False),
    },
    (True, True): {
        E.KICK: (True, True), E.POLL: (True, True), E.STOP: (False, True),
        E.ENABLE: (True, True), E.DISABLE: (True, False), E.RESET: (False, False),
    },
}  # fmt: skip


@pytest.mark.parametrize(("before", "event"), [*product(TRUTH, E)], ids=str)
def test_every_event_in_every_state(before: tuple[bool, bool], event: RingEvent) -> None:
    ring = Ring(*before)
    ring.apply(event)
    assert (ring.started, ring.enabled) == TRUTH[before][event]
    assert ring.runs == (ring.started and ring.enabled)


def test_the_table_knows_every_event() -> None:
    assert set(RING) == set(E)


def test_a_ring_begins_stopped_and_disabled() -> None:
    assert all((ring.started, ring.enabled) == (False, False) for ring in connect().back.rings)


def state(ring: Ring) -> tuple[bool, bool]:
    return ring.started, ring.enabled


def test_messages_move_the_ring_they_name_and_no_other() -> None:
    pair = connect()
    first, second = pair.back.rings
    pair.call(F.SET_VRING_ENABLE, VringState(1, 1))
    assert (state(first), state(second)) == ((False, False), (False, True))
    pair.call(F.VRING_KICK, VringState(1))
    assert (state(first), state(second)) == ((False, False), (True, True))
    pair.call(F.GET_VRING_BASE, VringState(1), outcome=Reply(VringState(1, 7)))
    assert state(second) == (False, True), "stopping tracks enabled"
    pair.call(F.SET_VRING_ENABLE, VringState(1, 0))
    assert state(second) == (False, False)
    assert pair.front.rings == pair.back.rings


def test_a_kick_descriptor_starts_nothing_until_it_is_kicked() -> None:
    pair = connect()
    pair.call(F.SET_VRING_KICK, VringFd(0), (5,))
    assert not pair.back.rings[0].started
    pair.back.kicked(0)
    assert pair.back.rings[0].started


def test_a_ring_without_kick_descriptor_is_polled_and_starts_at_once() -> None:
    pair = connect()
    pair.call(F.SET_VRING_KICK, VringFd(0, has_fd=False))
    assert pair.back.rings[0].started


@pytest.mark.parametrize("name", ["SET_VRING_CALL", "SET_VRING_ERR"])
def test_other_descriptors_start_nothing(name: str) -> None:
    pair = connect()
    pair.call(F[name], VringFd(0, has_fd=False))
    assert not pair.back.rings[0].started


def test_features_without_bit_30_enable_every_ring() -> None:
    pair = connect()
    pair.call(F.SET_FEATURES, U64(V.VERSION_1.mask))
    assert all(ring.enabled for ring in pair.back.rings)


def test_features_with_bit_30_leave_the_rings_alone() -> None:
    """Toggling LOG_ALL for a migration must neither halt a device nor enable what is disabled."""
    pair = connect()
    pair.call(F.SET_VRING_ENABLE, VringState(0, 1))
    for features in (ALL_VIRTIO, ALL_VIRTIO & ~V.LOG_ALL.mask):
        pair.call(F.SET_FEATURES, U64(features))
        assert [ring.enabled for ring in pair.back.rings] == [True, False]


def test_bit_30_is_a_number_and_not_a_mask() -> None:
    """Several back-ends test SET_FEATURES against 30, which is bits 1 to 4."""
    pair = connect(V.PROTOCOL_FEATURES.mask)
    assert not any(ring.enabled for ring in pair.back.rings)
    pair.call(F.SET_FEATURES, U64(V.NET_F_MTU.mask))
    assert all(ring.enabled for ring in pair.back.rings)


def test_reset_device_and_reset_owner() -> None:
    pair = connect()
    for ring in (0, 1):
        pair.call(F.SET_VRING_ENABLE, VringState(ring, 1))
        pair.back.kicked(ring)
    pair.call(F.RESET_OWNER)
    assert [state(ring) for ring in pair.back.rings] == [(True, False)] * 2, "disables, and changes nothing else"
    assert pair.back.features == ALL_VIRTIO
    pair.call(F.RESET_DEVICE)
    assert [state(ring) for ring in pair.back.rings] == [(False, False)] * 2
    assert pair.back.features == ALL_VIRTIO, "the connection's agreements stay"


@pytest.mark.parametrize("modern", [V.VERSION_1, V.RING_PACKED, None])
def test_a_big_endian_ring_is_a_legacy_driver_s(modern: V | None) -> None:
    """What came with virtio 1 is little-endian whatever the guest."""
    pair = connect(V.PROTOCOL_FEATURES.mask | (modern.mask if modern is not None else 0))
    for order, refused in ((0, False), (1, modern is not None)):
        request = send(pair, F.SET_VRING_ENDIAN, VringState(0, order), ask=True)
        assert (request.refusal is not None) == refused
        pair.back.finish(request)


def test_a_device_is_suspended_while_all_rings_are_stopped() -> None:
    pair = connect()
    assert pair.back.suspended
    pair.back.kicked(1)
    assert not pair.back.suspended
    pair.call(F.GET_VRING_BASE, VringState(1), outcome=Reply(VringState(1)))
    assert pair.back.suspended
