"""A broken back-end: looks at memory that it has just mapped, while nobody watches it.

The kernel gives it a page of zeros, for the whole guest: the real page can no longer be placed. Where regions come one
by one this happens before the next is answered.

Verdict: touched-before-ack.
"""

from vhostuser.memory import GuestMemory
from vhostuser.protocol import MemoryRegion
from vhostuser.regions import Regions
from vhostuser.tools.blk import main

right = Regions.based


def based(regions: Regions, description: MemoryRegion) -> MemoryRegion:
    region = regions.memory.find(description.guest, description.size, description.user)
    region.reveal()
    GuestMemory([region]).read(region.guest, 1)
    return right(regions, description)


Regions.based = based  # type: ignore[method-assign]
main()
