"""What the device status and the resets do to rings and to the device: both ends in one process."""

import asyncio
from collections.abc import Callable

import pytest

from tests.runtime.echo import Echo, answer, ask, quiet
from tests.runtime.test_hostile_channel import CONFIG_CHANGE, arrived, channel
from vhostuser.frontend import DRIVABLE, DRIVABLE_PROTOCOL, SharedMemory
from vhostuser.protocol import DeviceStatus, ProtocolFeature, RequestRefused, VirtioFeature
from vhostuser.testing.pair import MIB, Pair
from vhostuser.virtqueue import Request

pytestmark = pytest.mark.usefixtures("no_leaks")

S = DeviceStatus
AGREED = S.ACKNOWLEDGE | S.DRIVER | S.FEATURES_OK
STATUS = ProtocolFeature.STATUS.mask


async def started(pair: Pair, *, features: int = DRIVABLE, protocol: int = DRIVABLE_PROTOCOL | STATUS) -> None:
    """Everything but DRIVER_OK."""
    pair.memory = SharedMemory((0, 4 * MIB))
    await pair.frontend.negotiate(features, protocol)
    await pair.frontend.set_memory(pair.memory)
    pair.add_ring(0)
    await pair.frontend.start_ring(pair.rings[0], pair.memory)


async def served(pair: Pair) -> None:
    """DRIVER_OK, and a first request."""
    await started(pair)
    await pair.frontend.driver_ok()
    await ask(pair, b"one")
    assert await answer(pair) == b"ONE"


async def again(pair: Pair) -> None:
    """Sets the ring up anew, as after a reset."""
    pair.rings.pop().close()
    pair.add_ring(0)
    await pair.frontend.start_ring(pair.rings[0], pair.memory)


async def test_a_ring_is_served_from_driver_ok_on(pairs: Callable[..., Pair]) -> None:
    """Virtio 1.3, 2.1.2."""
    device = Echo()
    pair = pairs(device)
    await started(pair)
    await ask(pair, b"early")
    await pair.frontend.set_status(AGREED)
    await quiet(pair)
    assert device.events == []
    await pair.frontend.driver_ok()
    assert await answer(pair) == b"EARLY"


async def test_a_status_of_0_stops_ring_and_device(pairs: Callable[..., Pair]) -> None:
    """The answer comes when they have stopped, as with GET_VRING_BASE."""
    device = Echo()
    pair = pairs(device)
    await served(pair)
    device.gate.clear()
    await ask(pair, b"slow")
    await device.taken(b"slow")
    resetting = asyncio.ensure_future(pair.frontend.set_status(0))
    done, _ = await asyncio.wait((resetting,), timeout=0.05)
    assert not done
    device.release()
    await asyncio.wait_for(resetting, 5)
    assert device.events == ["start", "stop"]
    assert pair.rings[0].queue.take() is not None, "what was under way was completed before"
    await ask(pair, b"late")
    await quiet(pair)
    assert device.events == ["start", "stop"], "a late kick starts nothing"
    assert await pair.frontend.get_status() == 0


async def test_it_starts_anew_after_a_status_of_0(pairs: Callable[..., Pair]) -> None:
    """As QEMU does it when the guest reboots: everything is said again, but for the features' acknowledgement."""
    device = Echo()
    pair = pairs(device)
    await served(pair)
    await pair.frontend.set_status(0)
    await again(pair)
    await pair.frontend.driver_ok()
    await ask(pair, b"two")
    assert await answer(pair) == b"TWO"
    assert device.events == ["start", "stop", "start"]


