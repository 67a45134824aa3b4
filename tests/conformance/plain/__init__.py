"""A second data path for our disk and our network interface, in plain Python: slow, small, every step of it a method
that can be overridden.

What belongs here: what the native data path does, written again as a reader of the specification would begin.
What does not: faults, each of which is an override of a step (``tests.conformance.broken``).

It serves where pages are present, and takes the place of the native queue, engine and in-flight region. Guest memory is
still touched through C, so that a file that shrinks raises instead of ending the process.
"""

from __future__ import annotations

from typing import Any

from tests.conformance.plain.disk import Disk
from tests.conformance.plain.inflight import Inflight, InflightQueue
from tests.conformance.plain.net import Discard, Interface, Loop
from tests.conformance.plain.queue import Queue
from vhostuser import connection
from vhostuser.devices import blk, net
from vhostuser.protocol import VirtioFeature
from vhostuser.tools import network
from vhostuser.virtqueue import InflightRegion, RingSetup

__all__ = ["Disk", "InflightQueue", "Interface", "Loop", "Queue", "install", "override"]


def install() -> None:
    """Has this process serve its rings by this data path."""

    def opened(setup: RingSetup, memory: Any, *, log: Any = None, inflight: Any = None, iotlb: None = None) -> Queue:
        return Queue(setup, memory, log, inflight)

    # It serves rings whose addresses need no translation.
    connection.TRANSPORT_FEATURES &= ~VirtioFeature.ACCESS_PLATFORM.mask
    RingSetup.open = opened  # type: ignore[method-assign,assignment]
    blk.BlkEngine = Disk  # type: ignore[misc,assignment]
    net.NetEngine = Interface  # type: ignore[misc,assignment]
    net._Discard = Discard  # type: ignore[misc,assignment]
    network._interfaces = lambda options, sockets: [net.Net(Loop(options.queue_pairs)) for _ in sockets]
    InflightRegion.map = Inflight.map  # type: ignore[method-assign,assignment]


def override(owner: type, **steps: Any) -> None:
    """Installs it with these steps of one of its classes done in another way, for as long as this process lives."""
    install()
    for name, step in steps.items():
        assert hasattr(owner, name), f"{owner.__name__} has no step {name}"
        setattr(owner, name, step)
