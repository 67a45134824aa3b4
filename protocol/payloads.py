"""Payloads: what stands behind the header, as frozen dataclasses beside their layouts on the wire.

The only importer of construct. A payload knows its bytes, the sizes it can have and how many descriptors its own
content calls for; which message carries it is the catalog's business, whether its values make sense is rules.py's.

All numbers are in native byte order. `unpack` and `pack` raise ValueError, one line, for bytes or values that do not
fit; their callers know whose fault that is. Field names are the specification's words ("Message Specification",
"Payload"), addresses are named by their space: guest (physical), user (the front-end's virtual).
"""

import struct
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar, Self, cast

import construct as c

from vhostuser.protocol.codes import NO_FD

MAX_REGIONS = 8
"""Regions in one SET_MEM_TABLE (section "Multiple Memory regions description"); more need CONFIGURE_MEM_SLOTS."""

MAX_CONFIG = 256
"""Bytes of configuration space in one message: QEMU's and libvhost-user's bound, the specification has none."""

MAX_CRYPTO = 2048
"""Bytes of a crypto session. QEMU's has some 1.3 KiB; the specification gives neither layout nor bound."""

SHMEM_REGIONS = 256
"""Entries of GET_SHMEM_CONFIG's array, sent in full whatever their number."""

_U64 = struct.Struct("=Q")
_U32_PAIR = struct.Struct("=II")


def _exactly(size: int) -> range:
    return range(size, size + 1)


class Payload:
    """Base of all payloads."""

    __slots__ = ()
    sizes: ClassVar[range]
    """Wire sizes in bytes that this payload can have."""

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Read from `data`, whose length is in `sizes`. Raises ValueError if the content contradicts itself."""
        raise NotImplementedError

    def pack(self) -> bytes:
        """The wire bytes. Raises ValueError for a value that does not fit its field."""
        raise NotImplementedError

    def fd_count(self) -> int | None:
        """How many descriptors this content calls for, in a message where that varies; None if it does not say."""
        return None


@dataclass(frozen=True, slots=True)
class Empty(Payload):
    """No payload."""

    sizes: ClassVar[range] = _exactly(0)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        return cls()

    def pack(self) -> bytes:
        return b""


@dataclass(frozen=True, slots=True)
class PostcopyAck(Payload):
    """The front-end's word that it knows the back-end's bases. Empty by the specification, a u64 of 0 from QEMU."""

    sizes: ClassVar[range] = range(0, 9, 8)
    empty: bool = False

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        if any(data):
            raise ValueError(f"payload {data.hex()} where an acknowledgement is empty or a u64 of 0")
        return cls(empty=not data)

    def pack(self) -> bytes:
        return b"" if self.empty else bytes(8)


class _Word(Payload):
    """Base of the payloads that are one u64."""

    __slots__ = ()
    sizes: ClassVar[range] = _exactly(8)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        return cls.from_word(cast(int, _U64.unpack(data)[0]))

    def pack(self) -> bytes:
        word = self.word()
        if not 0 <= word < 1 << 64:
            raise ValueError(f"{word:#x} does not fit a u64")
        return _U64.pack(word)

    @classmethod
    def from_word(cls, word: int) -> Self:
        raise NotImplementedError

    def word(self) -> int:
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class U64(_Word):
    """A single 64-bit integer."""

    value: int

    @classmethod
    def from_word(cls, word: int) -> Self:
        return cls(word)

    def word(self) -> int:
        return self.value


@dataclass(frozen=True, slots=True)
class VringFd(_Word):
    """index: queue, 0 to 255. has_fd: false (bit 8 on the wire) means that there is none and the ring is polled."""

    index: int
    has_fd: bool = True

    @classmethod
    def from_word(cls, word: int) -> Self:
        return cls(*_split_index(word))

    def word(self) -> int:
        return _join_index(self.index, self.has_fd)

    def fd_count(self) -> int:
        return int(self.has_fd)


@dataclass(frozen=True, slots=True)
class DeviceStateReply(_Word):
    """Reply to SET_DEVICE_STATE_FD. error: 0, or 1 to 255. has_fd: a channel of the back-end's own comes along."""

    error: int = 0
    has_fd: bool = False

    @classmethod
    def from_word(cls, word: int) -> Self:
        reply = cls(*_split_index(word))
        if reply.error and reply.has_fd:
            raise ValueError(f"error {reply.error} together with a descriptor; a failure has bit 8 set")
        return reply

    def word(self) -> int:
        return _join_index(self.error, self.has_fd)

    def fd_count(self) -> int:
        return int(self.has_fd)


