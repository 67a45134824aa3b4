"""A broken back-end: a helper process opens the userfaultfd that the front-end gets.

Its own one watches its memory; that of the helper belongs to the helper's address space. So does a program that opens
the userfaultfd before it forks into the background.

Verdict: unreported-fault.
"""

import os
import socket

from vhostuser.regions import Regions
from vhostuser.tools.blk import main
from vhostuser.uffd import Userfaultfd

right = Regions.advise


def advise(regions: Regions) -> int:
    os.close(right(regions))
    ours, theirs = socket.socketpair()
    child = os.fork()
    if not child:
        uffd = Userfaultfd.open().fileno()
        socket.send_fds(theirs, [b"x"], [uffd])
        os._exit(0)
    _, (fd,), _, _ = socket.recv_fds(ours, 1, 1)
    os.waitpid(child, 0)
    ours.close()
    theirs.close()
    return fd


Regions.advise = advise  # type: ignore[method-assign]
main()
