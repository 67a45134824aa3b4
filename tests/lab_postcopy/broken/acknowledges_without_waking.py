"""A broken back-end: acknowledges every message of its wake channel and wakes nobody.

Its threads wait for pages that came long ago; a front-end that wakes by messages alone cannot know.

Options: --wake=channel
Verdict: never-woken.
"""

from collections.abc import Iterable

from vhostuser.memory import GuestMemory
from vhostuser.postcopy import Postcopy
from vhostuser.protocol import WakeRange
from vhostuser.tools.blk import main


def wake(half: Postcopy, memory: GuestMemory, ranges: Iterable[WakeRange]) -> int:
    return sum(one.length for one in ranges)


Postcopy.wake = wake  # type: ignore[method-assign]
main()
