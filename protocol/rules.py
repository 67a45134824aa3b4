"""What a well-formed request may not say: values judged against the state of the connection.

A rule returns the objection in words, or "" for none. The catalog names the rules of each message; the end that
receives an objectionable request refuses it, the end that would send it raises LocalProtocolError. Rules that need
guest memory, a file or the device (overlapping regions, alignment of rings, read-only configuration fields) belong to
those.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from vhostuser.protocol.codes import (
    MAX_QUEUE_SIZE,
    IotlbType,
    ProtocolFeature,
    TransferDirection,
    VirtioFeature,
    VringEndian,
    feature_names,
    protocol_feature_names,
)
from vhostuser.protocol.payloads import (
    U64,
    DeviceStateTransfer,
    Iotlb,
    MemoryTable,
    Payload,
    VringAddress,
    VringArea,
    VringFd,
    VringState,
)
from vhostuser.protocol.postcopy import EXCHANGING_BASES, Postcopy

if TYPE_CHECKING:
    from vhostuser.protocol.state import State

Rule = Callable[["State", Payload], str]


def queue_exists(state: "State", payload: Payload) -> str:
    index = cast(VringState | VringAddress | VringFd | VringArea, payload).index
    return "" if index < len(state.rings) else f"queue {index}, there are {len(state.rings)}"


def only_offered_features(state: "State", payload: Payload) -> str:
    extra = cast(U64, payload).value & ~state.features_offered
    return f"features that were never offered: {feature_names(extra)}" if extra else ""


def only_offered_protocol_features(state: "State", payload: Payload) -> str:
    extra = cast(U64, payload).value & ~state.protocol_features_offered
    return f"protocol features that were never offered: {protocol_feature_names(extra)}" if extra else ""


def inband_notifications_complete(state: "State", payload: Payload) -> str:
    value = cast(U64, payload).value
    needs = ProtocolFeature.BACKEND_REQ.mask | ProtocolFeature.REPLY_ACK.mask
    if value & ProtocolFeature.INBAND_NOTIFICATIONS.mask and value & needs != needs:
        return "INBAND_NOTIFICATIONS without BACKEND_REQ and REPLY_ACK"
    return ""


def left_in_flight_is_tracked(state: "State", payload: Payload) -> str:
    value = cast(U64, payload).value
    if value & ProtocolFeature.GET_VRING_BASE_INFLIGHT.mask and not value & ProtocolFeature.INFLIGHT_SHMFD.mask:
        return "GET_VRING_BASE_INFLIGHT without INFLIGHT_SHMFD"
    return ""


def queue_size(state: "State", payload: Payload) -> str:
    size = cast(VringState, payload).num
    if not 0 < size <= MAX_QUEUE_SIZE:
        return f"queue size {size}, expected 1 to {MAX_QUEUE_SIZE}"
    # Only a packed ring may have any size.
    if size & (size - 1) and not state.has(VirtioFeature.RING_PACKED):
        return f"queue size {size} of a split ring is not a power of two"
    return ""


def base_fits_ring(state: "State", payload: Payload) -> str:
    base = cast(VringState, payload).num
    if base > 0xFFFF and not state.has(VirtioFeature.RING_PACKED):
        return f"base {base:#x} of a split ring has reserved bits"
    return ""


def zero_or_one(state: "State", payload: Payload) -> str:
    num = cast(VringState, payload).num
    return "" if num in (0, 1) else f"num {num}, expected 0 or 1"


def order_of_a_legacy_ring(state: "State", payload: Payload) -> str:
    # Virtio 1 and packed rings are little-endian whatever the guest.
    modern = next((f for f in (VirtioFeature.VERSION_1, VirtioFeature.RING_PACKED) if state.has(f)), None)
    if cast(VringState, payload).num == VringEndian.BIG and modern is not None:
        return f"a big-endian ring, and {modern.name} was negotiated"
    return ""


def frontend_iotlb(state: "State", payload: Payload) -> str:
    return _iotlb_type(payload, IotlbType.UPDATE, IotlbType.INVALIDATE)


def backend_iotlb(state: "State", payload: Payload) -> str:
    return _iotlb_type(payload, IotlbType.MISS, IotlbType.ACCESS_FAIL)


def _iotlb_type(payload: Payload, *expected: IotlbType) -> str:
    got = cast(Iotlb, payload).type
    return "" if got in expected else f"IOTLB type {got}, expected {' or '.join(f'{t:d}' for t in expected)}"


def status_byte(state: "State", payload: Payload) -> str:
    value = cast(U64, payload).value
    return "" if value <= 0xFF else f"device status {value:#x} is no byte"


def transfer_while_suspended(state: "State", payload: Payload) -> str:
    transfer = cast(DeviceStateTransfer, payload)
    if transfer.direction not in list(TransferDirection) or transfer.phase:
        return f"direction {transfer.direction} and phase {transfer.phase}, expected direction 0 or 1 and phase 0"
    return "" if state.suspended else "the device is not suspended, some ring is started"


def advised(state: "State", payload: Payload) -> str:
    return "POSTCOPY_ADVISE must come first" if state.postcopy is Postcopy.IDLE else ""


def bases_exchanged(state: "State", payload: Payload) -> str:
    return "" if state.postcopy in EXCHANGING_BASES else "POSTCOPY_LISTEN must come first"


def some_region(state: "State", payload: Payload) -> str:
    # On the wire an empty table is what QEMU sends as the acknowledgement.
    return "" if cast(MemoryTable, payload).regions else "an empty memory table would be an acknowledgement"


def may_send_fd(state: "State", payload: Payload) -> str:
    if cast(VringArea, payload).has_fd and not state.has(ProtocolFeature.BACKEND_SEND_FD):
        return "BACKEND_SEND_FD was not negotiated"
    return ""
