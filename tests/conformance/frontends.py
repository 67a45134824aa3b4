"""A front-end that does everything right, in memory, for faults to be put in (``broken_frontends``), or as a process.

What belongs here: the whole of a front-end's life, with our own ``Frontend``: it connects again when its back-end is
lost, and ends when it is asked to. What does not: faults.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from vhostuser.channel import Fds
from vhostuser.conformance.caller import Launch, Running
from vhostuser.driverqueue import DriverQueue
from vhostuser.frontend import (
    BackendServices,
    Frontend,
    FrontendRing,
    InflightBuffer,
    ObjectRegistry,
    SharedLog,
    SharedMemory,
)
from vhostuser.protocol import (
    FRONTEND,
    VERSION,
    BackendRequest,
    DeviceStatus,
    FrontendRequest,
    Header,
    Payload,
    ProtocolFeature,
    RequestRefused,
    VhostUserError,
    VirtioFeature,
)

F, P, V = FrontendRequest, ProtocolFeature, VirtioFeature

MIB = 1 << 20
RINGS, SIZE = 3, 64
WANTED = ~(V.RING_PACKED.mask | V.LOG_ALL.mask | V.ACCESS_PLATFORM.mask)
STEPS = (
    "features", "protocol_features", "queues", "slots", "owner", "channel", "read_config", "set_features", "driver",
    "write_config", "inflight", "share", "set_up", "enable", "driver_ok", "log", "hotplug",
)  # fmt: skip
"""The order of a session. What is not offered is left out by each step."""


class Crash(BaseException):
    """The process would be ended by SIGSEGV here."""


class Talk(Frontend):
    """A connection of it: with the places at which a fault may interfere."""

    life: Life

    async def request(
        self, code: F, payload: Payload | None = None, fds: Sequence[int] = (), *, need_reply: bool | None = None
    ) -> tuple[Payload | None, Fds]:
        life = self.life
        life.waiting = code
        await life.before(self, code)
        try:
            answer = await super().request(code, payload, fds, need_reply=need_reply)
        except (VhostUserError, ConnectionError) as error:
            life.waiting = None
            life.failed(code, error)
            return None, Fds()
        life.waiting, life.sent = None, code
        await life.after(self, code, payload, fds)
        return answer

    async def _send(self, data: bytes, fds: Sequence[int]) -> None:
        for piece, along in self.life.outgoing(data, fds):
            await super()._send(piece, along)

    async def _next_answer(self, code: F) -> Any:
        return await self.life.answer(self, code, super()._next_answer)

    async def raw(self, code: int, payload: Payload | bytes = b"", *fds: int, flags: int = VERSION) -> None:
        """Sends any message, and throws away what is answered to one that has an answer."""
        body = payload if isinstance(payload, bytes) else payload.pack()
        await super()._send(Header(code, flags, len(body)).pack() + body, fds)
        row = FRONTEND.get(code)
        if row is not None and self.session._state.row(row).reply:
            message = await self.receive_message()
            if message is not None:
                message.fds.close()


class Life:
    """A front-end from its start to its end; with a coroutine ``run`` that returns its exit status."""

    steps: tuple[str, ...] = STEPS

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stop = asyncio.Event()
        self.ready = False
        self.waiting: F | None = None
        self.sent: F | None = None
        self.first = True
        self.buffer: InflightBuffer | None = None
        self.talk: Talk
        self.memory: SharedMemory
        self.rings: list[FrontendRing] = []
        self._owned: contextlib.ExitStack = contextlib.ExitStack()

    # ---- what faults change

    async def before(self, talk: Talk, code: F) -> None:
        """Before a request is sent."""

    async def after(self, talk: Talk, code: F, payload: Payload | None, fds: Sequence[int]) -> None:
        """After it was answered, or sent where there is no answer."""

    def failed(self, code: F, error: Exception) -> None:
        """It was refused, or answered wrongly, or not at all."""
        raise error

    def outgoing(self, data: bytes, fds: Sequence[int]) -> list[tuple[bytes, Sequence[int]]]:
        """What is sent for a message."""
        return [(data, fds)]

    async def answer(self, talk: Talk, code: F, read: Callable[[F], Awaitable[Any]]) -> Any:
        """The next answer."""
        return await read(code)

    def asked(self) -> None:
        """SIGTERM."""
        self.stop.set()

    def lost(self) -> None:
        """The back-end has gone, and everything was set up."""

    # ---- life

    async def run(self) -> int:
        try:
            while not self.stop.is_set():
                await self._serve()
                await asyncio.sleep(0.002)
        except Crash:
            return -signal.SIGSEGV
        finally:
            if self.buffer is not None:
                self.buffer.close()
        return 0

    async def _serve(self) -> None:
        """One connection, to its end or ours."""
        try:
            self.talk = await self.connect()
        except OSError:
            return
        self.talk.life, self.talk.timeout, self.ready = self, None, False
        session = asyncio.ensure_future(self._session())
        stopping = asyncio.ensure_future(self.stop.wait())
        try:
            await asyncio.wait((session, stopping), return_when=asyncio.FIRST_COMPLETED)
            if not session.done() and self.ready:
                self.talk.timeout = 2.0
                await self._quietly(self.wind_up())
            if session.done():
                session.result()
        except (VhostUserError, OSError):
            pass
        finally:
            session.cancel()
            stopping.cancel()
            await asyncio.gather(session, stopping, return_exceptions=True)
            self.talk.close()
            self._owned.close()
            self.rings.clear()
            self.first = False

    async def connect(self) -> Talk:
        """The next connection. Raises OSError."""
        return await Talk.connect(self.path)

    async def _quietly(self, work: Awaitable[None]) -> None:
        with contextlib.suppress(VhostUserError, OSError):
            await work

    async def _session(self) -> None:
        for step in self.steps:
            await getattr(self, step)()
        self.ready = True
        channel = asyncio.ensure_future(self._listen())
        try:
            await self.talk.lost.wait()
        finally:
            channel.cancel()
        self.lost()

    async def _listen(self) -> None:
        with contextlib.suppress(EOFError, VhostUserError):
            while self.talk.backend is not None:
                event = await self.talk.backend.next()
                event.fds.close()
                if event.code is BackendRequest.CONFIG_CHANGE_MSG:
                    await self.read_config()

    async def wind_up(self) -> None:
        """Everything is stopped, in order."""
        for ring in self.rings:
            await self.talk.stop_ring(ring)
        if self.has(P.STATUS):
            await self.talk.set_status(0)
        if self.has(P.RESET_DEVICE):
            await self.talk.reset_device()

    def has(self, feature: P | V) -> bool:
        return self.talk.session.has(feature)

    # ---- steps

    async def features(self) -> None:
        self.offered = await self.talk.get_features()

    async def protocol_features(self) -> None:
        if self.offered & V.PROTOCOL_FEATURES.mask:
            await self.talk.set_protocol_features(await self.talk.get_protocol_features())

    async def queues(self) -> None:
        if self.has(P.MQ):
            await self.talk.get_queue_num()

    async def slots(self) -> None:
        self.room = await self.talk.get_max_mem_slots() if self.has(P.CONFIGURE_MEM_SLOTS) else 8

    async def owner(self) -> None:
        await self.talk.set_owner()

    async def channel(self) -> None:
        if not self.has(P.BACKEND_REQ):
            return
        sizes = await self.talk.get_shmem_config() if self.has(P.SHMEM) else ()
        self.talk.services = self.services(sizes)
        await self.talk.serve_backend(self.talk.services)

    def services(self, sizes: Sequence[int]) -> BackendServices:
        """What it does because its back-end asks for it."""
        return BackendServices(sizes, ObjectRegistry(), self.talk)

    async def read_config(self) -> None:
        if self.has(P.CONFIG):
            await self.talk.get_config(0, 8)

    async def write_config(self) -> None:
        if self.has(P.CONFIG):
            await self.talk.set_config(4, bytes(4))

    async def set_features(self) -> None:
        await self.talk.set_features(self.offered & WANTED)

    async def driver(self) -> None:
        if self.has(P.STATUS):
            await self.talk.set_status(DeviceStatus.ACKNOWLEDGE | DeviceStatus.DRIVER)
            await self.talk.set_status(await self.talk.get_status() | DeviceStatus.FEATURES_OK)

    async def inflight(self) -> None:
        if not self.has(P.INFLIGHT_SHMFD):
            return
        if self.buffer is None:
            try:
                self.buffer = await self.talk.get_inflight_fd(RINGS, SIZE)
            except RequestRefused:
                return
        await self.talk.set_inflight_fd(self.buffer)

    async def share(self) -> None:
        self.memory = SharedMemory((0, MIB), (4 * MIB, MIB))
        self._owned.callback(self.memory.close)
        await self.talk.set_memory(self.memory, by_slots=self.has(P.CONFIGURE_MEM_SLOTS))

    async def set_up(self) -> None:
        for index in range(RINGS):
            ring = FrontendRing(index, DriverQueue(self.memory.map, index << 16, SIZE))
            self._owned.callback(ring.close)
            self.rings.append(ring)
            await self.start(ring)

    async def start(self, ring: FrontendRing) -> None:
        """Sets a ring up, without enabling it."""
        await self.talk.start_ring(ring, self.memory, enable=False)

    async def enable(self) -> None:
        if self.has(V.PROTOCOL_FEATURES):
            for ring in self.rings:
                await self.talk.set_vring_enable(ring.index, True)

    async def driver_ok(self) -> None:
        if self.has(P.STATUS):
            await self.talk.set_status(await self.talk.get_status() | DeviceStatus.DRIVER_OK)

    async def log(self) -> None:
        if not self.has(P.LOG_SHMFD):
            return
        log = SharedLog(self.memory.end)
        self._owned.callback(log.close)
        await self.talk.start_log(log)
        queue, user = self.rings[0].queue, self.memory.map.guest_to_host
        await self.talk.set_vring_addr(
            0, desc=user(queue.desc), avail=user(queue.avail), used=user(queue.used), log=queue.used
        )
        await self.talk.stop_log()

    async def hotplug(self) -> None:
        if self.has(P.CONFIGURE_MEM_SLOTS) and len(self.memory.regions) < self.room:
            region = self.memory.add(8 * MIB, MIB)
            await self.talk.add_mem_reg(region)
            await self.talk.rem_mem_reg(region)
            self.memory.remove(region)


class InMemory:
    """What the suite sees of it: a ``caller.Running``."""

    def __init__(self, life: Life) -> None:
        self._life = life
        self._task = asyncio.ensure_future(life.run())

    async def wait(self) -> int:
        await asyncio.wait((self._task,))
        return -signal.SIGKILL if self._task.cancelled() else self._task.result()

    def ask(self) -> None:
        self._life.asked()

    def kill(self) -> None:
        self._task.cancel()

    def words(self) -> str:
        return ""


def in_memory(make: Callable[[Path], Life] = Life) -> Launch:
    """Starts such a front-end on this loop."""

    async def launch(path: Path, _: Path) -> Running:
        return InMemory(make(path))

    return launch


class Server(Life):
    """The same, with a back-end that connects."""

    async def connect(self) -> Talk:
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.setblocking(False)
            self.path.unlink(missing_ok=True)
            listener.bind(str(self.path))
            listener.listen()
            stopping = asyncio.ensure_future(self.stop.wait())
            accepting = asyncio.ensure_future(loop.sock_accept(listener))
            await asyncio.wait((stopping, accepting), return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            accepting.cancel()
            await asyncio.gather(stopping, accepting, return_exceptions=True)
            if accepting.cancelled():
                raise ConnectionAbortedError
            return Talk(accepting.result()[0])


async def main(kind: type[Life], path: Path) -> int:
    """As a process: until SIGTERM."""
    life = kind(path)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, life.asked)
    return await life.run()


if __name__ == "__main__":
    sys.exit(asyncio.run(main(Server if "--server" in sys.argv else Life, Path(sys.argv[1]))))
