"""Front-ends with one fault each, for the suite to find.

What belongs here: the list, by name. A module holds a group of them. Each is the front-end of ``frontends`` with one
thing changed, and right in everything else; it says which cases must fail.
"""

from __future__ import annotations

from tests.conformance.broken_frontends import answers, channel, device, memory, messages, rings, services
from tests.conformance.broken_frontends.faults import FAULTS

__all__ = ["FAULTS", "answers", "channel", "device", "memory", "messages", "rings", "services"]
