"""A disk in memory: a complete vhost-user device.

    python examples/ramdisk.py --socket-path=/tmp/ram.sock

Point QEMU's vhost-user-blk-pci at the socket. docs/writing-a-device.md walks through it.
"""

import struct

from vhostuser.device import Device
from vhostuser.tools.service import serve_device
from vhostuser.virtqueue import Request

HEADER = struct.Struct("<IIQ")
SECTOR = 512
READ, WRITE, FLUSH = 0, 1, 4
OK, IOERR, UNSUPP = b"\0", b"\1", b"\2"


class RamDisk(Device):
    virtio_id = 2

    def __init__(self, size: int) -> None:
        self.disk = memoryview(bytearray(size))

    def config(self) -> bytes:
        return struct.pack("<Q", len(self.disk) // SECTOR)

    async def handle(self, request: Request) -> None:
        kind, _, sector = HEADER.unpack(request.read(16))
        room = request.writable - 1  # the last writable byte is the status
        start = sector * SECTOR
        length = room if kind == READ else request.readable - 16
        if kind == FLUSH:
            status = OK
        elif kind not in (READ, WRITE):
            status = UNSUPP
        elif start + length > len(self.disk):
            status = IOERR
        elif kind == READ:
            request.write(self.disk[start : start + length])
            status = OK
        else:
            request.read_into(self.disk[start : start + length], offset=16)
            status = OK
        request.write(status, offset=room)

    def failed(self, request: Request, error: Exception) -> None:
        request.write(IOERR, offset=request.writable - 1)


if __name__ == "__main__":
    serve_device(lambda: RamDisk(64 << 20))
