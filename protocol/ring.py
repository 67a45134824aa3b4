"""Life of a ring, as a table. What the ring holds and who works on it is not here.

Section "Ring states": started and enabled are two independent facts, both false at first. The table gives, for each
event, what becomes of each; None leaves it as it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final


class RingEvent(Enum):
    """What happens to a ring."""

    KICK = "a kick was seen, by descriptor or in band"
    POLL = "SET_VRING_KICK without a descriptor"
    STOP = "GET_VRING_BASE, or SET_STATUS 0"
    ENABLE = "SET_VRING_ENABLE 1, or SET_FEATURES without PROTOCOL_FEATURES"
    DISABLE = "SET_VRING_ENABLE 0, or RESET_OWNER"
    RESET = "RESET_DEVICE"


RING: Final[Mapping[RingEvent, tuple[bool | None, bool | None]]] = {
    #                  started, enabled
    RingEvent.KICK: (True, None),
    # Nobody will kick a polled ring, so it starts at once.
    RingEvent.POLL: (True, None),
    RingEvent.STOP: (False, None),
    RingEvent.ENABLE: (None, True),
    RingEvent.DISABLE: (None, False),
    # "Reset all internal device state to the initial state": for a ring that is stopped and disabled.
    RingEvent.RESET: (False, False),
}


@dataclass(slots=True)
class Ring:
    """State of one ring. started and enabled are changed by `apply` alone."""

    started: bool = False
    enabled: bool = False

    @property
    def runs(self) -> bool:
        """Are its requests to be executed? A ring that is started and disabled must have no side effects."""
        return self.started and self.enabled

    def apply(self, event: RingEvent) -> None:
        """Let `event` happen."""
        started, enabled = RING[event]
        if started is not None:
            self.started = started
        if enabled is not None:
            self.enabled = enabled
