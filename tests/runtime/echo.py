"""A device whose every step a test can see and hold up, and how to use its rings as a driver."""

import asyncio

from vhostuser.device import Device
from vhostuser.protocol import FrontendRequest, RequestRefused
from vhostuser.testing.pair import MIB, Pair
from vhostuser.virtqueue import Request

DATA = 2 * MIB
"""Guest address of the tests' buffers, behind the rings."""


class Echo(Device):
    """Returns every request's bytes in upper case; counts starts and stops."""

    virtio_id = 63
    queues = 2

    def __init__(self) -> None:
        self.events: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.control = asyncio.get_running_loop()
        self.entered: asyncio.Queue[bytes] = asyncio.Queue()
        self.space = bytearray(b"0123456789")

    def config(self) -> bytes:
        return bytes(self.space)

    def set_config(self, offset: int, data: bytes, *, migration: bool) -> None:
        if offset + len(data) > 4 and not migration:
            raise RequestRefused("only the first four bytes are writable")
        self.space[offset : offset + len(data)] = data

    async def start(self, features: int) -> None:
        self.data = asyncio.get_running_loop()
        self.events.append("start")

    async def stop(self) -> None:
        self.events.append("stop")

    async def handle(self, request: Request) -> None:
        text = request.read()
        self.control.call_soon_threadsafe(self.entered.put_nowait, text)
        await self.gate.wait()
        request.write(text.upper())

    def release(self) -> None:
        """Opens ``gate`` from the control loop: requests that wait in ``handle`` go on."""
        self.data.call_soon_threadsafe(self.gate.set)

    async def taken(self, text: bytes) -> None:
        """Waits on the control loop until ``handle`` has that request."""
        while await asyncio.wait_for(self.entered.get(), 5) != text:
            pass


async def ask(pair: Pair, text: bytes, ring: int = 0, *, kick: bool = True) -> int:
    """Offers one request and kicks; its head."""
    assert pair.memory is not None
    at = DATA + ring * 64 * 1024
    pair.memory.map.write(at, text)
    head = pair.rings[ring].queue.offer(readable=[(at, len(text))], writable=[(at + 4096, len(text))])
    pair.rings[ring].queue.publish()
    if kick:
        pair.rings[ring].kick()
    return head


async def answer(pair: Pair, ring: int = 0) -> bytes:
    """Waits for one used request and returns what was written."""
    assert pair.memory is not None
    used = await next_used(pair, ring)
    return pair.memory.map.read(DATA + ring * 64 * 1024 + 4096, used[1])


async def next_used(pair: Pair, ring: int = 0) -> tuple[int, int]:
    """Waits for the next used chain: its head and the bytes written."""
    return await asyncio.wait_for(pair.rings[ring].returned(), 5)


async def quiet(pair: Pair) -> None:
    """A round trip of the control thread: whatever it was going to do about earlier events is done."""
    for _ in range(3):
        await pair.frontend.get(FrontendRequest.GET_FEATURES)
        await asyncio.sleep(0)
