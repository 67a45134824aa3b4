"""Every request of the front-end as a typed call: one method for each row of the catalog, under the row's own name.

What belongs here: Python values in, Python values out. What does not: sizes, descriptors, features and answers of the
messages, which the catalog knows; several requests in a row (``frontend``).

Every call may raise what ``Requests.request`` raises. Descriptors that are given stay the caller's; one that is
returned is the caller's too. A message without a reply of its own is acknowledged where REPLY_ACK was negotiated;
elsewhere the call returns when the message was sent, and a refusal shows itself as a closed connection later. Where
XEN_MMAP was negotiated, memory messages need payloads of their own and go through ``request``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TypeVar
from uuid import UUID

from vhostuser.channel import Fds
from vhostuser.frontend.memory import SharedLog, SharedMemory, SharedRegion
from vhostuser.frontend.requests import Requests
from vhostuser.frontend.ring import InflightBuffer
from vhostuser.protocol import (
    U64,
    VHOST_VRING_F_LOG,
    Config,
    ConfigFlags,
    CryptoSession,
    DeviceStateReply,
    DeviceStateTransfer,
    FrontendRequest,
    Inflight,
    Iotlb,
    MemoryRegion,
    MemoryTable,
    Payload,
    PostcopyAck,
    ShmemConfig,
    SingleRegion,
    TransferDirection,
    Uuid,
    VringAddress,
    VringEndian,
    VringFd,
    VringState,
)

F = FrontendRequest
P = TypeVar("P", bound=Payload)


class Calls(Requests):
    """The typed calls. Section "Front-end message types", in the order of the ids."""

    # ---- what every call is made of

    async def _tell(self, code: F, payload: Payload | None = None, fds: Sequence[int] = ()) -> None:
        """A request whose answer says no more than yes."""
        await self.request(code, payload, fds)

    async def _ask(
        self, kind: type[P], code: F, payload: Payload | None = None, fds: Sequence[int] = ()
    ) -> tuple[P, Fds]:
        """A request with a reply of this kind."""
        reply, came = await self.request(code, payload, fds)
        assert isinstance(reply, kind), f"{code.name} has a reply of {kind.__name__} by the catalog"
        return reply, came

    async def get(self, code: F) -> int:
        """The number that a request of this code asks for."""
        reply, _ = await self._ask(U64, code)
        return reply.value

    async def _event(self, code: F, index: int, fd: int | None) -> None:
        await self._tell(code, VringFd(index, fd is not None), () if fd is None else (fd,))

    # ---- features

    async def get_features(self) -> int:
        """The virtio features that the back-end offers, as a bit mask."""
        return await self.get(F.GET_FEATURES)

    async def set_features(self, features: int) -> None:
        """Uses these of the offered virtio features."""
        await self._tell(F.SET_FEATURES, U64(features))

    async def set_owner(self) -> None:
        """Begins the session."""
        await self._tell(F.SET_OWNER)

    async def reset_owner(self) -> None:
        """Disables all rings. Deprecated by the specification."""
        await self._tell(F.RESET_OWNER)

    async def get_protocol_features(self) -> int:
        """The protocol features that the back-end offers, as a bit mask."""
        return await self.get(F.GET_PROTOCOL_FEATURES)

    async def set_protocol_features(self, features: int) -> None:
        """Uses these of the offered protocol features."""
        await self._tell(F.SET_PROTOCOL_FEATURES, U64(features))

    async def get_queue_num(self) -> int:
        """How many queues the device has at most."""
        return await self.get(F.GET_QUEUE_NUM)

    # ---- memory

    async def set_mem_table(self, memory: SharedMemory) -> tuple[MemoryRegion, ...]:
        """Makes ``memory`` the whole of guest memory.

        Between POSTCOPY_LISTEN and POSTCOPY_END the answer is returned: the same regions with the back-end's own
        addresses as ``user``, not judged. Else nothing is.
        """
        reply, _ = await self.request(F.SET_MEM_TABLE, memory.table(), memory.fds)
        return reply.regions if isinstance(reply, MemoryTable) else ()

    async def get_max_mem_slots(self) -> int:
        """How many regions the back-end takes."""
        return await self.get(F.GET_MAX_MEM_SLOTS)

    async def add_mem_reg(self, region: SharedRegion) -> MemoryRegion | None:
        """Adds a region. In postcopy the answer, as with ``set_mem_table``; else None."""
        reply, _ = await self.request(F.ADD_MEM_REG, SingleRegion(region.describe()), (region.fd,))
        return reply.region if isinstance(reply, SingleRegion) else None

    async def rem_mem_reg(self, region: SharedRegion) -> None:
        """Takes a region away. The specification leaves the descriptor out; nobody needs it."""
        await self._tell(F.REM_MEM_REG, SingleRegion(region.describe()))

    async def iotlb_msg(self, message: Iotlb) -> None:
        """Updates or invalidates a translation."""
        await self._tell(F.IOTLB_MSG, message)

    async def set_log_base(self, log: SharedLog) -> None:
        """Dirty pages are to be marked in ``log``."""
        await self._tell(F.SET_LOG_BASE, log.describe(), (log.fd,))

    async def set_log_fd(self, fd: int) -> None:
        """``fd``, an eventfd, is to be signalled when the log has changed."""
        await self._tell(F.SET_LOG_FD, None, (fd,))

    # ---- rings

    async def set_vring_num(self, index: int, size: int) -> None:
        """The ring has ``size`` entries."""
        await self._tell(F.SET_VRING_NUM, VringState(index, size))

    async def set_vring_addr(self, index: int, *, desc: int, avail: int, used: int, log: int | None = None) -> None:
        """The parts of the ring lie at these user addresses. log: the guest address at which writes to the used ring
        are marked, or None: they are not."""
        flags = 0 if log is None else VHOST_VRING_F_LOG
        await self._tell(F.SET_VRING_ADDR, VringAddress(index, flags, desc, used, avail, log or 0))

    async def set_vring_base(self, index: int, base: int) -> None:
        """The next available index to look at."""
        await self._tell(F.SET_VRING_BASE, VringState(index, base))

    async def get_vring_base(self, index: int) -> int:
        """Stops the ring; the base to go on with. It answers when the requests under way are done; where
        GET_VRING_BASE_INFLIGHT was negotiated some may be left in the in-flight buffer instead."""
        reply, _ = await self._ask(VringState, F.GET_VRING_BASE, VringState(index))
        return reply.num

    async def set_vring_kick(self, index: int, fd: int | None) -> None:
        """Where the ring's kicks arrive; None: the back-end polls, and the ring is started by this."""
        await self._event(F.SET_VRING_KICK, index, fd)

    async def set_vring_call(self, index: int, fd: int | None) -> None:
        """Where the driver is called; None: it polls."""
        await self._event(F.SET_VRING_CALL, index, fd)

    async def set_vring_err(self, index: int, fd: int | None) -> None:
        """Where a broken ring is reported."""
        await self._event(F.SET_VRING_ERR, index, fd)

    async def set_vring_enable(self, index: int, enable: bool) -> None:
        """Enables or disables the ring."""
        await self._tell(F.SET_VRING_ENABLE, VringState(index, int(enable)))

    async def set_vring_endian(self, index: int, endian: VringEndian) -> None:
        """The byte order of a legacy ring."""
        await self._tell(F.SET_VRING_ENDIAN, VringState(index, endian))

    async def vring_kick(self, index: int) -> None:
        """An in-band kick."""
        await self._tell(F.VRING_KICK, VringState(index))

    async def get_inflight_fd(self, queues: int, queue_size: int) -> InflightBuffer:
        """A fresh buffer that tracks requests in flight, which the caller closes."""
        reply, came = await self._ask(Inflight, F.GET_INFLIGHT_FD, Inflight(0, 0, queues, queue_size))
        return InflightBuffer(came.take(), reply)

    async def set_inflight_fd(self, inflight: InflightBuffer) -> None:
        """Tracks requests in ``inflight``, and does those again that it names. Before rings start."""
        await self._tell(F.SET_INFLIGHT_FD, inflight.description, (inflight.fd,))

    # ---- the device

    async def get_config(self, offset: int, size: int, flags: ConfigFlags = ConfigFlags.WRITABLE) -> bytes:
        """``size`` bytes of the configuration space from ``offset``; at most 256 at once."""
        reply, _ = await self._ask(Config, F.GET_CONFIG, Config(offset, size, flags, bytes(size)))
        return reply.data

    async def set_config(self, offset: int, data: bytes, flags: ConfigFlags = ConfigFlags.WRITABLE) -> None:
        """Writes to the configuration space."""
        await self._tell(F.SET_CONFIG, Config(offset, len(data), flags, data))

    async def reset_device(self) -> None:
        """Disables all rings and forgets the device's state."""
        await self._tell(F.RESET_DEVICE)

    async def set_status(self, status: int) -> None:
        """The virtio device status, a byte."""
        await self._tell(F.SET_STATUS, U64(status))

    async def get_status(self) -> int:
        """The virtio device status."""
        return await self.get(F.GET_STATUS)

    async def set_device_state_fd(self, direction: TransferDirection, fd: int) -> int | None:
        """Moves the device's state through ``fd``, a pipe's end; every ring must be stopped.

        Returns the descriptor that the back-end would rather use, or None.
        """
        transfer = DeviceStateTransfer(direction)
        _, came = await self._ask(DeviceStateReply, F.SET_DEVICE_STATE_FD, transfer, (fd,))
        return came.take() if came else None

    async def check_device_state(self) -> None:
        """After the last byte: raises RequestRefused unless the state arrived in full."""
        await self._tell(F.CHECK_DEVICE_STATE)

    async def get_shmem_config(self) -> tuple[int, ...]:
        """Bytes of each shared memory region, by its id; 0 where there is none."""
        reply, _ = await self._ask(ShmemConfig, F.GET_SHMEM_CONFIG)
        return reply.memory_sizes

    async def set_backend_req_fd(self, fd: int) -> None:
        """Gives the back-end a socket for its own requests; ``Frontend.serve_backend`` also answers them."""
        await self._tell(F.SET_BACKEND_REQ_FD, None, (fd,))

    # ---- kinds of devices

    async def send_rarp(self, mac: bytes) -> None:
        """Announces a MAC address of six bytes after a migration."""
        if len(mac) != 6:
            raise ValueError(f"{len(mac)} bytes of MAC address, expected 6")
        await self._tell(F.SEND_RARP, U64(int.from_bytes(mac + bytes(2), sys.byteorder)))

    async def net_set_mtu(self, mtu: int) -> None:
        """The MTU that the guest was told."""
        await self._tell(F.NET_SET_MTU, U64(mtu))

    async def create_crypto_session(self, op_code: int, parameters: bytes) -> int:
        """Opens a crypto session; its id. The layout of ``parameters`` is not in the specification."""
        reply, _ = await self._ask(CryptoSession, F.CREATE_CRYPTO_SESSION, CryptoSession(op_code, parameters))
        return reply.session_id

    async def close_crypto_session(self, session_id: int) -> None:
        """Closes a crypto session."""
        await self._tell(F.CLOSE_CRYPTO_SESSION, U64(session_id))

    async def gpu_set_socket(self, fd: int) -> None:
        """Gives the back-end a socket for the vhost-user-gpu protocol."""
        await self._tell(F.GPU_SET_SOCKET, None, (fd,))

    async def get_shared_object(self, uuid: UUID) -> int:
        """A descriptor of the dma-buf with this UUID."""
        _, came = await self.request(F.GET_SHARED_OBJECT, Uuid(uuid.bytes))
        return came.take()

    # ---- postcopy; ``postcopy`` has the whole procedure

    async def postcopy_advise(self) -> int:
        """Postcopy may follow; the back-end's userfaultfd."""
        _, came = await self.request(F.POSTCOPY_ADVISE)
        return came.take()

    async def postcopy_listen(self) -> None:
        """Postcopy begins: memory that is shared from now on has holes."""
        await self._tell(F.POSTCOPY_LISTEN)

    async def postcopy_ack(self) -> None:
        """We know the back-end's addresses: it may touch the memory. Never answered."""
        await self._tell(F.POSTCOPY_ACK, PostcopyAck())

    async def postcopy_end(self) -> None:
        """No page is missing any more."""
        await self._tell(F.POSTCOPY_END)
