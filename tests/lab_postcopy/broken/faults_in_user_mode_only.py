"""A broken back-end: opens its userfaultfd for faults of user mode only, which needs no privilege.

Its own accesses wait. But whatever system call it gives a missing page to, to read the disk into for example, fails
with EFAULT instead; and it touches nothing beforehand, as the ones that work do.

Verdict: request-failed.
"""

import ctypes
import fcntl
import os
import struct
from typing import Any

from vhostuser.regions import Regions
from vhostuser.tools.blk import main
from vhostuser.uffd import Userfaultfd

SYS_USERFAULTFD, USER_MODE_ONLY = 323, 1
UFFDIO_API = 0xC018AA3F
libc = ctypes.CDLL(None, use_errno=True)


def open_user_mode_only(kind: type[Userfaultfd], *_: Any) -> Userfaultfd:
    fd = libc.syscall(SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK | USER_MODE_ONLY)
    assert fd >= 0, os.strerror(ctypes.get_errno())
    fcntl.ioctl(fd, UFFDIO_API, struct.pack("=QQQ", 0xAA, 0, 0))
    return kind(fd)


def touch(regions: Regions) -> None:
    return None


Userfaultfd.open = classmethod(open_user_mode_only)  # type: ignore[assignment,method-assign]
Regions.touch = property(touch)  # type: ignore[assignment,method-assign]
main()
