"""A broken back-end: after it has answered the table with its own addresses, it takes those of rings for its own, too.

It overwrites the front-end's addresses in its copy of the table to make the answer, and finds rings nowhere afterwards.
Where it has mapped memory at the front-end's own address nobody notices, so this one has not.

Verdict: set-up-failed.
"""

from typing import Any

from vhostuser.connection import HANDLERS, Connection
from vhostuser.memory import Region
from vhostuser.protocol import FrontendRequest, Postcopy, Request, RequestRefused, VringAddress
from vhostuser.tools.blk import main

right_map = Region.map.__func__  # type: ignore[attr-defined]
right = HANDLERS[FrontendRequest.SET_VRING_ADDR]


def anywhere(kind: type[Region], *arguments: Any, at_user: bool = False, **settings: Any) -> Region:
    return right_map(kind, *arguments, **settings)  # type: ignore[no-any-return]


async def set_vring_addr(connection: Connection, request: Request) -> None:
    assert isinstance(request.payload, VringAddress)
    address, regions = request.payload.desc, connection.memory.regions
    found = any(region.host <= address < region.host + region.size for region in regions)
    if connection.postcopy is not Postcopy.IDLE and not found:
        raise RequestRefused(f"there is no ring at {address:#x}")
    await right(connection, request)


Region.map = classmethod(anywhere)  # type: ignore[assignment,method-assign]
HANDLERS[FrontendRequest.SET_VRING_ADDR] = set_vring_addr
main()
