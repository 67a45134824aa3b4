"""The other end of a device: one request, as a guest would send it, and what comes back.

python examples/ask.py /tmp/echo.sock "hello, device"
"""

import asyncio
import sys

from vhostuser.drivers.plain import Plain
from vhostuser.frontend import Frontend, SharedMemory


async def ask(path: str, data: bytes) -> bytes:
    """What the device behind the socket says to ``data``, on its first ring."""
    with SharedMemory((0, 4 << 20)) as memory:  # the guest: 4 MiB from address 0
        async with await Frontend.connect(path) as frontend:
            await frontend.negotiate()
            await frontend.set_memory(memory)
            with frontend.new_ring(0, memory, 0) as ring:
                await frontend.start_ring(ring, memory)
                await frontend.driver_ok()
                answer = await Plain(ring, 1 << 20).ask(data, len(data))
                await frontend.stop_ring(ring)
    return answer


if __name__ == "__main__":
    print(asyncio.run(ask(sys.argv[1], sys.argv[2].encode())).decode())
