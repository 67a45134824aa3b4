"""A broken back-end: leaves postcopy at POSTCOPY_END and says nothing.

QEMU waits for the answer, and its migration hangs when everything has arrived.

Verdict: end-not-answered.
"""

from typing import Any

from vhostuser.protocol import BackendSession, FrontendRequest, Outgoing
from vhostuser.tools.blk import main

right = BackendSession.finish


def finish(session: BackendSession, request: Any, outcome: Any = None) -> Outgoing | None:
    outgoing = right(session, request, outcome)
    return None if request.code is FrontendRequest.POSTCOPY_END else outgoing


BackendSession.finish = finish  # type: ignore[method-assign]
main()
