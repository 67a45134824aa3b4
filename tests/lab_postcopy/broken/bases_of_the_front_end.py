"""A broken back-end: returns the memory table as it came, with the front-end's own addresses in it.

Its mappings lie elsewhere, so its faults come from addresses of which the front-end knows nothing.

Verdict: wrong-bases.
"""

from typing import Any

from vhostuser.memory import Region
from vhostuser.protocol import MemoryRegion
from vhostuser.regions import Regions
from vhostuser.tools.blk import main

right = Region.map.__func__  # type: ignore[attr-defined]


def anywhere(kind: type[Region], *arguments: Any, at_user: bool = False, **settings: Any) -> Region:
    """Not at the front-end's address, which would make its address ours."""
    return right(kind, *arguments, **settings)  # type: ignore[no-any-return]


def based(regions: Regions, description: MemoryRegion) -> MemoryRegion:
    return description


Region.map = classmethod(anywhere)  # type: ignore[assignment,method-assign]
Regions.based = based  # type: ignore[method-assign]
main()