def _split_index(word: int) -> tuple[int, bool]:
    if word >> 9:
        raise ValueError(f"{word:#x} uses reserved bits; bits 0-7 are a number and bit 8 means no descriptor")
    return word & 0xFF, not word & NO_FD


def _join_index(number: int, has_fd: bool) -> int:
    if not 0 <= number <= 0xFF:
        raise ValueError(f"{number} does not fit the 8 bits that a vring index has here")
    return number | (0 if has_fd else NO_FD)


@dataclass(frozen=True, slots=True)
class VringState(Payload):
    """index: queue. num: size, base, 0 or 1, as the message wants it."""

    sizes: ClassVar[range] = _exactly(8)
    index: int
    num: int = 0

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        return cls(*_U32_PAIR.unpack(data))

    def pack(self) -> bytes:
        try:
            return _U32_PAIR.pack(self.index, self.num)
        except struct.error as error:
            raise ValueError(f"{self}: {error}") from None


class _Laid(Payload):
    """Base of the payloads whose layout is construct's: a Struct with the dataclass's fields, and paddings."""

    __slots__ = ()
    layout: ClassVar[Any]

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        return cls.from_container(_parse(cls.layout, data))

    def pack(self) -> bytes:
        return _build(self.layout, self)

    @classmethod
    def from_container(cls, parsed: Any) -> Self:
        return cls(**{field.name: parsed[field.name] for field in fields(cast(Any, cls))})


def _parse(layout: Any, data: bytes) -> Any:
    try:
        return layout.parse(data)
    except c.ConstructError as error:
        raise ValueError(_one_line(error)) from None


def _build(layout: Any, value: Payload) -> bytes:
    try:
        return cast(bytes, layout.build(_plain(value)))
    except c.ConstructError as error:
        raise ValueError(f"{value}: {_one_line(error)}") from None


def _plain(value: Any) -> Any:
    """Dataclasses as dicts and tuples as lists, which construct builds from."""
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    return value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


@dataclass(frozen=True, slots=True)
class VringAddress(_Laid):
    """index: queue. flags: VHOST_VRING_F_LOG. desc, used, avail: addresses of the ring's parts; log: guest address.

    The first three are user addresses, or I/O virtual ones where ACCESS_PLATFORM was negotiated.
    """

    layout: ClassVar[Any] = c.Struct(
        "index" / c.Int32un, "flags" / c.Int32un,
        "desc" / c.Int64un, "used" / c.Int64un, "avail" / c.Int64un, "log" / c.Int64un, c.Terminated,
    )  # fmt: skip
    sizes: ClassVar[range] = _exactly(40)
    index: int
    flags: int
    desc: int
    used: int
    avail: int
    log: int


@dataclass(frozen=True, slots=True)
class MemoryRegion(_Laid):
    """guest: guest address. size: bytes. user: the front-end's address. offset: where the region begins in its file."""

    layout: ClassVar[Any] = c.Struct(
        "guest" / c.Int64un, "size" / c.Int64un, "user" / c.Int64un, "offset" / c.Int64un
    )  # fmt: skip
    sizes: ClassVar[range] = _exactly(32)
    guest: int
    size: int
    user: int
    offset: int


@dataclass(frozen=True, slots=True)
class XenMemoryRegion(_Laid):
    """A MemoryRegion where XEN_MMAP was negotiated: xen_flags says how it may be mapped, domid whose it is."""

    layout: ClassVar[Any] = c.Struct(*MemoryRegion.layout.subcons, "xen_flags" / c.Int32un, "domid" / c.Int32un)
    sizes: ClassVar[range] = _exactly(40)
    guest: int
    size: int
    user: int
    offset: int
    xen_flags: int
    domid: int


class _Table(Payload):
    """Base of the memory tables: a count, then so many regions of one layout, and one descriptor for each."""

    __slots__ = ()
    layout: ClassVar[Any]
    regions: tuple[Any, ...]

    @classmethod
    def read(cls, data: bytes, region: type[_Laid]) -> Any:
        """The regions; the count must agree with the size, since a reader may trust either."""
        parsed = _parse(cls.layout, data)
        if parsed.num != len(parsed.regions):
            raise ValueError(f"{parsed.num} regions announced, {len(parsed.regions)} sent")
        return tuple(region.from_container(item) for item in parsed.regions)

    def pack(self) -> bytes:
        if len(self.regions) > MAX_REGIONS:
            raise ValueError(f"{len(self.regions)} regions, a table holds {MAX_REGIONS}; use ADD_MEM_REG")
        return _build(self.layout, self)

    def fd_count(self) -> int:
        return len(self.regions)


def _table_layout(region: Any) -> Any:
    count = c.Rebuild(c.Int32un, c.len_(c.this.regions))
    return c.Struct("num" / count, c.Padding(4), "regions" / c.GreedyRange(region), c.Terminated)


