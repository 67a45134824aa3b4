"""Payloads: bytes as the specification draws them, and back again."""

import struct

import construct as c
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.protocol.samples import PAYLOADS, SAMPLES
from vhostuser.protocol import (
    HEADER_SIZE,
    U64,
    Config,
    CryptoSession,
    DeviceStateReply,
    Header,
    Inflight,
    Iotlb,
    LocalProtocolError,
    Log,
    MemoryRegion,
    MemoryTable,
    MmapMsg,
    Payload,
    PostcopyAck,
    SingleRegion,
    Uuid,
    VringAddress,
    VringArea,
    VringFd,
    VringState,
    encode,
)

KINDS = sorted(PAYLOADS, key=lambda kind: kind.__name__)
by_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


@by_kind
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_a_payload_reads_back_what_it_wrote(kind: type[Payload], data: st.DataObject) -> None:
    payload = data.draw(PAYLOADS[kind])
    packed = payload.pack()
    assert len(packed) in kind.sizes
    assert kind.unpack(packed) == payload


WIRE = [
    (U64(0x0102), "=Q", (0x0102,)),
    (VringState(3, 256), "=II", (3, 256)),
    (VringAddress(1, 1, 2, 3, 4, 5), "=IIQQQQ", (1, 1, 2, 3, 4, 5)),
    (VringFd(7), "=Q", (7,)),
    (VringFd(7, has_fd=False), "=Q", (0x107,)),
    (Log(4096, 8), "=QQ", (4096, 8)),
    (SingleRegion(MemoryRegion(1, 2, 3, 4)), "=8xQQQQ", (1, 2, 3, 4)),
    (MemoryTable(()), "=I4x", (0,)),
    (MemoryTable((MemoryRegion(1, 2, 3, 4),)), "=I4xQQQQ", (1, 1, 2, 3, 4)),
    (Iotlb(1, 2, 3, 3, 2), "=QQQBB6x", (1, 2, 3, 3, 2)),
    (Inflight(1, 2, 3, 4), "=QQHH4x", (1, 2, 3, 4)),
    (Config(1, 2, 0, b"ab"), "=III2s", (1, 2, 0, b"ab")),
    (VringArea(2, 4096, 1), "=QQQ", (2, 4096, 1)),
    (VringArea(2, 4096, 1, has_fd=False), "=QQQ", (0x102, 4096, 1)),
    (Uuid(bytes(range(16))), "=16s", (bytes(range(16)),)),
    (DeviceStateReply(5), "=Q", (0x105,)),
    (DeviceStateReply(0, has_fd=True), "=Q", (0,)),
    (CryptoSession(1, b"xy", -1), "=Q2sq", (1, b"xy", -1)),
    (MmapMsg(1, 2, 3, 4, 5), "=B7xQQQQ", (1, 2, 3, 4, 5)),
    (PostcopyAck(), "=Q", (0,)),
    (PostcopyAck(empty=True), "=", ()),
]


@pytest.mark.parametrize(("payload", "layout", "values"), WIRE, ids=lambda value: str(value)[:40])
def test_the_wire_has_the_layout_of_the_specification(payload: Payload, layout: str, values: tuple[int, ...]) -> None:
    assert payload.pack() == struct.pack(layout, *values)


@pytest.mark.parametrize(
    ("kind", "size"),
    [(Inflight, 24), (Iotlb, 32), (SingleRegion, 40), (VringAddress, 40), (VringArea, 24), (Log, 16)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_odd_sizes_that_peers_compare_exactly(kind: type[Payload], size: int) -> None:
    assert list(kind.sizes) == [size]


def test_struct_and_construct_agree_where_struct_is_used_for_speed() -> None:
    header = c.Struct("request" / c.Int32un, "flags" / c.Int32un, "size" / c.Int32un, c.Terminated)
    state = c.Struct("index" / c.Int32un, "num" / c.Int32un, c.Terminated)
    assert len(Header(5, 9, 40).pack()) == HEADER_SIZE
    assert header.build({"request": 5, "flags": 9, "size": 40}) == Header(5, 9, 40).pack()
    assert state.build({"index": 3, "num": 1 << 31}) == VringState(3, 1 << 31).pack()
    assert c.Int64un.build(1 << 63) == U64(1 << 63).pack()


@by_kind
def test_bytes_of_another_size_are_rejected(kind: type[Payload]) -> None:
    """The size is judged before; this is the second line of defence for the layouts of construct."""
    packed = SAMPLES[kind].pack()
    if hasattr(kind, "layout") and kind is not CryptoSession:
        for wrong in (packed[:-1], packed + b"\0"):
            with pytest.raises(ValueError, match=r"."):
                kind.unpack(wrong)


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (VringFd, struct.pack("=Q", 0x200)),
        (VringFd, struct.pack("=Q", 1 << 63)),
        (VringArea, struct.pack("=QQQ", 0x200, 1, 1)),
        (DeviceStateReply, struct.pack("=Q", 1)),
        (MemoryTable, struct.pack("=I4x", 1)),
        (MemoryTable, struct.pack("=I4xQQQQ", 0, 1, 2, 3, 4)),
        (MemoryTable, struct.pack("=I4xQQQQ", 0xFFFFFFFF, 1, 2, 3, 4)),
        (Config, struct.pack("=III2s", 0, 3, 0, b"ab")),
        (Config, struct.pack("=III2s", 0, 0xFFFFFFFF, 0, b"ab")),
        (PostcopyAck, struct.pack("=Q", 1)),
    ],
)
def test_content_that_contradicts_itself_is_rejected(kind: type[Payload], data: bytes) -> None:
    assert len(data) in kind.sizes
    with pytest.raises(ValueError, match=r"."):
        kind.unpack(data)


@pytest.mark.parametrize(
    "payload",
    [
        U64(1 << 64),
        U64(-1),
        VringState(1 << 32, 0),
        VringState(0, -1),
        VringFd(256),
        VringArea(256, 0, 0),
        VringArea(0, 1 << 64, 0),
        Log(1 << 64, 0),
        SingleRegion(MemoryRegion(0, 1 << 64, 0, 0)),
        MemoryTable((MemoryRegion(0, 1, 0, 0),) * 9),
        MemoryTable((MemoryRegion(0, -1, 0, 0),)),
        Config(0, 5, 0, b"four"),
        Config(0, 257, 0, bytes(257)),
        CryptoSession(0, bytes(2033), 0),
        CryptoSession(0, b"", 1 << 63),
        Inflight(0, 0, 1 << 16, 0),
    ],
    ids=lambda payload: repr(payload)[:40],
)
def test_values_that_do_not_fit_are_the_callers_fault(payload: Payload) -> None:
    with pytest.raises(LocalProtocolError) as caught:
        encode(1, 1, payload)
    assert "\n" not in str(caught.value)
