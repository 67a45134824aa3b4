"""A broken back-end: its memory is registered with one userfaultfd, and the front-end gets another.

Its faults go to a descriptor that nobody reads, and wakes by the other one reach nobody.

Verdict: unreported-fault.
"""

import os

from vhostuser.regions import Regions
from vhostuser.tools.blk import main
from vhostuser.uffd import Userfaultfd

right = Regions.advise


def advise(regions: Regions) -> int:
    os.close(right(regions))
    return Userfaultfd.open().fileno()


Regions.advise = advise  # type: ignore[method-assign]
main()
