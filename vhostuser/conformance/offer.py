"""What the back-end that a front-end under test meets says that it has.

What belongs here: features and configuration space of each kind of device. What does not: what is done with them.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace

from vhostuser.conformance.bench import Device
from vhostuser.protocol import ProtocolFeature, VirtioFeature

P, V = ProtocolFeature, VirtioFeature

_PLAIN = V.VERSION_1.mask | V.RING_INDIRECT_DESC.mask | V.RING_EVENT_IDX.mask
_TRANSPORT = _PLAIN | V.PROTOCOL_FEATURES.mask | V.LOG_ALL.mask
PROTOCOL = sum(
    feature.mask
    for feature in (
        P.MQ, P.LOG_SHMFD, P.REPLY_ACK, P.BACKEND_REQ, P.CONFIG, P.INFLIGHT_SHMFD, P.RESET_DEVICE,
        P.CONFIGURE_MEM_SLOTS, P.STATUS,
    )
)  # fmt: skip
"""Protocol features that the suite's back-end can play."""


@dataclass(frozen=True)
class Offer:
    """name: when it is made, in words that go on from a comma. queues, slots: how many rings and memory regions.

    config: the configuration space; bytes behind it are zeros.
    """

    name: str = "everything offered"
    features: int = _TRANSPORT
    protocol: int = PROTOCOL
    queues: int = 4
    slots: int = 32
    config: bytes = b""

    def also(self, *features: ProtocolFeature) -> Offer:
        """The same with these, which the suite's back-end can play where a case wants it to."""
        names = " and ".join(feature.name for feature in features)
        return replace(self, name=f"{names} offered", protocol=self.protocol | sum(each.mask for each in features))

    def without(self, name: str, *features: ProtocolFeature | VirtioFeature) -> Offer:
        """The same without these."""
        protocol = sum(feature.mask for feature in features if isinstance(feature, ProtocolFeature))
        virtio = sum(feature.mask for feature in features if isinstance(feature, VirtioFeature))
        return replace(self, name=name, features=self.features & ~virtio, protocol=self.protocol & ~protocol)


_QUEUES = 4
_SEG_MAX, _FLUSH, _MQ = 1 << 2, 1 << 9, 1 << 12
# virtio 1.2, 5.2.4: capacity in sectors, seg_max, blk_size, num_queues.
_BLK = struct.pack("<QII4xI10xH24x", 131072, 0, 126, 512, _QUEUES)
_MAC, _MRG_RXBUF, _STATUS = 1 << 5, 1 << 15, 1 << 16
# virtio 1.2, 5.1.4: an address that nobody else has, and the link is up.
_NET = struct.pack("<6sHHH", bytes.fromhex("020000000001"), 1, 1, 1500)

_OFFERS = {
    Device.BLK: Offer(features=_TRANSPORT | _SEG_MAX | _FLUSH | _MQ, config=_BLK),
    Device.NET: Offer(features=_TRANSPORT | _MAC | _MRG_RXBUF | _STATUS, config=_NET),
    Device.GENERIC: Offer(),
}


def offer_of(device: Device) -> Offer:
    """Everything that the suite's back-end can play, as a device of this kind."""
    return _OFFERS[device]