@dataclass(frozen=True, slots=True)
class MemoryTable(_Table):
    """The whole guest memory: 0 to 8 regions, in the order of their descriptors."""

    layout: ClassVar[Any] = _table_layout(MemoryRegion.layout)
    sizes: ClassVar[range] = range(8, 8 + 32 * MAX_REGIONS + 1, 32)
    regions: tuple[MemoryRegion, ...]

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        return cls(cls.read(data, MemoryRegion))


@dataclass(frozen=True, slots=True)
class XenMemoryTable(_Table):
    """A MemoryTable where XEN_MMAP was negotiated."""

    layout: ClassVar[Any] = _table_layout(XenMemoryRegion.layout)
    sizes: ClassVar[range] = range(8, 8 + 40 * MAX_REGIONS + 1, 40)
    regions: tuple[XenMemoryRegion, ...]

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        return cls(cls.read(data, XenMemoryRegion))


@dataclass(frozen=True, slots=True)
class SingleRegion(_Laid):
    """One region behind eight bytes of padding."""

    layout: ClassVar[Any] = c.Struct(c.Padding(8), "region" / MemoryRegion.layout, c.Terminated)
    sizes: ClassVar[range] = _exactly(40)
    region: MemoryRegion

    @classmethod
    def from_container(cls, parsed: Any) -> Self:
        return cls(MemoryRegion.from_container(parsed.region))


@dataclass(frozen=True, slots=True)
class XenSingleRegion(_Laid):
    """A SingleRegion where XEN_MMAP was negotiated."""

    layout: ClassVar[Any] = c.Struct(c.Padding(8), "region" / XenMemoryRegion.layout, c.Terminated)
    sizes: ClassVar[range] = _exactly(48)
    region: XenMemoryRegion

    @classmethod
    def from_container(cls, parsed: Any) -> Self:
        return cls(XenMemoryRegion.from_container(parsed.region))


@dataclass(frozen=True, slots=True)
class Log(_Laid):
    """size: bytes of the dirty log. offset: where guest address 0 is logged in the descriptor that comes along."""

    layout: ClassVar[Any] = c.Struct("size" / c.Int64un, "offset" / c.Int64un, c.Terminated)
    sizes: ClassVar[range] = _exactly(16)
    size: int
    offset: int


@dataclass(frozen=True, slots=True)
class Iotlb(_Laid):
    """iova, size, user: a range and its translation. permissions: 1 read, 2 write, 3 both. type: an IotlbType.

    32 bytes: the kernel's struct has six of padding at its end.
    """

    layout: ClassVar[Any] = c.Struct(
        "iova" / c.Int64un, "size" / c.Int64un, "user" / c.Int64un,
        "permissions" / c.Int8un, "type" / c.Int8un, c.Padding(6), c.Terminated,
    )  # fmt: skip
    sizes: ClassVar[range] = _exactly(32)
    iova: int
    size: int
    user: int
    permissions: int
    type: int


@dataclass(frozen=True, slots=True)
class Config(_Laid):
    """A piece of configuration space: offset and size in bytes, ConfigFlags, and the `size` bytes themselves.

    A GET_CONFIG carries bytes without meaning; the reply has the same size whatever that is (69 and 72 both occur for
    blk).
    """

    layout: ClassVar[Any] = c.Struct(
        "offset" / c.Int32un, "size" / c.Int32un, "flags" / c.Int32un, "data" / c.GreedyBytes
    )  # fmt: skip
    sizes: ClassVar[range] = range(12, 12 + MAX_CONFIG + 1)
    offset: int
    size: int
    flags: int
    data: bytes

    @classmethod
    def from_container(cls, parsed: Any) -> Self:
        if parsed.size != len(parsed.data):
            raise ValueError(f"size {parsed.size} announced, {len(parsed.data)} bytes sent")
        return cls(parsed.offset, parsed.size, parsed.flags, parsed.data)

    def pack(self) -> bytes:
        if not self.size == len(self.data) <= MAX_CONFIG:
            raise ValueError(
                f"size {self.size} with {len(self.data)} bytes of data; they are equal and at most {MAX_CONFIG}"
            )
        return _build(self.layout, self)


