"""Disks with one fault each, for the suite to find: ``python -m tests.conformance.broken NAME --socket-path=...``.

What belongs here: the list. A module holds the faults of a theme; each is our own disk with one thing patched, and
right in everything else, and says which cases must fail.
"""

from tests.conformance.broken import (  # noqa: F401  (each adds its faults to the registry)
    channel,
    config,
    dirty_pages,
    everything,
    framing,
    hostile,
    inflight,
    log,
    maps,
    messages,
    negotiation,
    personas,
    postcopy,
    reply_ack,
    rings,
    slots,
    state,
)
from tests.conformance.broken.registry import FAULTS, Fault

__all__ = ["FAULTS", "Fault"]
