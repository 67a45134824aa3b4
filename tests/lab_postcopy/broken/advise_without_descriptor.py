"""A broken back-end: answers POSTCOPY_ADVISE, but without its userfaultfd.

A runtime that sends the descriptors of a reply only with replies it knows to have some does this.

Verdict: advise-descriptor.
"""

from typing import Any

from vhostuser.protocol import BackendSession, FrontendRequest, Outgoing
from vhostuser.tools.blk import main

right = BackendSession.finish


def finish(session: BackendSession, request: Any, outcome: Any = None) -> Outgoing | None:
    outgoing = right(session, request, outcome)
    if outgoing is not None and request.code is FrontendRequest.POSTCOPY_ADVISE:
        return Outgoing(outgoing.data)
    return outgoing


BackendSession.finish = finish  # type: ignore[method-assign]
main()