@dataclass(frozen=True, slots=True)
class CryptoSession(_Laid):
    """A crypto session. op_code: what for. parameters: opaque. session_id: -1 in a reply means refused.

    The specification leaves the layout out. These are the ends of the struct that QEMU has used since asymmetric keys
    came in; what lies between them holds pointers of QEMU's own and has no meaning that two programs could agree on.
    """

    layout: ClassVar[Any] = c.Struct("op_code" / c.Int64un, "rest" / c.GreedyBytes)
    sizes: ClassVar[range] = range(16, MAX_CRYPTO + 1)
    op_code: int
    parameters: bytes
    session_id: int = 0

    @classmethod
    def from_container(cls, parsed: Any) -> Self:
        return cls(parsed.op_code, parsed.rest[:-8], int(c.Int64sn.parse(parsed.rest[-8:])))

    def pack(self) -> bytes:
        if len(self.parameters) > MAX_CRYPTO - 16:
            raise ValueError(f"{len(self.parameters)} bytes of parameters, at most {MAX_CRYPTO - 16} fit")
        try:
            return bytes(c.Int64un.build(self.op_code) + self.parameters + c.Int64sn.build(self.session_id))
        except c.ConstructError as error:
            raise ValueError(f"{self}: {_one_line(error)}") from None


@dataclass(frozen=True, slots=True)
class VringArea(Payload):
    """A part of a descriptor's file for queue `index`: size and offset in bytes. has_fd: false takes the area away."""

    layout: ClassVar[Any] = c.Struct("word" / c.Int64un, "size" / c.Int64un, "offset" / c.Int64un, c.Terminated)
    sizes: ClassVar[range] = _exactly(24)
    index: int
    size: int
    offset: int
    has_fd: bool = True

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        parsed = _parse(cls.layout, data)
        index, has_fd = _split_index(parsed.word)
        return cls(index, parsed.size, parsed.offset, has_fd)

    def pack(self) -> bytes:
        word = _join_index(self.index, self.has_fd)
        try:
            return cast(bytes, self.layout.build({"word": word, "size": self.size, "offset": self.offset}))
        except c.ConstructError as error:
            raise ValueError(f"{self}: {_one_line(error)}") from None

    def fd_count(self) -> int:
        return int(self.has_fd)


@dataclass(frozen=True, slots=True)
class Inflight(_Laid):
    """mmap_size, mmap_offset: bytes of the buffer in its descriptor. num_queues queues of queue_size entries each.

    24 bytes: QEMU's struct is not packed, so four bytes of padding follow, and libvhost-user and DPDK insist on them.
    """

    layout: ClassVar[Any] = c.Struct(
        "mmap_size" / c.Int64un, "mmap_offset" / c.Int64un,
        "num_queues" / c.Int16un, "queue_size" / c.Int16un, c.Padding(4), c.Terminated,
    )  # fmt: skip
    sizes: ClassVar[range] = _exactly(24)
    mmap_size: int
    mmap_offset: int
    num_queues: int
    queue_size: int


@dataclass(frozen=True, slots=True)
class Uuid(_Laid):
    """16 bytes, as in uuid.UUID(bytes=value): the first three components are big-endian."""

    layout: ClassVar[Any] = c.Struct("value" / c.Bytes(16), c.Terminated)
    sizes: ClassVar[range] = _exactly(16)
    value: bytes


@dataclass(frozen=True, slots=True)
class DeviceStateTransfer(_Laid):
    """direction: a TransferDirection. phase: 0, the only one there is: guest and device are stopped."""

    layout: ClassVar[Any] = c.Struct("direction" / c.Int32un, "phase" / c.Int32un, c.Terminated)
    sizes: ClassVar[range] = _exactly(8)
    direction: int
    phase: int = 0


@dataclass(frozen=True, slots=True)
class ShmemConfig(_Laid):
    """memory_sizes: bytes of each shared memory region by id, 0 where there is none; num_regions that are not 0."""

    layout: ClassVar[Any] = c.Struct(
        "num_regions" / c.Int32un, c.Padding(4), "memory_sizes" / c.Array(SHMEM_REGIONS, c.Int64un), c.Terminated
    )
    sizes: ClassVar[range] = _exactly(8 + 8 * SHMEM_REGIONS)
    num_regions: int
    memory_sizes: tuple[int, ...]

    @classmethod
    def from_container(cls, parsed: Any) -> Self:
        return cls(parsed.num_regions, tuple(parsed.memory_sizes))


@dataclass(frozen=True, slots=True)
class MmapMsg(_Laid):
    """length bytes at fd_offset of a file, for shm_offset of shared memory region shmid. flags: bit 0 is writable."""

    layout: ClassVar[Any] = c.Struct(
        "shmid" / c.Int8un, c.Padding(7),
        "fd_offset" / c.Int64un, "shm_offset" / c.Int64un, "length" / c.Int64un, "flags" / c.Int64un, c.Terminated,
    )  # fmt: skip
    sizes: ClassVar[range] = _exactly(40)
    shmid: int
    fd_offset: int
    shm_offset: int
    length: int
    flags: int
