"""A back-end and a front-end in one process, connected by a socket pair.

What belongs here: bringing both up and down together. What does not: what is tested; fixtures (``plugin``).

Both live on the test's loop. Requests of the device run on its own data thread, or in C; so a test may look at guest
memory on the loop as long as no page of it is missing.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from vhostuser.backend import Backend
from vhostuser.device import Device
from vhostuser.drivers.plain import Plain
from vhostuser.frontend import DRIVABLE, Frontend, FrontendRing, SharedMemory

MIB = 1 << 20
RING_BYTES = 64 * 1024
"""Of guest memory for each ring: they lie one behind the other from guest address 0."""
BUFFERS = 2 * MIB
"""Guest address of the buffers of ``Pair.ask``; those of each ring take twice ``RING_BYTES``."""


class Pair:
    """Both ends of a connection. Owns what ``set_up`` makes: ``memory`` and ``rings``, with their drivers' queues.

    serving: the task in which the back-end serves this front-end.
    """

    def __init__(self, backend: Backend, frontend: Frontend, serving: asyncio.Task[None]) -> None:
        self.backend = backend
        self.frontend = frontend
        self.serving = serving
        self.memory: SharedMemory | None = None
        self.rings: list[FrontendRing] = []
        self._asking: dict[int, Plain] = {}

    async def set_up(
        self,
        *,
        rings: int = 1,
        size: int = 64,
        indirect: bool = False,
        features: int = DRIVABLE,
        memory: SharedMemory | None = None,
        enable: bool = True,
    ) -> None:
        """Negotiates what is offered of ``features``, shares memory and starts rings of ``size`` entries.

        memory: 4 MiB at guest address 0 if there is none given; it is closed with the pair. enable: the rings too.
        """
        self.memory = memory or SharedMemory((0, 4 * MIB))
        await self.frontend.negotiate(features)
        await self.frontend.set_memory(self.memory)
        for index in range(rings):
            ring = self.add_ring(index, size=size, indirect=indirect)
            await self.frontend.start_ring(ring, self.memory, enable=enable)
        await self.frontend.driver_ok()

    def add_ring(self, index: int, *, size: int = 64, indirect: bool = False) -> FrontendRing:
        """A driver's ring in the memory, with the event index and in the format that were negotiated. The back-end is
        not told."""
        assert self.memory is not None
        ring = self.frontend.new_ring(index, self.memory, index * RING_BYTES, size=size, indirect=indirect)
        self.rings.append(ring)
        return ring

    async def ask(self, data: bytes = b"", room: int = 0, *, ring: int = 0) -> bytes:
        """One request on a ring of ``set_up``: up to 4 KiB of ``data``, room for up to 4 KiB; what the device wrote.

        For devices whose requests are bytes; any number of tasks may call it. As ``Plain.ask``.
        """
        if ring not in self._asking:
            self._asking[ring] = Plain(self.rings[ring], BUFFERS + 2 * RING_BYTES * ring, slots=16, most=4096)
        return await self._asking[ring].ask(data, room)

    async def close(self) -> None:
        """Disconnects and waits until the back-end has cleaned up. Again: nothing."""
        self.frontend.close()
        done, _ = await asyncio.wait((self.serving,), timeout=10)
        assert done, "the back-end does not end"
        assert self.serving.cancelled() or self.serving.exception() is None
        self._asking.clear()
        while self.rings:
            self.rings.pop().close()
        if self.memory is not None:
            self.memory.close()


def connect(device: Device | Callable[[], Device], **options: object) -> Pair:
    """A pair for this device; ``options`` are the Backend's. The caller closes it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    backend = Backend(device, **options)  # type: ignore[arg-type]
    return Pair(backend, Frontend(ours), asyncio.ensure_future(backend.serve(theirs, "test")))
