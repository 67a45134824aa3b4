"""A broken back-end: takes the guest addresses of its wake channel for offsets in its first region.

That is right for the first region, where guest memory begins at 0, and for no other: acknowledged, and never woken.

Options: --wake=channel
Verdict: never-woken.
"""

from collections.abc import Iterable

from vhostuser.memory import GuestMemory
from vhostuser.postcopy import Postcopy
from vhostuser.protocol import WakeRange
from vhostuser.tools.blk import main


def wake(half: Postcopy, memory: GuestMemory, ranges: Iterable[WakeRange]) -> int:
    issued = 0
    for guest, length in ranges:
        half._shared().wake(memory.regions[0].base + guest % memory.regions[0].length, length)
        issued += length
    return issued


Postcopy.wake = wake  # type: ignore[method-assign]
main()
