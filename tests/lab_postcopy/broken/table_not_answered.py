"""A broken back-end: takes the memory after POSTCOPY_LISTEN and does not answer with its addresses.

As a back-end does that treats memory messages in postcopy as it always does.

Verdict: table-not-answered.
"""

from typing import Any

from vhostuser.protocol import BackendSession, FrontendRequest, Outgoing, Postcopy
from vhostuser.tools.blk import main

right = BackendSession.finish
MEMORY = (FrontendRequest.SET_MEM_TABLE, FrontendRequest.ADD_MEM_REG)


def finish(session: BackendSession, request: Any, outcome: Any = None) -> Outgoing | None:
    listening = session.postcopy in (Postcopy.LISTENING, Postcopy.AWAITING_ACK)
    outgoing = right(session, request, outcome)
    return None if listening and request.code in MEMORY else outgoing


BackendSession.finish = finish  # type: ignore[method-assign]
main()
