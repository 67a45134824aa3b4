"""A broken back-end: before it answers a request it reads, on its control thread, what its rings' requests refer to.

While a page of one of them is missing it answers nothing, and a front-end that serves faults on the thread that asks
would wait for ever.

Verdict: control-blocked.
"""

import contextlib
import struct
from typing import Any

from vhostuser.connection import Connection
from vhostuser.memory import GuestMemory, MemoryLost
from vhostuser.ring import Ring
from vhostuser.tools.blk import main

right = Connection._outcome
DESCRIPTOR = struct.Struct("<QIHH")


async def outcome(connection: Connection, request: Any) -> Any:
    for ring in connection.rings:
        if ring.running:
            with contextlib.suppress(LookupError, MemoryLost):  # half-written
                look(ring, connection.memory)
    return await right(connection, request)


def look(ring: Ring, memory: GuestMemory) -> None:
    """Reads every buffer that the driver has offered last."""
    assert ring.address is not None
    avail, table = memory.user_to_guest(ring.address.avail), memory.user_to_guest(ring.address.desc)
    _, index = struct.unpack("<HH", memory.read(avail, 4))
    heads = struct.unpack(f"<{ring.size}H", memory.read(avail + 4, 2 * ring.size))
    for number in range(max(0, index - ring.size), index):
        head = heads[number % ring.size]
        for _ in range(ring.size):
            guest, length, flags, head = DESCRIPTOR.unpack(memory.read(table + 16 * head, 16))
            memory.read(guest, length)
            if not flags & 1:
                break


Connection._outcome = outcome  # type: ignore[method-assign]
main()
