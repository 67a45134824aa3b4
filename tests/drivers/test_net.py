"""The net driver against a device side that is a few lines: headers, buffers, frames over several of them."""

import random
from collections.abc import Iterator

import pytest

from vhostuser.driverqueue import DriverQueue
from vhostuser.drivers.net import MRG_RXBUF, FrameReceiver, FrameSender, NetHeader
from vhostuser.frontend import SharedMemory
from vhostuser.protocol import VirtioFeature
from vhostuser.virtqueue import DeviceQueue, RingSetup

MIB = 1 << 20
VERSION_1, MERGEABLE = VirtioFeature.VERSION_1.mask, 1 << MRG_RXBUF


@pytest.fixture
def memory() -> Iterator[SharedMemory]:
    with SharedMemory((0, 4 * MIB)) as memory:
        yield memory


def device_of(queue: DriverQueue) -> DeviceQueue:
    return RingSetup(queue.size, queue.desc, queue.avail, queue.used, guest_addresses=True).open(queue.memory)


@pytest.mark.parametrize(("features", "size"), [(0, 10), (VERSION_1, 12), (MERGEABLE, 12), (VERSION_1 | MERGEABLE, 12)])
def test_the_size_of_a_header_follows_from_the_features(features: int, size: int) -> None:
    assert NetHeader.size(features) == size
    count = 3 if size == 12 else None
    header = NetHeader(1, 2, 3, 4, 5, 6, count)
    assert len(header.pack()) == size
    assert NetHeader.unpack(header.pack()) == header


@pytest.mark.parametrize("features", [0, VERSION_1])
def test_frames_go_out_behind_a_header_of_zeros(memory: SharedMemory, features: int) -> None:
    queue = DriverQueue(memory.map, 0, 4)
    sender = FrameSender(queue, MIB, features=features, slots=3, slot_bytes=100)
    frames = [bytes([number]) * 60 for number in range(5)]
    assert sender.send(frames) == 3, "there are three slots"
    assert queue.publish()
    device = device_of(queue)
    for request, frame in zip(device.pop(), frames, strict=False):
        assert request.read() == bytes(NetHeader.size(features)) + frame
        request.complete(0)
    device.flush()
    device.close()
    assert sender.collect() == 3
    assert sender.send(frames[3:]) == 2
    with pytest.raises(ValueError, match="slots have 100"):
        sender.send([bytes(100)])


def test_frames_come_in_over_one_buffer_or_several(memory: SharedMemory) -> None:
    """Cut by a device as it likes; the last buffer of a frame may come later than the first."""
    dice = random.Random(1)
    queue = DriverQueue(memory.map, 0, 16)
    receiver = FrameReceiver(queue, MIB, features=MERGEABLE, slots=16, slot_bytes=64)
    device, sent, got = device_of(queue), [], []
    for _ in range(50):
        receiver.post()
        queue.publish()
        frame = dice.randbytes(dice.randint(1, 300))
        count = -(-(len(frame) + 12) // 64)
        wire = NetHeader(num_buffers=count).pack() + frame
        requests = device.pop(count)
        for number, request in enumerate(requests):
            request.write(wire[number * 64 : number * 64 + 64])
            request.complete()
            device.flush()
            got += receiver.receive()
            assert len(got) == len(sent) + (number == count - 1)
        sent.append(frame)
    device.close()
    assert [frame for _, frame in got] == sent


def test_without_mergeable_buffers_each_is_a_frame(memory: SharedMemory) -> None:
    queue = DriverQueue(memory.map, 0, 4)
    receiver = FrameReceiver(queue, MIB, features=0, slots=9)
    assert receiver.post() == 4, "the ring has room for four"
    queue.publish()
    device = device_of(queue)
    for request in device.pop(2):
        request.write(bytes(10) + b"frame")
        request.complete()
    device.flush()
    device.close()
    assert receiver.receive() == [(NetHeader(), b"frame")] * 2
    assert receiver.post() == 2
