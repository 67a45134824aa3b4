"""A broken back-end: closes the connection in the middle of postcopy and listens for the next front-end.

Verdict: died.
"""

import asyncio

from vhostuser.connection import HANDLERS, Connection
from vhostuser.protocol import FrontendRequest, Request
from vhostuser.tools.blk import main
from vhostuser.uffd import TouchPool

right = Connection._postcopy_ack
ENOUGH, LOOK_AGAIN = 8, 0.005


async def acknowledged(connection: Connection, request: Request) -> None:
    await right(connection, request)
    pool = connection._regions.touch
    assert pool is not None
    look(connection, pool, pool.stats().waited + ENOUGH)


def look(connection: Connection, pool: TouchPool, enough: int) -> None:
    if pool.stats().waited >= enough:
        connection._channel.end()
    else:
        asyncio.get_running_loop().call_later(LOOK_AGAIN, look, connection, pool, enough)


HANDLERS[FrontendRequest.POSTCOPY_ACK] = acknowledged
main()
