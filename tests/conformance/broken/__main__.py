"""The disk with the fault that is named first, and the disk's own options behind it."""

import sys

from tests.conformance.broken import FAULTS
from vhostuser.tools.blk import main

if __name__ == "__main__":
    FAULTS[sys.argv[1]].patch()
    main(sys.argv[2:])
