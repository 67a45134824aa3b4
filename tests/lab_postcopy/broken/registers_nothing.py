"""A broken back-end: goes through the whole handshake and never registers memory with its userfaultfd.

It never waits: the kernel gives it zeros for what is missing, and the whole guest with it.

Verdict: read-zeros.
"""

from collections.abc import Iterable

from vhostuser.memory import Region
from vhostuser.postcopy import Postcopy
from vhostuser.tools.blk import main


def register(half: Postcopy, regions: Iterable[Region]) -> None:
    for region in regions:
        region.no_huge()
        region.reveal()


Postcopy.register = register  # type: ignore[method-assign]
main()
