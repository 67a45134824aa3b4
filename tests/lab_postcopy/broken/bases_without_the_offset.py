"""A broken back-end: answers where the file would begin, not where the region begins that lies further on in it.

Right for as long as every region has a file of its own.

Options: --one-file

Verdict: wrong-bases.
"""

from dataclasses import replace

from vhostuser.protocol import MemoryRegion
from vhostuser.regions import Regions
from vhostuser.tools.blk import main

right = Regions.based


def based(regions: Regions, description: MemoryRegion) -> MemoryRegion:
    answer = right(regions, description)
    return replace(answer, user=answer.user - description.offset)


Regions.based = based  # type: ignore[method-assign]
main()
