"""Numbers of the protocol: request codes, feature bits, flags, each with a line of meaning.

What a message carries, when it is allowed and how it is answered is not here but in the catalog.
Features are bit *numbers*; `.mask` is the value to test with. (Testing with the number 30 itself is the error that
several back-ends share.)
"""

from enum import IntEnum, IntFlag
from typing import Self

# Header flags. A reply's flags are exactly VERSION | REPLY: QEMU rejects a reply that keeps need_reply.
VERSION = 0x1
VERSION_MASK = 0x3
REPLY = 0x4
NEED_REPLY = 0x8

NO_FD = 0x100
"""Bit 8 of a vring index: no descriptor comes with this message."""

VHOST_VRING_F_LOG = 0x1
"""Bit 0 of the flags in SET_VRING_ADDR: writes to the used ring are logged too."""

MAX_QUEUE_SIZE = 32768
"""Entries of a ring, at most (virtio, split and packed)."""


class _Noted(IntEnum):
    """An integer with one line of meaning."""

    note: str

    def __new__(cls, value: int, note: str = "") -> Self:
        member = int.__new__(cls, value)
        member._value_ = value
        member.note = note
        return member


class FrontendRequest(_Noted):
    """What the front-end asks of the back-end. Section "Front-end message types"."""

    # Not a request of the specification: see catalog.FRONTEND, which tells it from the ids that it borrows.
    POSTCOPY_ACK = 0, "the bases are known, memory may be touched (wire id 5, 37, 38 or 0)"
    GET_FEATURES = 1, "which virtio features are offered"
    SET_FEATURES = 2, "these virtio features are used"
    SET_OWNER = 3, "a session begins"
    RESET_OWNER = 4, "deprecated: disable all rings"
    SET_MEM_TABLE = 5, "this is the whole of guest memory"
    SET_LOG_BASE = 6, "mark dirty pages here"
    SET_LOG_FD = 7, "signal here when the log has changed"
    SET_VRING_NUM = 8, "size of a queue"
    SET_VRING_ADDR = 9, "where the parts of a ring are"
    SET_VRING_BASE = 10, "where to go on in a ring"
    GET_VRING_BASE = 11, "stop the ring and say where it stands"
    SET_VRING_KICK = 12, "the driver's notifications arrive here"
    SET_VRING_CALL = 13, "notify the driver here"
    SET_VRING_ERR = 14, "report a broken ring here"
    GET_PROTOCOL_FEATURES = 15, "which protocol features are offered"
    SET_PROTOCOL_FEATURES = 16, "these protocol features are used"
    GET_QUEUE_NUM = 17, "how many queues there can be"
    SET_VRING_ENABLE = 18, "enable or disable a ring"
    SEND_RARP = 19, "announce the guest's MAC after a migration"
    NET_SET_MTU = 20, "the MTU that the guest was told"
    SET_BACKEND_REQ_FD = 21, "socket for the back-end's own requests"
    IOTLB_MSG = 22, "update or invalidate a translation"
    SET_VRING_ENDIAN = 23, "byte order of a legacy ring"
    GET_CONFIG = 24, "read the device's configuration space"
    SET_CONFIG = 25, "write the device's configuration space"
    CREATE_CRYPTO_SESSION = 26, "open a crypto session"
    CLOSE_CRYPTO_SESSION = 27, "close a crypto session"
    POSTCOPY_ADVISE = 28, "postcopy may follow: hand over a userfaultfd"
    POSTCOPY_LISTEN = 29, "postcopy begins: register memory that comes from now on"
    POSTCOPY_END = 30, "postcopy is over: close the userfaultfd"
    GET_INFLIGHT_FD = 31, "make a buffer that tracks requests in flight"
    SET_INFLIGHT_FD = 32, "here is that buffer again"
    GPU_SET_SOCKET = 33, "socket of the vhost-user-gpu protocol"
    RESET_DEVICE = 34, "disable all rings, forget the device's state"
    VRING_KICK = 35, "an in-band kick"
    GET_MAX_MEM_SLOTS = 36, "how many memory regions there can be"
    ADD_MEM_REG = 37, "one more region of guest memory"
    REM_MEM_REG = 38, "one region less"
    SET_STATUS = 39, "the virtio device status"
    GET_STATUS = 40, "read the virtio device status back"
    GET_SHARED_OBJECT = 41, "fetch a dma-buf by UUID"
    SET_DEVICE_STATE_FD = 42, "move the device's state through this descriptor"
    CHECK_DEVICE_STATE = 43, "did the state arrive in full"
    GET_SHMEM_CONFIG = 44, "sizes of the shared memory regions (after specification 10.0)"

    @property
    def clause(self) -> str:
        """Its heading in the specification."""
        return "VHOST_USER_SET_MEM_TABLE, note" if self == 0 else f"VHOST_USER_{self.name}"


class BackendRequest(_Noted):
    """What the back-end asks of the front-end, on its own socket. Section "Back-end message types"."""

    IOTLB_MSG = 1, "a translation is missing or failed"
    CONFIG_CHANGE_MSG = 2, "the configuration space has changed"
    VRING_HOST_NOTIFIER_MSG = 3, "map this area as the queue's notify page"
    VRING_CALL = 4, "an in-band call"
    VRING_ERR = 5, "an in-band err"
    SHARED_OBJECT_ADD = 6, "we export this UUID"
    SHARED_OBJECT_REMOVE = 7, "we no longer export this UUID"
    SHARED_OBJECT_LOOKUP = 8, "fetch a dma-buf that another exports"
    SHMEM_MAP = 9, "map this file into a shared memory region (after specification 10.0)"
    SHMEM_UNMAP = 10, "unmap it (after specification 10.0)"

    @property
    def clause(self) -> str:
        """Its heading in the specification."""
        return f"VHOST_USER_BACKEND_{self.name}"


