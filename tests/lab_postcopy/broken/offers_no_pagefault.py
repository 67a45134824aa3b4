"""A broken back-end: does not offer PAGEFAULT, like one that may not open a userfaultfd.

QEMU refuses postcopy then, before anything has started.

Verdict: no-pagefault.
"""

from vhostuser.backend import Backend
from vhostuser.tools.blk import main


def permitted(backend: Backend) -> bool:
    return False


Backend._permitted = permitted  # type: ignore[method-assign]
main()
