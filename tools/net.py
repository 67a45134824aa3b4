"""``vhostuser-net``: its name, its capabilities, and the way into the program (``network``).

Nothing heavy is imported before the capabilities have been printed: management software asks for them first, and
neither a wrong option beside it nor an import that fails may get in the way.
"""

import json
import sys
from collections.abc import Sequence

PROGRAM = "vhostuser-net"

CAPABILITIES = {"type": "net"}
"""QEMU's schema (vhost-user.json) has no features for network back-ends."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Ends the process: with status 0 after a clean stop, 1 after a failure, 2 for wrong options."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--print-capabilities" in arguments:
        print(json.dumps(CAPABILITIES))
        return
    from vhostuser.tools.network import serve

    serve(PROGRAM, arguments)


if __name__ == "__main__":
    main()
