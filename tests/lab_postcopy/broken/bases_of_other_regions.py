"""A broken back-end: answers each region with the address of the one before it, and the first with that of the last.

An index that is off by one. With two regions in one table they are swapped; where regions come one by one the first
answer is right, since there is no other region yet. Needs two regions or more.

Verdict: wrong-bases.
"""

from vhostuser.protocol import MemoryRegion
from vhostuser.regions import Regions
from vhostuser.tools.blk import main


def based(regions: Regions, description: MemoryRegion) -> MemoryRegion:
    own = regions.memory.find(description.guest, description.size, description.user)
    other = regions.memory.regions[regions.memory.regions.index(own) - 1]
    return MemoryRegion(own.guest, own.size, other.host, own.offset)


Regions.based = based  # type: ignore[method-assign]
main()
