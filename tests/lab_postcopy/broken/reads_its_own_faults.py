"""A broken back-end: reads the faults from the userfaultfd that it has given away, and does nothing with them.

A fault is told once, to whoever reads first. Those that the front-end does not hear of wait until their page comes for
another reason, and for ever if nobody wakes them then.

Verdict: unreported-fault.
"""

import contextlib
import select
from collections.abc import Iterable

from vhostuser.memory import Region
from vhostuser.postcopy import Postcopy
from vhostuser.threads import spawn
from vhostuser.tools.blk import main
from vhostuser.uffd import Userfaultfd

right = Postcopy.register


def register(half: Postcopy, regions: Iterable[Region]) -> None:
    right(half, regions)
    spawn(lambda: swallow(half._shared()), "swallow")


def swallow(uffd: Userfaultfd) -> None:
    poll = select.poll()
    poll.register(uffd.fileno(), select.POLLIN)
    with contextlib.suppress(OSError):  # closed
        while not uffd.closed:
            poll.poll()
            uffd.read()


Postcopy.register = register  # type: ignore[method-assign]
main()
