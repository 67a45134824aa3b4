"""A broken back-end: registers memory and uses it as soon as it has mapped it, before its addresses are known.

The page it wants is reported to a front-end that cannot tell yet which page that is; QEMU then drops the fault.

Verdict: touched-before-ack.
"""

from vhostuser.memory import GuestMemory
from vhostuser.protocol import MemoryRegion
from vhostuser.regions import Regions
from vhostuser.threads import spawn
from vhostuser.tools.blk import main

right = Regions.based


def based(regions: Regions, description: MemoryRegion) -> MemoryRegion:
    region = regions.memory.find(description.guest, description.size, description.user)
    regions._half().register([region])
    memory = GuestMemory([region])
    spawn(lambda: memory.read(region.guest, 1), "early")
    return right(regions, description)


Regions.based = based  # type: ignore[method-assign]
main()
