"""A broken back-end: does what POSTCOPY_LISTEN asks for and says nothing.

Without REPLY_ACK no other request is acknowledged, so this one is easily forgotten; the front-end waits for it always.

Verdict: listen-not-acked.
"""

from typing import Any

from vhostuser.protocol import BackendSession, FrontendRequest, Outgoing
from vhostuser.tools.blk import main

right = BackendSession.finish


def finish(session: BackendSession, request: Any, outcome: Any = None) -> Outgoing | None:
    outgoing = right(session, request, outcome)
    return None if request.code is FrontendRequest.POSTCOPY_LISTEN else outgoing


BackendSession.finish = finish  # type: ignore[method-assign]
main()