class Modern(Echo):
    """Works with VERSION_1 alone; its state goes with a reset."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def check_features(self, features: int) -> None:
        if not features & VirtioFeature.VERSION_1.mask:
            raise RequestRefused("VERSION_1 is needed")

    async def handle(self, request: Request) -> None:
        self.seen += 1
        await super().handle(request)

    def reset(self) -> None:
        self.events.append("reset")
        self.seen = 0


LEGACY = DRIVABLE & ~VirtioFeature.VERSION_1.mask


async def test_features_that_do_not_do_are_told_by_the_status(pairs: Callable[..., Pair]) -> None:
    """Virtio 1.3, 3.1.1: FEATURES_OK does not stay, and the device is not used. The connection stays."""
    device = Modern()
    pair = pairs(device)
    await started(pair, features=LEGACY, protocol=DRIVABLE_PROTOCOL & ~ProtocolFeature.REPLY_ACK.mask | STATUS)
    with pytest.raises(RequestRefused, match="FEATURES_OK"):
        await pair.frontend.driver_ok()
    await pair.frontend.set_status(AGREED | S.DRIVER_OK)
    await ask(pair, b"x")
    await quiet(pair)
    assert device.events == []
    await pair.frontend.set_status(0)
    await pair.frontend.set_features(await pair.frontend.get_features() & DRIVABLE)
    await again(pair)
    await pair.frontend.driver_ok()
    await ask(pair, b"y")
    assert await answer(pair) == b"Y"


async def test_they_are_told_by_a_nack_too(pairs: Callable[..., Pair]) -> None:
    pair = pairs(Modern())
    with pytest.raises(RequestRefused, match="SET_FEATURES"):
        await pair.frontend.negotiate(LEGACY)


async def test_a_broken_ring_needs_a_reset(pairs: Callable[..., Pair]) -> None:
    """Virtio 1.3, 2.1.2: NEEDS_RESET, and a change of the configuration is announced. The err eventfd says it too."""
    pair = pairs(Echo())
    await started(pair)
    ours = await channel(pair)
    await pair.frontend.driver_ok()
    await ask(pair, b"fine")
    assert await answer(pair) == b"FINE"
    pair.rings[0].queue.raw.available_index += 1000
    pair.rings[0].kick()
    await asyncio.wait_for(pair.rings[0].broken(), 5)
    assert await pair.frontend.get_status() == AGREED | S.DRIVER_OK | S.NEEDS_RESET
    assert arrived(ours) == CONFIG_CHANGE
    await pair.frontend.set_status(0)
    assert await pair.frontend.get_status() == 0
    await again(pair)
    await pair.frontend.driver_ok()
    await ask(pair, b"again")
    assert await answer(pair) == b"AGAIN"
    ours.close()


async def test_without_a_status_a_broken_ring_is_no_change_of_the_configuration(pairs: Callable[..., Pair]) -> None:
    pair = pairs(Echo())
    await started(pair, protocol=DRIVABLE_PROTOCOL)
    ours = await channel(pair)
    pair.rings[0].queue.raw.available_index += 1000
    pair.rings[0].kick()
    await asyncio.wait_for(pair.rings[0].broken(), 5)
    await quiet(pair)
    assert arrived(ours) == b"nothing"
    ours.close()


async def test_reset_device(pairs: Callable[..., Pair]) -> None:
    """Rings and device stop, and it forgets; memory, features and the connection stay."""
    device = Modern()
    pair = pairs(device)
    await pair.set_up()
    await ask(pair, b"one")
    assert await answer(pair) == b"ONE"
    await pair.frontend.reset_device()
    assert (device.events, device.seen) == (["start", "stop", "reset"], 0)
    await ask(pair, b"late")
    await quiet(pair)
    assert len(device.events) == 3
    assert pair.rings[0].queue.take() is None, "a late kick starts nothing"
    await again(pair)
    await ask(pair, b"two")
    assert await answer(pair) == b"TWO"


async def test_a_ring_is_disabled_by_reset_device(pairs: Callable[..., Pair]) -> None:
    device = Echo()
    pair = pairs(device)
    await pair.set_up()
    await pair.frontend.reset_device()
    pair.rings.pop().close()
    pair.add_ring(0)
    await pair.frontend.start_ring(pair.rings[0], pair.memory, enable=False)
    await ask(pair, b"x")
    await quiet(pair)
    assert device.events == []
    await pair.frontend.set_vring_enable(0, True)
    assert await answer(pair) == b"X"


async def test_a_driver_that_gives_up_is_named_once(
    pairs: Callable[..., Pair], caplog: pytest.LogCaptureFixture
) -> None:
    pair = pairs(Echo())
    await started(pair)
    for _ in range(2):
        await pair.frontend.set_status(AGREED | S.FAILED)
    assert caplog.text.count("given the device up") == 1


async def test_the_reset_of_a_single_ring_is_not_offered(pairs: Callable[..., Pair]) -> None:
    """QEMU says nothing of it to a back-end, which would go on in memory that is no ring any more (docs/rings.md)."""
    pair = pairs(Echo())
    await pair.frontend.negotiate()
    assert not pair.frontend.session.features_offered & VirtioFeature.RING_RESET.mask
