"""A broken back-end: populates its page table of all memory when it has registered it (MADV_POPULATE_READ).

What is meant to save faults later asks for every page of the guest at once, those that nobody needs included. It does
so on a thread of its own, so that the control socket is answered.

Verdict: prefaulted.
"""

import ctypes
from collections.abc import Iterable

from vhostuser.memory import Region
from vhostuser.postcopy import Postcopy
from vhostuser.threads import spawn
from vhostuser.tools.blk import main

MADV_POPULATE_READ = 22
libc = ctypes.CDLL(None)
right = Postcopy.register


def register(half: Postcopy, regions: Iterable[Region]) -> None:
    regions = list(regions)
    right(half, regions)
    spawn(lambda: populate(regions), "populate")


def populate(regions: list[Region]) -> None:
    for region in regions:
        libc.madvise(ctypes.c_void_p(region.base), ctypes.c_size_t(region.length), MADV_POPULATE_READ)


Postcopy.register = register  # type: ignore[method-assign]
main()
