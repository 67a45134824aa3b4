"""The front-end of a test, as a process of its own: places pages by its own userfaultfd, wakes by the back-end's.

Arguments: descriptor of the memory, descriptor of the back-end's userfaultfd, the back-end's base, page size, what to
do with faults: "serve" or "hold". Says "ready" on its standard output, leaves at the end of its standard input.
"""

import os
import select
import sys
from contextlib import suppress
from types import SimpleNamespace

from vhostuser.memory import Region
from vhostuser.uffd import Userfaultfd


def main(memory: int, theirs: int, base: int, page_size: int, serve: bool) -> None:
    size = os.fstat(memory).st_size
    region = Region.map(memory, SimpleNamespace(guest=0, size=size, user=0, offset=0))
    ours, back_end = Userfaultfd.open(), Userfaultfd(theirs)
    ours.register(region.base, region.length)
    poll = select.poll()
    poll.register(0, select.POLLIN)
    if serve:
        poll.register(theirs, select.POLLIN)
    print("ready", flush=True)
    while 0 not in dict(poll.poll()):
        for fault in back_end.read():
            page = (fault.address - base) // page_size
            # Found placed already (EEXIST) it needs the wake all the same.
            with suppress(FileExistsError):
                ours.copy(region.base + page * page_size, bytes([page % 255 + 1]) * page_size)
            back_end.wake(base + page * page_size, page_size)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:5]), serve=sys.argv[5] == "serve")
