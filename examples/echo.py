"""A device that nobody else has: whatever is sent comes back, and it is told how often that was.

    python examples/echo.py --socket-path=/tmp/echo.sock
    python examples/ask.py /tmp/echo.sock "hello, device"

No guest has a driver for it, so examples/ask.py is the other end. docs/writing-a-device.md walks through both.
"""

import struct
from collections.abc import Iterator

from vhostuser.device import Device
from vhostuser.metrics import Kind, Metric, Sample
from vhostuser.tools.service import serve_device
from vhostuser.virtqueue import Request

BYTES = Metric("vhostuser_echo_bytes_total", Kind.COUNTER, "Bytes that were sent back.", unit="bytes")
PIECE = 65536


class Echo(Device):
    """Sends every request's bytes back, on two rings, as many of them as there is room for."""

    virtio_id = 63  # virtio numbers its devices from 1, and none has this number
    queues = 2
    metrics = (BYTES,)

    def __init__(self) -> None:
        self.returned = 0

    def config(self) -> bytes:
        return struct.pack("<I", self.queues)

    async def handle(self, request: Request) -> None:
        room = min(request.readable, request.writable)
        for offset in range(0, room, PIECE):  # a request may be as long as guest memory: never take it whole
            part = request.read(min(PIECE, room - offset), offset)
            self.returned += request.write(part, offset)

    def measure(self) -> Iterator[Sample]:
        yield BYTES.sample(self.returned)


if __name__ == "__main__":
    serve_device(Echo)
