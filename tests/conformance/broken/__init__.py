"""Disks and network interfaces with one fault each, for the suite to find.

``python -m tests.conformance.broken NAME --socket-path=...`` starts one.

What belongs here: the list. A module holds the faults of a theme; each is our own device with one thing patched, and
right in everything else, and says which cases must fail.
"""

from tests.conformance.broken import (  # noqa: F401  (each adds its faults to the registry)
    channel,
    config,
    crashes,
    dirty_pages,
    endian,
    everything,
    framing,
    hooks,
    hostile,
    in_flight,
    inband,
    inflight,
    iommu,
    log,
    maps,
    messages,
    negotiation,
    net_buffers,
    net_frames,
    net_rings,
    net_told,
    notifications,
    packed_rings,
    personas,
    postcopy,
    reply_ack,
    requests,
    ring_states,
    setting_up,
    slots,
    split_rings,
    state,
    status,
)
from tests.conformance.broken.registry import FAULTS, Fault

__all__ = ["FAULTS", "Fault"]
