"""Random numbers for a guest: the smallest device there is.

    python examples/rng.py --socket-path=/tmp/rng.sock

Point QEMU's vhost-user-rng-pci at the socket; the guest has /dev/hwrng then. docs/writing-a-device.md walks through it.
"""

import os

from vhostuser.device import Device
from vhostuser.tools.service import serve_device
from vhostuser.virtqueue import Request

MOST = 65536
"""Bytes for one request: a driver may ask for as much as it likes, and may be given less (virtio 1.2, 5.4.6)."""


class Rng(Device):
    """Fills what it is given with random bytes."""

    virtio_id = 4

    async def handle(self, request: Request) -> None:
        request.write(os.getrandom(min(request.writable, MOST)))


if __name__ == "__main__":
    serve_device(Rng)