class _Bit(_Noted):
    """A feature by its bit number."""

    @property
    def mask(self) -> int:
        """1 << bit."""
        return 1 << self


class ProtocolFeature(_Bit):
    """Extensions of the protocol, negotiated by GET/SET_PROTOCOL_FEATURES. Section "Protocol features".

    Bits 20 to 22 came after specification 10.0 and were moved while in flux: SHMEM was 20, then 21 (the vhost crate up
    to 0.16), and is 22 in the published text. Offer none of them to a peer of unknown age.
    """

    MQ = 0, "several queues"
    LOG_SHMFD = 1, "dirty log in shared memory"
    RARP = 2, "SEND_RARP"
    REPLY_ACK = 3, "need_reply asks for an ack"
    MTU = 4, "NET_SET_MTU"
    BACKEND_REQ = 5, "the back-end has a channel of its own"
    CROSS_ENDIAN = 6, "SET_VRING_ENDIAN"
    CRYPTO_SESSION = 7, "crypto sessions"
    PAGEFAULT = 8, "postcopy"
    CONFIG = 9, "configuration space"
    BACKEND_SEND_FD = 10, "back-end requests may carry descriptors"
    HOST_NOTIFIER = 11, "notify pages of queues"
    INFLIGHT_SHMFD = 12, "requests in flight are tracked in shared memory"
    RESET_DEVICE = 13, "RESET_DEVICE"
    INBAND_NOTIFICATIONS = 14, "kick, call and err as messages; needs BACKEND_REQ and REPLY_ACK"
    CONFIGURE_MEM_SLOTS = 15, "memory regions come and go one by one"
    STATUS = 16, "virtio device status"
    XEN_MMAP = 17, "memory regions have two more fields"
    SHARED_OBJECT = 18, "dma-bufs by UUID"
    DEVICE_STATE = 19, "the device's state migrates through the front-end"
    GET_VRING_BASE_INFLIGHT = 20, "GET_VRING_BASE may leave requests in flight (was SHMEM in drafts)"
    GPA_ADDRESSES = 21, "ring addresses are guest addresses (was SHMEM in drafts and in the vhost crate to 0.16)"
    SHMEM = 22, "shared memory regions: SHMEM_MAP, SHMEM_UNMAP, GET_SHMEM_CONFIG"


SHMEM_IN_DRAFTS = (ProtocolFeature.GPA_ADDRESSES, ProtocolFeature.GET_VRING_BASE_INFLIGHT)
"""The bits that SHMEM had in drafts of the specification, the last first."""


class VirtioFeature(_Bit):
    """Virtio feature bits that the transport or a gate of the catalog knows; devices have more, below bit 24."""

    NET_F_MTU = 3, "virtio-net only: the MTU is configured"
    NOTIFY_ON_EMPTY = 24, "notify when the ring runs empty"
    LOG_ALL = 26, "mark writes to guest memory in the dirty log"
    ANY_LAYOUT = 27, "no rule where a message is cut into segments"
    RING_INDIRECT_DESC = 28, "indirect descriptors"
    RING_EVENT_IDX = 29, "event index"
    PROTOCOL_FEATURES = 30, "vhost-user only: there are protocol features"
    VERSION_1 = 32, "not a legacy device"
    ACCESS_PLATFORM = 33, "addresses go through an IOMMU"
    RING_PACKED = 34, "packed rings"
    IN_ORDER = 35, "buffers are used in order"
    ORDER_PLATFORM = 36, "full memory barriers"
    SR_IOV = 37, "virtual functions"
    NOTIFICATION_DATA = 38, "kicks carry data"
    NOTIF_CONFIG_DATA = 39, "kicks carry the queue's configuration data"
    RING_RESET = 40, "queues are reset one by one"


class ConfigFlags(IntFlag):
    """Flags of GET_CONFIG and SET_CONFIG. Section "Virtio device config space"."""

    WRITABLE = 0
    LIVE_MIGRATION = 1


class DeviceStatus(IntFlag):
    """Bits of SET_STATUS and GET_STATUS (virtio 1.2, 2.1)."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    NEEDS_RESET = 64
    FAILED = 128


class VringEndian(IntEnum):
    """num of SET_VRING_ENDIAN."""

    LITTLE = 0
    BIG = 1


class IotlbType(IntEnum):
    """type of an IOTLB message. The front-end sends UPDATE and INVALIDATE, the back-end MISS and ACCESS_FAIL."""

    MISS = 1
    UPDATE = 2
    INVALIDATE = 3
    ACCESS_FAIL = 4


class TransferDirection(IntEnum):
    """direction of SET_DEVICE_STATE_FD."""

    SAVE = 0
    LOAD = 1


def feature_names(bits: int, kind: type[_Bit] = VirtioFeature) -> str:
    """The set bits by name, lowest first, as in "VERSION_1 bit41"; "none" for 0. Bits without a name print as bitN."""
    known = {int(member): member.name for member in kind}
    return " ".join(known.get(n, f"bit{n}") for n in range(bits.bit_length()) if bits >> n & 1) or "none"


def protocol_feature_names(bits: int) -> str:
    """feature_names for protocol features."""
    return feature_names(bits, ProtocolFeature)
