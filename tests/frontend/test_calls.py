"""Every row of the catalog has its typed call, which sends that very message and reads that answer."""

import asyncio
import os
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, NamedTuple
from uuid import UUID

import pytest

from tests.protocol.samples import ALL_PROTOCOL, ALL_VIRTIO
from vhostuser.frontend import Frontend, InflightBuffer, SharedLog, SharedMemory
from vhostuser.protocol import (
    FRONTEND,
    U64,
    Config,
    ConfigFlags,
    CryptoSession,
    DeviceStateReply,
    DeviceStateTransfer,
    Empty,
    Inflight,
    Iotlb,
    IotlbType,
    Log,
    MemoryTable,
    Payload,
    PostcopyAck,
    ProtocolFeature,
    RequestRefused,
    ShmemConfig,
    SingleRegion,
    TransferDirection,
    Uuid,
    VringAddress,
    VringEndian,
    VringFd,
    VringState,
)
from vhostuser.protocol import FrontendRequest as F
from vhostuser.testing.peer import Answer, Expect, ScriptedPeer

PAGE = 4096
UUID_1 = UUID(int=1)
IOTLB = Iotlb(0, PAGE, 1 << 40, 3, IotlbType.UPDATE)
INFLIGHT = Inflight(128, 0, 1, 4)
NOTHING = object()


class Things:
    """What calls are given. A descriptor stands for any."""

    def __init__(self) -> None:
        self.memory = SharedMemory((0, PAGE), (1 << 30, 2 * PAGE))
        self.region = self.memory.regions[1]
        self.log = SharedLog(self.memory.end)
        self.fd = os.open("/dev/null", os.O_RDWR)

    def close(self) -> None:
        self.memory.close()
        self.log.close()
        os.close(self.fd)


@pytest.fixture
def things(ends: object) -> Iterator[Things]:
    things = Things()
    yield things
    things.close()


class Call(NamedTuple):
    """A call and the messages it stands for. reply: None: an acknowledgement. result: NOTHING: a new descriptor."""

    make: Callable[[Frontend, Things], Coroutine[Any, Any, object]]
    payload: Payload | Callable[[Things], Payload] = Empty()
    reply: Payload | None = None
    result: object = None
    fds: int = 0
    reply_fds: int = 0


def _table(things: Things) -> Payload:
    return MemoryTable(tuple(region.describe() for region in things.memory.regions))


def _single(things: Things) -> Payload:
    return SingleRegion(things.region.describe())


