"""A broken back-end: answers POSTCOPY_ADVISE with its userfaultfd twice.

The front-end can know neither which one counts nor that they are the same.

Verdict: advise-descriptor.
"""

from typing import Any

from vhostuser.protocol import BackendSession, FrontendRequest, Outgoing
from vhostuser.tools.blk import main

right = BackendSession.finish


def finish(session: BackendSession, request: Any, outcome: Any = None) -> Outgoing | None:
    outgoing = right(session, request, outcome)
    if outgoing is not None and request.code is FrontendRequest.POSTCOPY_ADVISE:
        return Outgoing(outgoing.data, outgoing.fds * 2)
    return outgoing


BackendSession.finish = finish  # type: ignore[method-assign]
main()
