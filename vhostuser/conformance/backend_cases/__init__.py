"""The cases for back-ends, in the order in which a connection meets the rules.

What belongs here: the list. A module holds a theme's cases; a case is written as the sentence that it tries.
"""

from __future__ import annotations

from vhostuser.conformance.backend_cases import (
    backend_channel,
    bases,
    config,
    device_state,
    dirty_log,
    endian,
    framing,
    generic,
    hooks,
    hostile,
    in_flight,
    inband,
    iommu,
    memory,
    negotiation,
    net_migration,
    net_receive,
    net_rings,
    net_told,
    net_transmit,
    packed,
    personas,
    postcopy,
    recovery,
    reply_ack,
    requests,
    ring_state,
    rings,
    status,
)
from vhostuser.conformance.backend_cases.twins import twins
from vhostuser.conformance.peer import Peer
from vhostuser.conformance.suite import Case

_THEMES = (
    framing.CASES,
    negotiation.CASES,
    reply_ack.CASES,
    generic.CASES,
    ring_state.CASES,
    rings.SETUP,
    rings.KICK,
    rings.CALL,
    bases.CASES,
    endian.CASES,
    requests.SPLIT,
    packed.CASES,
    requests.BLK,
    hostile.CASES,
    hostile.ADDRESS,
    memory.TABLE,
    memory.SLOTS,
    dirty_log.CASES,
    config.CASES,
    net_transmit.CASES,
    net_receive.CASES,
    net_rings.CASES,
    net_migration.CASES,
    net_told.CASES,
    recovery.CASES,
    in_flight.BOTH,
    in_flight.LEFT,
    in_flight.OFFER,
    device_state.CASES,
    status.CASES,
    status.RESET,
    backend_channel.CASES,
    iommu.CASES,
    inband.CASES,
    hooks.NOTIFIER,
    hooks.SHMEM,
    hooks.OBJECTS,
    hooks.CRYPTO,
    hooks.GPU,
    hooks.GPA,
    postcopy.CASES,
    personas.CASES,
)

_ON_RINGS = (
    ring_state.CASES,
    rings.SETUP,
    rings.KICK,
    rings.CALL,
    bases.CASES,
    requests.SPLIT,
    hostile.CASES,
    hostile.ADDRESS,
    memory.TABLE,
    memory.SLOTS,
    dirty_log.CASES,
    net_transmit.CASES,
    net_receive.CASES,
    net_rings.CASES,
    net_migration.CASES,
    in_flight.BOTH,
    in_flight.LEFT,
)

CASES: list[Case[Peer]] = [case for theme in _THEMES for case in theme.cases] + twins(*_ON_RINGS)
"""Every case; ids are unique."""
