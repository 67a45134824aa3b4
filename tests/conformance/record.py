"""What is kept of a transcript, for the personas to be compared with: ``python -m tests.conformance.record FILE``.

    vhostuser-blk --socket-path=back --blk-file=IMAGE &
    vhostuser trace --listen=front --connect=back --once --json=FILE &
    qemu-system-x86_64 -M q35,memory-backend=m -m 256 -object memory-backend-memfd,id=m,size=256M,share=on \\
        -chardev socket,id=c,path=front -device vhost-user-blk-pci,chardev=c,num-queues=1 -kernel ... -initrd ...

made qemu-7.jsonl (Debian 12's 7.2+dfsg-7+deb12u18) and qemu-10.jsonl (Debian 13's 10.0.13, with its own SeaBIOS); the
guest read from its disk and went off. DPDK 22.11 of Debian 12 made dpdk.jsonl, between dpdk-testpmd with net_vhost and
one with ``--vdev net_virtio_user0,path=front,queues=1,queue_size=256``. One line a request of the front-end.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

KEPT = "message", "flags", "payload"


def kept(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The front-end's requests: name, flags, payload, kinds of descriptors."""
    for entry in map(json.loads, lines):
        if entry["event"] == "message" and entry["from"] == "front-end" and entry["socket"] == "main":
            yield {name: entry[name] for name in KEPT} | {"fds": [what["kind"] for what in entry["fds"]]}


if __name__ == "__main__":
    for request in kept(Path(sys.argv[1]).read_text().splitlines()):
        print(json.dumps(request))
