"""A broken back-end: what it sends with POSTCOPY_ADVISE is an eventfd.

So does whoever mixes up two of his descriptors. Reading faults from it looks like a back-end that never waits.

Verdict: advise-descriptor.
"""

import os

from vhostuser.regions import Regions
from vhostuser.tools.blk import main

right = Regions.advise


def advise(regions: Regions) -> int:
    os.close(right(regions))
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)


Regions.advise = advise  # type: ignore[method-assign]
main()
