"""A broken back-end: the addresses that it answers lie one page behind those at which it has the memory.

Mapping a file from a multiple of its page size and forgetting by how much that moved the region does this. The wrong
page is then placed and woken.

Verdict: wrong-bases.
"""

from vhostuser.protocol import MemoryRegion
from vhostuser.regions import Regions
from vhostuser.tools.blk import main

right = Regions.based


def based(regions: Regions, description: MemoryRegion) -> MemoryRegion:
    answer = right(regions, description)
    region = regions.memory.find(description.guest, description.size, description.user)
    return MemoryRegion(answer.guest, answer.size, answer.user + region.page_size, answer.offset)


Regions.based = based  # type: ignore[method-assign]
main()
