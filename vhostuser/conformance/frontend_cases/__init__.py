"""The cases for front-ends, in the order in which a connection meets the rules.

What belongs here: the list. A module holds a theme's cases. Most are rules about what is said, tried on what was heard
while the back-end of this suite did everything right; the others are what it does wrong on purpose.
"""

from __future__ import annotations

from vhostuser.conformance.frontend_cases import (
    answers,
    channel,
    deaths,
    device,
    framing,
    memory,
    negotiation,
    rings,
    services,
)
from vhostuser.conformance.stage import FrontendBench
from vhostuser.conformance.suite import Case

_THEMES = (
    deaths.LIFE,
    framing.FRAME,
    framing.SIZE,
    framing.FDS,
    framing.GATE,
    framing.REPLY_ACK,
    negotiation.OWNER,
    negotiation.FEATURES,
    negotiation.PROTOCOL,
    memory.CASES,
    memory.SLOTS,
    rings.CASES,
    rings.ORDER,
    rings.ADDRESS,
    rings.EVENT,
    device.CONFIG,
    device.LOG,
    device.INFLIGHT,
    device.STATUS,
    answers.CASES,
    answers.REFUSED,
    channel.CASES,
    services.NOTIFIER,
    services.SHMEM,
    services.OBJECTS,
    deaths.CASES,
)

CASES: list[Case[FrontendBench]] = [case for theme in _THEMES for case in theme.cases]
"""Every case; ids are unique."""
