"""A broken back-end: writes a mark at the end of each region when postcopy is over.

Verdict: wrong-data.
"""

from vhostuser.regions import Regions
from vhostuser.tools.blk import main

right = Regions.end
MARK = b"migrated"


def end(regions: Regions) -> None:
    right(regions)
    for region in regions.memory.regions:
        regions.memory.write(region.guest + region.size - len(MARK), MARK)


Regions.end = end  # type: ignore[method-assign]
main()
