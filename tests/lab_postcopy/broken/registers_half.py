"""A broken back-end: registers the first half of each region.

Bytes taken for something else, or a length cut to too few bits. In the other half it reads zeros.

Verdict: read-zeros.
"""

from collections.abc import Iterable

from vhostuser.memory import Region
from vhostuser.postcopy import Postcopy
from vhostuser.tools.blk import main


def register(half: Postcopy, regions: Iterable[Region]) -> None:
    for region in regions:
        region.no_huge()
        half._shared().register(region.base, region.length // 2 // region.page_size * region.page_size)
        region.reveal()


Postcopy.register = register  # type: ignore[method-assign]
main()
