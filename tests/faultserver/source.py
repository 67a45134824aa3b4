"""A process that has the pages of the test's memory and serves them on a Unix socket: run, killed and run again.

    python -m tests.faultserver.source PATH LATENCY BANDWIDTH

LATENCY in seconds, BANDWIDTH in bytes a second, 0 for all there is.
"""

from __future__ import annotations

import socket
import sys

from tests.faultserver.client import content
from vhostuser.faultserver import serve_pages


def main(path: str, latency: float, bandwidth: float) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen()
        print("ready", flush=True)
        while True:
            sock, _ = listener.accept()
            with sock:
                serve_pages(sock, content, latency=latency, bandwidth=bandwidth or None)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), float(sys.argv[3]))
