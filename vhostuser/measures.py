"""What the runtime counts for every device: the metrics, and how each source's numbers become samples of them.

What belongs here: the declarations, one place for names, help and units, and turning numbers into samples. What does
not: counting (C for queues and faults, ``watch`` for messages), the metrics of a device, which declares its own, the
forms in which samples are shown (``metrics``).
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from vhostuser.metrics import Distribution, Kind, Metric, Sample
from vhostuser.queuestats import QueueStats
from vhostuser.uffd import FaultStats

_QUEUE = ("queue",)
_MESSAGE = ("message",)

# ---- queues

REQUESTS = Metric(
    "vhostuser_queue_requests_total", Kind.COUNTER, "Requests that were returned to the driver.", labels=_QUEUE
)
BYTES = Metric(
    "vhostuser_queue_bytes_total",
    Kind.COUNTER,
    "Bytes of these requests that came from the driver and that were written for it, headers and status included.",
    unit="bytes",
    labels=("queue", "direction"),
)
BATCHES = Metric(
    "vhostuser_queue_batches_total",
    Kind.COUNTER,
    "Times that requests were returned, one or many.",
    labels=_QUEUE,
)
KICKS = Metric("vhostuser_queue_kicks_total", Kind.COUNTER, "Kicks of the driver's that woke us.", labels=_QUEUE)
CALLS = Metric("vhostuser_queue_calls_total", Kind.COUNTER, "Calls (interrupts) of the driver.", labels=_QUEUE)
IN_FLIGHT = Metric(
    "vhostuser_queue_in_flight", Kind.GAUGE, "Requests that were taken and are not returned yet.", labels=_QUEUE
)
OLDEST = Metric(
    "vhostuser_queue_oldest_seconds",
    Kind.GAUGE,
    "How long ago the oldest request in flight was taken; 0 if there is none.",
    unit="seconds",
    labels=_QUEUE,
    highest=True,
)
LATENCY = Metric(
    "vhostuser_queue_request_seconds",
    Kind.HISTOGRAM,
    "From taking a request off the ring to returning it.",
    unit="seconds",
    labels=_QUEUE,
)
STATE = Metric(
    "vhostuser_queue_state",
    Kind.GAUGE,
    "1 where it holds: started (kicked), enabled (SET_VRING_ENABLE), running (served now), broken.",
    labels=("queue", "state"),
)

# ---- messages

MESSAGES = Metric(
    "vhostuser_message_seconds",
    Kind.HISTOGRAM,
    "From a whole message of the front-end's to the end of its answer.",
    unit="seconds",
    labels=_MESSAGE,
)
LONGEST = Metric(
    "vhostuser_message_longest_seconds",
    Kind.GAUGE,
    "The longest of these, on the connections that there are.",
    unit="seconds",
    labels=_MESSAGE,
    highest=True,
)
REFUSED = Metric("vhostuser_message_refused_total", Kind.COUNTER, "Messages that were refused.", labels=_MESSAGE)
WAITING = Metric(
    "vhostuser_message_waiting_seconds",
    Kind.GAUGE,
    "How long the message that is being answered now has been waiting; 0 if there is none.",
    unit="seconds",
    highest=True,
)

# ---- connections and memory

CONNECTIONS = Metric("vhostuser_connections", Kind.GAUGE, "Front-ends that are connected.")
ACCEPTED = Metric("vhostuser_connections_total", Kind.COUNTER, "Front-ends that have been connected.")
CUT_OFF = Metric(
    "vhostuser_connections_cut_off_total",
    Kind.COUNTER,
    "Connections that we closed: the front-end broke the protocol, or the device failed.",
    labels=("reason",),
)
REGIONS = Metric("vhostuser_memory_regions", Kind.GAUGE, "Regions of guest memory that are mapped.")
MEMORY = Metric("vhostuser_memory_bytes", Kind.GAUGE, "Guest memory that is mapped.", unit="bytes")
UNUSABLE = Metric(
    "vhostuser_memory_unusable",
    Kind.GAUGE,
    "1 while rings may not start because a lost migration has left holes in memory.",
)

# ---- postcopy

OFFERED = Metric("vhostuser_postcopy_offered", Kind.GAUGE, "1 if postcopy is offered (PAGEFAULT).")
ACTIVE = Metric("vhostuser_postcopy_active", Kind.GAUGE, "1 while pages of guest memory may be missing.")
BLOCKED = Metric(
    "vhostuser_postcopy_blocked_seconds",
    Kind.HISTOGRAM,
    "Waits of our threads for a missing page (faults).",
    unit="seconds",
)
AHEAD = Metric(
    "vhostuser_postcopy_prefetched_pages_total",
    Kind.COUNTER,
    "Of these waits, those for pages that were asked for side by side before their request ran.",
    unit="pages",
)
LOST = Metric(
    "vhostuser_postcopy_lost_pages_total",
    Kind.COUNTER,
    "Pages that could not be had: the front-end was lost, or the file was cut off.",
    unit="pages",
)
WAKE_PEERS = Metric("vhostuser_wake_connections", Kind.GAUGE, "Front-ends on the wake channel.")
WAKES = Metric("vhostuser_wake_messages_total", Kind.COUNTER, "Messages of the wake channel.")
WOKEN = Metric("vhostuser_wake_bytes_total", Kind.COUNTER, "Guest memory that they named.", unit="bytes")

ALL = (
    *(REQUESTS, BYTES, BATCHES, KICKS, CALLS, IN_FLIGHT, OLDEST, LATENCY, STATE),
    *(MESSAGES, LONGEST, REFUSED, WAITING),
    *(CONNECTIONS, ACCEPTED, CUT_OFF, REGIONS, MEMORY, UNUSABLE),
    *(OFFERED, ACTIVE, BLOCKED, AHEAD, LOST, WAKE_PEERS, WAKES, WOKEN),
)
"""Every metric of the runtime, in the order in which they are shown."""


def of_queue(index: int, stats: QueueStats) -> Iterator[Sample]:
    """Everything but its state."""
    oldest = max(0, time.monotonic_ns() - stats.oldest) / 1e9 if stats.oldest else 0
    yield REQUESTS.sample(stats.returned, queue=index)
    yield BYTES.sample(stats.readable, queue=index, direction="from_driver")
    yield BYTES.sample(stats.written, queue=index, direction="to_driver")
    yield BATCHES.sample(stats.batches, queue=index)
    yield KICKS.sample(stats.kicks, queue=index)
    yield CALLS.sample(stats.calls, queue=index)
    yield IN_FLIGHT.sample(stats.out, queue=index)
    yield OLDEST.sample(oldest, queue=index)
    yield LATENCY.sample(Distribution.of(stats.histogram, stats.served_ns), queue=index)


def of_faults(stats: FaultStats) -> Iterator[Sample]:
    """What waiting for missing pages has cost the process."""
    yield BLOCKED.sample(Distribution.of(stats.histogram, stats.blocked_ns))
    yield AHEAD.sample(stats.ahead)
    yield LOST.sample(stats.lost)
