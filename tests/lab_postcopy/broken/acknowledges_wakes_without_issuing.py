"""A broken back-end: answers every message of the wake channel with the bytes that were asked for, and wakes nobody.

Only where the front-end wakes through the channel: its own UFFDIO_WAKE would help.

Verdict: never-woken.
"""

from collections.abc import Iterable

from vhostuser.memory import GuestMemory
from vhostuser.postcopy import Postcopy
from vhostuser.protocol.wake import WakeRange
from vhostuser.tools.blk import main


def wake(half: Postcopy, memory: GuestMemory, ranges: Iterable[WakeRange]) -> int:
    return sum(length for _, length in ranges)


Postcopy.wake = wake  # type: ignore[method-assign]
main()
