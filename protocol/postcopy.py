"""The postcopy handshake, as a table: state and message give the next state and what the back-end has to do.

Both ends follow the same table, since the same messages move both. What an effect consists of (userfaultfd, mappings)
is the runtime's business. Sections VHOST_USER_POSTCOPY_ADVISE, _LISTEN, _END and the notes of VHOST_USER_SET_MEM_TABLE;
beyond the text:

- QEMU sends ADVISE, LISTEN and END once per queue pair on one connection, so all three may be repeated.
- A migration that ends in precopy after ADVISE says nothing more; ordinary memory tables then go on in ADVISED.
- With CONFIGURE_MEM_SLOTS QEMU sends one ADD_MEM_REG per region, each answered with its base, and a single
  acknowledgement with the last message's id; with nothing to add or remove the id is 0. A guest that reboots causes one
  more.
"""

from collections.abc import Mapping
from enum import Enum
from typing import Final, NamedTuple

from vhostuser.protocol.codes import FrontendRequest as F


class Postcopy(Enum):
    """Where the handshake stands."""

    IDLE = "no postcopy"
    ADVISED = "the userfaultfd is with the front-end, memory is still complete"
    LISTENING = "memory may have holes, and every region is registered"
    AWAITING_ACK = "bases were sent; the front-end does not know them yet, so nothing new may be touched"


class Effect(Enum):
    """What the back-end does before the message is answered."""

    NOTHING = "nothing beyond what the message says by itself"
    OPEN = "open a userfaultfd, or take the one that is open, and reply with it"
    LISTEN = "refuse if regions are mapped; from here memory has holes"
    MAP = "map the new regions without touching them, reply with our addresses"
    RELEASE = "release whoever waits in the region, then unmap it"
    REGISTER = "register the new regions; their rings may run"
    END = "unregister, close the userfaultfd"
    REVOKE = "make all regions inaccessible, then close the userfaultfd"


class Step(NamedTuple):
    """A cell of the table."""

    next: Postcopy
    effect: Effect


LOST: Final = None
"""Stands for a message in the table: the connection to the front-end is gone."""

_IDLE, _ADVISED, _LISTENING, _AWAITING = Postcopy

HANDSHAKE: Final[Mapping[Postcopy, Mapping[F | None, Step]]] = {
    _IDLE: {
        F.POSTCOPY_ADVISE: Step(_ADVISED, Effect.OPEN),
        F.SET_MEM_TABLE: Step(_IDLE, Effect.NOTHING),
        F.ADD_MEM_REG: Step(_IDLE, Effect.NOTHING),
        F.REM_MEM_REG: Step(_IDLE, Effect.NOTHING),
        F.POSTCOPY_END: Step(_IDLE, Effect.END),
        LOST: Step(_IDLE, Effect.NOTHING),
    },
    _ADVISED: {
        F.POSTCOPY_ADVISE: Step(_ADVISED, Effect.OPEN),
        F.SET_MEM_TABLE: Step(_ADVISED, Effect.NOTHING),
        F.ADD_MEM_REG: Step(_ADVISED, Effect.NOTHING),
        F.REM_MEM_REG: Step(_ADVISED, Effect.NOTHING),
        F.POSTCOPY_LISTEN: Step(_LISTENING, Effect.LISTEN),
        F.POSTCOPY_END: Step(_IDLE, Effect.END),
        LOST: Step(_IDLE, Effect.REVOKE),
    },
    _LISTENING: {
        F.POSTCOPY_ADVISE: Step(_LISTENING, Effect.OPEN),
        F.POSTCOPY_LISTEN: Step(_LISTENING, Effect.NOTHING),
        F.SET_MEM_TABLE: Step(_AWAITING, Effect.MAP),
        F.ADD_MEM_REG: Step(_AWAITING, Effect.MAP),
        F.REM_MEM_REG: Step(_AWAITING, Effect.RELEASE),
        F.POSTCOPY_ACK: Step(_LISTENING, Effect.NOTHING),
        F.POSTCOPY_END: Step(_IDLE, Effect.END),
        LOST: Step(_IDLE, Effect.REVOKE),
    },
    _AWAITING: {
        F.POSTCOPY_ADVISE: Step(_AWAITING, Effect.OPEN),
        F.POSTCOPY_LISTEN: Step(_AWAITING, Effect.NOTHING),
        F.SET_MEM_TABLE: Step(_AWAITING, Effect.MAP),
        F.ADD_MEM_REG: Step(_AWAITING, Effect.MAP),
        F.REM_MEM_REG: Step(_AWAITING, Effect.RELEASE),
        F.POSTCOPY_ACK: Step(_LISTENING, Effect.REGISTER),
        F.POSTCOPY_END: Step(_IDLE, Effect.END),
        LOST: Step(_IDLE, Effect.REVOKE),
    },
}

INPUTS: Final = frozenset(HANDSHAKE[_AWAITING])
"""Every message, and LOST, that the table speaks of. In a state whose row leaves it out, it is not allowed."""

EXCHANGING_BASES: Final = frozenset({_LISTENING, _AWAITING})
"""States in which a memory message is answered with the back-end's bases and an acknowledgement may come."""

ACK_IDS: Final = frozenset({0, F.SET_MEM_TABLE, F.ADD_MEM_REG, F.REM_MEM_REG})
"""Request ids under which an acknowledgement is sent."""
