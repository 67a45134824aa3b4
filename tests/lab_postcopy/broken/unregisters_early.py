"""A broken back-end: unregisters its memory when its first ring starts, long before POSTCOPY_END.

Whoever believes that a ring starts when the migration is over does this. From then on missing pages are zeros.

Verdict: read-zeros.
"""

from typing import Any

from vhostuser.regions import Regions
from vhostuser.ring import Ring
from vhostuser.tools.blk import main
from vhostuser.uffd import TouchPool

right_touch, right_run = Regions.touch, Ring.run
early: list[Regions] = []


def touch(regions: Regions) -> TouchPool | None:
    """Asked for by every ring that starts."""
    if regions._postcopy is not None and regions._postcopy.active:
        early.append(regions)
    return right_touch.fget(regions)  # type: ignore[misc,no-any-return]


def run(ring: Ring, *arguments: Any, **named: Any) -> Any:
    for regions in early:
        for region in regions.memory.regions:
            regions._half()._shared().unregister(region.base, region.length)
    early.clear()
    return right_run(ring, *arguments, **named)


Regions.touch = property(touch)  # type: ignore[assignment,method-assign]
Ring.run = run  # type: ignore[method-assign]
main()
