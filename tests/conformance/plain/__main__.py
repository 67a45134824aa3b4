"""Our disk on this data path: ``python -m tests.conformance.plain --socket-path=...``."""

from tests.conformance.plain import install
from vhostuser.tools.blk import main

install()
main()
