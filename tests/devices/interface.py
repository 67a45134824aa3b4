"""A guest's driver for one pair of queues of a network device in this process, and frames for it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence

from vhostuser.devices.ends import End
from vhostuser.devices.net import DROPPED, Net, NetSettings
from vhostuser.drivers.net import FrameReceiver, FrameSender, NetHeader
from vhostuser.frontend import DRIVABLE, SharedMemory
from vhostuser.metrics import Metric
from vhostuser.testing.pair import MIB, Pair, connect

MAC = bytes.fromhex("525400123456")
EVERYBODY = b"\xff" * 6
# Where rings end and the buffers of the two directions begin, in guest memory; those of a second pair are in between.
RECEIVED, SENT, SCRATCH = MIB, 2 * MIB, 3 * MIB
SECOND_RECEIVED, SECOND_SENT = MIB // 2, 3 * MIB // 4


def bit(*features: int) -> int:
    return sum(1 << feature for feature in features)


def frame(size: int = 60, seed: int = 1, to: bytes = EVERYBODY, source: bytes = MAC) -> bytes:
    """``size`` bytes from ``source`` to ``to``, of an EtherType for experiments."""
    return (to + source + b"\x88\xb5" + random.Random(seed).randbytes(size))[:size]


class Watched(Net):
    """Says when it has started, which the first kick brings about at some time."""

    def __init__(self, end: End, settings: NetSettings | None = None) -> None:
        super().__init__(end, settings)
        self.started = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    async def start(self, features: int) -> None:
        await super().start(features)
        self._loop.call_soon_threadsafe(self.started.set)


class Driver:
    """A guest's driver of one pair of queues: ring ``first`` receives, the one behind it transmits."""

    pair: Pair

    def drive(self, first: int, received: int, sent: int, **slots: int) -> None:
        """Opens it, with buffers at these guest addresses."""
        features = self.pair.frontend.session.features
        rings = self.pair.rings
        self._first = first
        self.receiver = FrameReceiver(rings[first].queue, received, features=features, **slots)
        self.sender = FrameSender(rings[first + 1].queue, sent, features=features, **slots)

    def post(self) -> None:
        """Offers every free receive buffer."""
        self.receiver.post()
        self.publish(self._first)

    def publish(self, index: int) -> None:
        if self.pair.rings[index].queue.publish():
            self.pair.rings[index].kick()

    def send(self, *frames: bytes) -> None:
        assert self.sender.send(frames) == len(frames)
        self.publish(self._first + 1)

    async def sent(self, count: int) -> None:
        """Waits until the buffers of so many frames have come back."""
        while (count := count - self.sender.collect()) > 0:
            await self.called(self._first + 1)

    async def receive(self, count: int) -> list[tuple[NetHeader, bytes]]:
        """The next frames, with what stood in front of them; buffers are offered again at once."""
        frames: list[tuple[NetHeader, bytes]] = []
        while len(frames) < count:
            frames += self.receiver.receive()
            self.post()
            if len(frames) < count:
                await self.called(self._first)
        return frames

    async def called(self, index: int) -> None:
        ring = self.pair.rings[index]
        if not ring.queue.arm():
            await asyncio.wait_for(ring.called(), 10)


class SecondPair(Driver):
    """Of an interface that was started with four rings."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.drive(2, SECOND_RECEIVED, SECOND_SENT, slots=32)
        self.post()


class Interface(Driver):
    """A network device, the connection to it, and a driver of its first pair: ring 0 receives, ring 1 transmits."""

    def __init__(
        self,
        end: End,
        settings: NetSettings | None = None,
        *,
        features: int = DRIVABLE,
        slots: int = 32,
        slot_bytes: int = 2048,
    ) -> None:
        self.device = Watched(end, settings)
        self.pair: Pair = connect(self.device, postcopy=False)
        self._features = features
        self._slots = {"slots": slots, "slot_bytes": slot_bytes}
        self._scratch = SCRATCH

    async def start(
        self,
        *,
        rings: int = 2,
        enable: bool = True,
        memory: SharedMemory | None = None,
        post: bool = True,
        indirect: bool = False,
    ) -> Interface:
        await self.pair.set_up(rings=rings, features=self._features, enable=enable, memory=memory, indirect=indirect)
        self.drive(0, RECEIVED, SENT, **self._slots)
        self.header = NetHeader.size(self.pair.frontend.session.features)
        if post:
            self.post()
            await self.running()
        return self

    async def running(self) -> None:
        """Kicks, and waits until the device has started: frames that were there before are forgotten by then."""
        self.kick()
        await asyncio.wait_for(self.device.started.wait(), 10)
        self.device.started.clear()

    def kick(self) -> None:
        """Both rings, whether the device wants it or not: what makes them start."""
        for ring in self.pair.rings:
            ring.kick()

    def put(self, data: bytes) -> int:
        """The guest address of ``data``."""
        assert self.pair.memory is not None
        at, self._scratch = self._scratch, self._scratch + len(data)
        self.pair.memory.write(at, data)
        return at

    async def transmit(self, *pieces: bytes, writable: Sequence[tuple[int, int]] = ()) -> int:
        """One chain of these pieces, whatever they are; the length that the device says when it comes back."""
        self._scratch = SCRATCH
        queue = self.pair.rings[1].queue
        head = queue.offer([(self.put(piece), len(piece)) for piece in pieces], writable)
        assert head is not None
        self.publish(1)
        while (used := queue.take()) is None:
            await self.called(1)
        assert used[0] == head
        return used[1]

    def counted(self, metric: Metric, ring: int) -> int:
        """What the device has counted for a ring."""
        samples = [sample for sample in self.device.measure() if sample.metric is metric]
        return sum(int(sample.value) for sample in samples if sample.labels[0] == str(ring))  # type: ignore[arg-type]

    def dropped(self, ring: int) -> dict[str, int]:
        """Frames of a ring that were dropped, by reason."""
        samples = [sample for sample in self.device.measure() if sample.metric is DROPPED and sample.value]
        return {sample.labels[1]: int(sample.value) for sample in samples if sample.labels[0] == str(ring)}  # type: ignore[arg-type]

    async def close(self) -> None:
        await self.pair.close()


Connected = Callable[..., Awaitable[Interface]]
"""Makes a started interface in front of an end, which is closed at the end of the test: the fixture ``connected``."""
