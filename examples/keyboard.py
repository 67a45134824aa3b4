"""A keyboard that types by itself: each time that the guest lights Scroll Lock, it types its text.

    python examples/keyboard.py --socket-path=/tmp/keyboard.sock

Point QEMU's vhost-user-input-pci at the socket. docs/writing-a-device.md walks through it.
"""

import asyncio
import struct
from collections.abc import Collection
from enum import IntEnum

from vhostuser.dataplane import ServedQueue
from vhostuser.device import Device
from vhostuser.tools.service import serve_device
from vhostuser.virtqueue import Request

EVENT = struct.Struct("<HHI")  # type, code, value (virtio 1.2, 5.8.6.1; the numbers are Linux's input-event-codes.h)
SYN, KEY, LED = 0x00, 0x01, 0x11
SCROLL_LOCK = 2
LEDS = (0, 1, SCROLL_LOCK)
KEYS = {" ": 57, "\n": 28} | {
    letter: first + place
    for first, row in ((2, "1234567890"), (16, "qwertyuiop"), (30, "asdfghjkl"), (44, "zxcvbnm"))
    for place, letter in enumerate(row)
}
EVENTS, STATUS = range(2)


class Select(IntEnum):
    """What the driver may ask configuration space for (virtio 1.2, 5.8.4)."""

    ID_NAME = 1
    EV_BITS = 0x11


class Keyboard(Device):
    """Keys come on ring 0, lamps go on and off by ring 1."""

    virtio_id = 18
    queues = 2

    def __init__(self, text: str) -> None:
        self.events = [event for letter in text for event in stroke(KEYS[letter])]
        self.next = len(self.events)  # there is nothing to type
        self.lamps = 0
        self.selected = bytearray(2)

    # ---- configuration space: a window, through which the driver reads one thing after another

    def config(self) -> bytes:
        select, of = self.selected
        shown = {
            (Select.ID_NAME, 0): b"typist",
            (Select.EV_BITS, KEY): bits(KEYS.values()),
            (Select.EV_BITS, LED): bits(LEDS),
        }.get((select, of), b"")
        return struct.pack("<BBB5x128s", select, of, len(shown), shown)

    def set_config(self, offset: int, data: bytes, *, migration: bool) -> None:
        if offset >= len(self.selected):
            super().set_config(offset, data, migration=migration)  # which refuses it
        # QEMU writes the whole space for each byte of the driver's: what is read-only comes back, and is passed over.
        for place, byte in enumerate(data[: len(self.selected) - offset], offset):
            self.selected[place] = byte

    # ---- the rings

    async def start(self, features: int) -> None:
        # Here and not in __init__: each front-end has a data thread, and thereby a loop, of its own.
        self.lit = asyncio.Event()

    async def serve(self, queue: ServedQueue) -> None:
        if queue.index == STATUS:
            await super().serve(queue)  # calls handle()
        while True:
            if self.next == len(self.events):
                self.lit.clear()
                await self.lit.wait()
            (request,) = await queue.requests(most=1)
            request.complete(request.write(self.events[self.next]))
            self.next += 1

    async def handle(self, request: Request) -> None:
        kind, code, value = EVENT.unpack(request.read(EVENT.size))
        if kind == LED and code in LEDS:
            self.lamps = self.lamps & ~(1 << code) | bool(value) << code
        if (kind, code, self.next) == (LED, SCROLL_LOCK, len(self.events)) and value:
            self.next = 0
            self.lit.set()

    def state(self) -> dict[str, object]:
        return {"typed": self.next, "lamps": [lamp for lamp in LEDS if self.lamps >> lamp & 1]}


def stroke(key: int) -> list[bytes]:
    """The events of a key that goes down and up."""
    return [event for down in (1, 0) for event in (EVENT.pack(KEY, key, down), EVENT.pack(SYN, 0, 0))]


def bits(numbers: Collection[int]) -> bytes:
    """A bitmap in which these bits are set."""
    return sum(1 << number for number in numbers).to_bytes(max(numbers) // 8 + 1, "little")


if __name__ == "__main__":
    serve_device(lambda: Keyboard("hello\n"))
