"""The cases for back-ends, in the order in which a connection meets the rules.

What belongs here: the list. A module holds a theme's cases; a case is written as the sentence that it tries.
"""

from __future__ import annotations

from vhostuser.conformance.backend_cases import framing, negotiation, reply_ack, ring_state
from vhostuser.conformance.peer import Peer
from vhostuser.conformance.suite import Case

CASES: list[Case[Peer]] = [
    case
    for theme in (
        framing.CASES,
        negotiation.CASES,
        reply_ack.CASES,
        ring_state.CASES,
    )
    for case in theme.cases
]
"""Every case; ids are unique."""