CALLS: dict[F, Call] = {
    F.GET_FEATURES: Call(lambda f, t: f.get_features(), reply=U64(5), result=5),
    F.SET_FEATURES: Call(lambda f, t: f.set_features(1 << 30), U64(1 << 30)),
    F.SET_OWNER: Call(lambda f, t: f.set_owner()),
    F.RESET_OWNER: Call(lambda f, t: f.reset_owner()),
    F.SET_MEM_TABLE: Call(lambda f, t: f.set_mem_table(t.memory), _table, fds=2, result=()),
    F.SET_LOG_BASE: Call(lambda f, t: f.set_log_base(t.log), Log(64 * 1024 // 2 + 8, 0), U64(0), fds=1),
    F.SET_LOG_FD: Call(lambda f, t: f.set_log_fd(t.fd), fds=1),
    F.SET_VRING_NUM: Call(lambda f, t: f.set_vring_num(1, 256), VringState(1, 256)),
    F.SET_VRING_ADDR: Call(
        lambda f, t: f.set_vring_addr(1, desc=2, avail=3, used=4, log=5), VringAddress(1, 1, 2, 4, 3, 5)
    ),
    F.SET_VRING_BASE: Call(lambda f, t: f.set_vring_base(1, 7), VringState(1, 7)),
    F.GET_VRING_BASE: Call(lambda f, t: f.get_vring_base(1), VringState(1), VringState(1, 9), 9),
    F.SET_VRING_KICK: Call(lambda f, t: f.set_vring_kick(1, t.fd), VringFd(1), fds=1),
    F.SET_VRING_CALL: Call(lambda f, t: f.set_vring_call(1, None), VringFd(1, has_fd=False)),
    F.SET_VRING_ERR: Call(lambda f, t: f.set_vring_err(1, t.fd), VringFd(1), fds=1),
    F.GET_PROTOCOL_FEATURES: Call(lambda f, t: f.get_protocol_features(), reply=U64(5), result=5),
    F.SET_PROTOCOL_FEATURES: Call(lambda f, t: f.set_protocol_features(8), U64(8)),
    F.GET_QUEUE_NUM: Call(lambda f, t: f.get_queue_num(), reply=U64(5), result=5),
    F.SET_VRING_ENABLE: Call(lambda f, t: f.set_vring_enable(1, False), VringState(1, 0)),
    F.SEND_RARP: Call(lambda f, t: f.send_rarp(bytes(range(6))), U64(0x050403020100)),
    F.NET_SET_MTU: Call(lambda f, t: f.net_set_mtu(1500), U64(1500)),
    F.SET_BACKEND_REQ_FD: Call(lambda f, t: f.set_backend_req_fd(t.fd), fds=1),
    F.IOTLB_MSG: Call(lambda f, t: f.iotlb_msg(IOTLB), IOTLB, U64(0)),
    F.SET_VRING_ENDIAN: Call(lambda f, t: f.set_vring_endian(1, VringEndian.LITTLE), VringState(1, 0)),
    F.GET_CONFIG: Call(lambda f, t: f.get_config(2, 4), Config(2, 4, 0, bytes(4)), Config(2, 4, 0, b"abcd"), b"abcd"),
    F.SET_CONFIG: Call(lambda f, t: f.set_config(2, b"ab", ConfigFlags.LIVE_MIGRATION), Config(2, 2, 1, b"ab")),
    F.CREATE_CRYPTO_SESSION: Call(
        lambda f, t: f.create_crypto_session(3, b"key"), CryptoSession(3, b"key"), CryptoSession(3, b"key", 6), 6
    ),
    F.CLOSE_CRYPTO_SESSION: Call(lambda f, t: f.close_crypto_session(6), U64(6)),
    F.POSTCOPY_ADVISE: Call(lambda f, t: f.postcopy_advise(), reply=Empty(), reply_fds=1, result=NOTHING),
    F.POSTCOPY_LISTEN: Call(lambda f, t: f.postcopy_listen(), reply=U64(0)),
    F.POSTCOPY_END: Call(lambda f, t: f.postcopy_end(), reply=U64(0)),
    F.POSTCOPY_ACK: Call(lambda f, t: f.postcopy_ack(), PostcopyAck()),
    F.GET_INFLIGHT_FD: Call(
        lambda f, t: _described(f.get_inflight_fd(1, 4)), Inflight(0, 0, 1, 4), INFLIGHT, INFLIGHT, reply_fds=1
    ),
    F.SET_INFLIGHT_FD: Call(lambda f, t: f.set_inflight_fd(InflightBuffer(t.fd, INFLIGHT)), INFLIGHT, fds=1),
    F.GPU_SET_SOCKET: Call(lambda f, t: f.gpu_set_socket(t.fd), fds=1),
    F.RESET_DEVICE: Call(lambda f, t: f.reset_device()),
    F.VRING_KICK: Call(lambda f, t: f.vring_kick(1), VringState(1)),
    F.GET_MAX_MEM_SLOTS: Call(lambda f, t: f.get_max_mem_slots(), reply=U64(5), result=5),
    F.ADD_MEM_REG: Call(lambda f, t: f.add_mem_reg(t.region), _single, fds=1),
    F.REM_MEM_REG: Call(lambda f, t: f.rem_mem_reg(t.region), _single),
    F.SET_STATUS: Call(lambda f, t: f.set_status(15), U64(15)),
    F.GET_STATUS: Call(lambda f, t: f.get_status(), reply=U64(15), result=15),
    F.GET_SHARED_OBJECT: Call(
        lambda f, t: f.get_shared_object(UUID_1), Uuid(UUID_1.bytes), Empty(), NOTHING, reply_fds=1
    ),
    F.SET_DEVICE_STATE_FD: Call(
        lambda f, t: f.set_device_state_fd(TransferDirection.LOAD, t.fd),
        DeviceStateTransfer(1, 0),
        DeviceStateReply(),
        fds=1,
    ),
    F.CHECK_DEVICE_STATE: Call(lambda f, t: f.check_device_state(), reply=U64(0)),
    F.GET_SHMEM_CONFIG: Call(
        lambda f, t: f.get_shmem_config(),
        reply=ShmemConfig(1, (PAGE,) + (0,) * 255),
        result=(PAGE,) + (0,) * 255,
    ),
}


async def _described(making: Coroutine[Any, Any, InflightBuffer]) -> Inflight:
    with await making as buffer:
        return buffer.description


async def negotiated(frontend: Frontend, peer: ScriptedPeer) -> None:
    """Everything is, but for the memory messages of Xen."""
    protocol = ALL_PROTOCOL & ~ProtocolFeature.XEN_MMAP.mask
    script = peer.follow(
        *(Expect(F.GET_FEATURES), Answer(U64(ALL_VIRTIO))),
        *(Expect(F.GET_PROTOCOL_FEATURES), Answer(U64(protocol))),
        Expect(F.SET_PROTOCOL_FEATURES, U64(protocol)),
        *(Expect(F.SET_OWNER, need_reply=True), Answer(U64(0))),
        *(Expect(F.SET_FEATURES, U64(ALL_VIRTIO), need_reply=True), Answer(U64(0))),
    )
    await asyncio.gather(frontend.negotiate(~0, ~0), script)


async def in_postcopy(code: F, frontend: Frontend, peer: ScriptedPeer) -> None:
    """As far as the handshake must have come for this message."""
    if code in (F.POSTCOPY_LISTEN, F.POSTCOPY_ACK):
        script = peer.follow(Expect(F.POSTCOPY_ADVISE), Answer(fds=(0,)))
        os.close((await asyncio.gather(frontend.postcopy_advise(), script))[0])
    if code is F.POSTCOPY_ACK:
        await asyncio.gather(frontend.postcopy_listen(), peer.follow(Expect(F.POSTCOPY_LISTEN), Answer(U64(0))))


def test_every_row_has_a_call_of_its_own_name() -> None:
    assert [F(code) for code in sorted(FRONTEND)] == sorted(CALLS)
    for code in CALLS:
        assert callable(getattr(Frontend, code.name.lower())), code


@pytest.mark.parametrize("code", CALLS, ids=lambda code: code.name)
async def test_a_call_sends_its_message_and_reads_its_answer(
    code: F, frontend: Frontend, peer: ScriptedPeer, things: Things
) -> None:
    call = CALLS[code]
    await negotiated(frontend, peer)
    await in_postcopy(code, frontend, peer)
    payload = call.payload if isinstance(call.payload, Payload) else call.payload(things)
    expect = Expect(0 if code is F.POSTCOPY_ACK else code, payload, fds=call.fds)
    answer = Answer(U64(0) if call.reply is None else call.reply, (things.fd,) * call.reply_fds)
    steps = (expect,) if code is F.POSTCOPY_ACK else (expect, answer)
    result, _ = await asyncio.gather(call.make(frontend, things), peer.follow(*steps))
    if call.result is NOTHING:
        assert isinstance(result, int)
        os.close(result)
    else:
        assert result == call.result


# SET_LOG_BASE has a reply of its own under LOG_SHMFD, and that cannot say no.
MUTE = (F.SET_LOG_BASE, F.POSTCOPY_ACK)
REFUSABLE = [F(code) for code, row in FRONTEND.items() if code not in MUTE and (row.refusal or not row.reply)]


@pytest.mark.parametrize("code", REFUSABLE, ids=lambda code: code.name)
async def test_a_refusal_reaches_the_caller_and_the_connection_goes_on(
    code: F, frontend: Frontend, peer: ScriptedPeer, things: Things
) -> None:
    call, row = CALLS[code], FRONTEND[code]
    await negotiated(frontend, peer)
    await in_postcopy(code, frontend, peer)
    payload = call.payload if isinstance(call.payload, Payload) else call.payload(things)
    refusal = row.refusal.make(payload) if row.refusal else U64(1)
    script = peer.follow(Expect(code), Answer(refusal))
    with pytest.raises(RequestRefused, match=code.name):
        await asyncio.gather(call.make(frontend, things), script)
    features, _ = await asyncio.gather(
        frontend.get_features(), peer.follow(Expect(F.GET_FEATURES), Answer(U64(ALL_VIRTIO)))
    )
    assert features == ALL_VIRTIO


async def test_the_kinds_of_ack_that_peers_send(frontend: Frontend, peer: ScriptedPeer) -> None:
    """QEMU takes an ack of any size; an empty one can only mean that it was done."""
    await negotiated(frontend, peer)
    await asyncio.gather(frontend.set_owner(), peer.follow(Expect(F.SET_OWNER), Answer(Empty())))


async def test_a_back_end_with_a_status_hears_when_the_rings_are_set_up(frontend: Frontend, peer: ScriptedPeer) -> None:
    """Virtio 1.3, 3.1.1: FEATURES_OK is read back before DRIVER_OK is said. Without STATUS there is no such message."""
    await frontend.driver_ok()
    await negotiated(frontend, peer)
    script = peer.follow(
        *(Expect(F.SET_STATUS, U64(0b1011)), Answer(U64(0))),
        *(Expect(F.GET_STATUS), Answer(U64(0b1011))),
        *(Expect(F.SET_STATUS, U64(0b1111)), Answer(U64(0))),
    )
    await asyncio.gather(frontend.driver_ok(), script)


async def test_features_that_the_back_end_cannot_work_with(frontend: Frontend, peer: ScriptedPeer) -> None:
    await negotiated(frontend, peer)
    script = peer.follow(Expect(F.SET_STATUS), Answer(U64(0)), Expect(F.GET_STATUS), Answer(U64(0b0011)))
    with pytest.raises(RequestRefused, match="FEATURES_OK does not stay"):
        await asyncio.gather(frontend.driver_ok(), script)


async def test_a_back_end_that_offers_no_protocol_features(frontend: Frontend, peer: ScriptedPeer) -> None:
    script = peer.follow(
        *(Expect(F.GET_FEATURES), Answer(U64(1))),
        Expect(F.SET_OWNER, need_reply=False),
        Expect(F.SET_FEATURES, U64(1), need_reply=False),
    )
    await asyncio.gather(frontend.negotiate(), script)


def test_a_mac_address_has_six_bytes() -> None:
    with pytest.raises(ValueError, match="expected 6"):
        asyncio.run(Frontend.send_rarp(None, b"12345"))  # type: ignore[arg-type]
