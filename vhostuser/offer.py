"""What the runtime offers to front-ends, whatever the device.

What belongs here: feature bits of the transport and of the protocol. What does not: those of a device, and what follows
from them (``connection``).
"""

from vhostuser.protocol import ProtocolFeature, VirtioFeature

TRANSPORT_FEATURES = (
    VirtioFeature.LOG_ALL.mask
    | VirtioFeature.NOTIFY_ON_EMPTY.mask
    | VirtioFeature.ANY_LAYOUT.mask
    | VirtioFeature.RING_INDIRECT_DESC.mask
    | VirtioFeature.RING_EVENT_IDX.mask
    | VirtioFeature.RING_PACKED.mask
    | VirtioFeature.ACCESS_PLATFORM.mask
    | VirtioFeature.PROTOCOL_FEATURES.mask
    | VirtioFeature.VERSION_1.mask
)
"""The virtio feature bits that the runtime offers for every device."""

_PROTOCOL_FEATURES = (
    ProtocolFeature.MQ,
    ProtocolFeature.LOG_SHMFD,
    ProtocolFeature.REPLY_ACK,
    ProtocolFeature.BACKEND_REQ,
    ProtocolFeature.CONFIG,
    ProtocolFeature.INFLIGHT_SHMFD,
    ProtocolFeature.RESET_DEVICE,
    ProtocolFeature.INBAND_NOTIFICATIONS,
    ProtocolFeature.CONFIGURE_MEM_SLOTS,
    ProtocolFeature.STATUS,
)


def protocol_features(*, pagefault: bool, mem_slots: int) -> int:
    """The protocol feature bits: PAGEFAULT where it can be had, CONFIGURE_MEM_SLOTS only with slots."""
    bits = sum(feature.mask for feature in _PROTOCOL_FEATURES)
    if pagefault:
        bits |= ProtocolFeature.PAGEFAULT.mask
    if not mem_slots:
        bits &= ~ProtocolFeature.CONFIGURE_MEM_SLOTS.mask
    return bits
