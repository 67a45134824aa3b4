"""Devices behind an IOMMU: misses, updates, invalidations in use, permissions. Section "IOMMU support".

Guest memory lies at one GiB, its two halves the other way round behind the IOMMU, and I/O virtual addresses begin at 0:
whoever takes the one for the other finds nothing, or the wrong half.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from tests.runtime.echo import DATA, Echo, answer, ask, next_used, quiet
from vhostuser._native import ffi
from vhostuser.device import Device
from vhostuser.devices.blk import Blk
from vhostuser.devices.ends import loopback
from vhostuser.devices.image import Image
from vhostuser.devices.net import Net
from vhostuser.drivers.blk import SECTOR, BlkDriver, Disk
from vhostuser.drivers.net import FrameReceiver, FrameSender
from vhostuser.frontend import DRIVABLE, Iommu, SharedLog, SharedMemory
from vhostuser.protocol import Iotlb, IotlbType, RequestRefused, VirtioFeature
from vhostuser.testing.pair import MIB, RING_BYTES, Pair

pytestmark = pytest.mark.usefixtures("no_leaks")

BASE = 1 << 30
PAGE = 4096
HALF = 2 * MIB
RINGS = 2 * RING_BYTES
"""Bytes of I/O virtual addresses that have rings."""
UPDATE, INVALIDATE = IotlbType.UPDATE, IotlbType.INVALIDATE


class Guest:
    """A pair behind an IOMMU."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.memory = SharedMemory((BASE, 2 * HALF))
        self.iommu = Iommu(pair.frontend, self.memory)

    def lay_out(self, access: int = 3) -> None:
        """Maps everything; ``access`` is that of the second half, where buffers lie."""
        self.iommu.map(0, BASE + HALF, HALF)
        self.iommu.map(HALF, BASE, HALF, access)

    async def start(
        self, *, rings: int = 1, packed: bool = False, indirect: bool = False, channel: bool = True, **ring: bool
    ) -> None:
        pair = self.pair
        features = VirtioFeature.ACCESS_PLATFORM.mask | VirtioFeature.RING_PACKED.mask * packed
        await pair.frontend.negotiate(DRIVABLE | features)
        await pair.frontend.set_memory(self.memory)
        if channel:
            await self.iommu.serve()
        pair.memory = self.iommu.view
        for index in range(rings):
            await pair.frontend.start_ring(pair.add_ring(index, indirect=indirect), self.iommu.view, **ring)

    async def misses(self, *pages: int) -> None:
        """Waits until each of these I/O virtual pages was asked for."""
        while not set(pages) <= {miss.iova // PAGE * PAGE for miss in self.iommu.misses}:
            await asyncio.wait_for(self.iommu.asked(len(self.iommu.misses) + 1), 5)

    async def nacked(self, iova: int, size: int, user: int, access: int = 3, kind: int = UPDATE) -> None:
        with pytest.raises(RequestRefused):
            await self.pair.frontend.iotlb_msg(Iotlb(iova, size, user, access, kind))


@pytest.fixture
async def guests(pairs: Callable[..., Pair]) -> AsyncIterator[Callable[[Device], Guest]]:
    made: list[Guest] = []

    def make(device: Device) -> Guest:
        made.append(Guest(pairs(device)))
        return made[-1]

    yield make
    for guest in made:
        guest.iommu.close()
        await guest.pair.close()
        guest.memory.close()


Guests = Callable[[Device], Guest]


def disk_of(guest: Guest, depth: int = 4) -> Disk:
    (ring,) = guest.pair.rings
    return Disk(ring, BlkDriver(ring.queue, DATA, depth=depth))


async def soon(waited: Awaitable[object]) -> None:
    await asyncio.wait_for(waited, 5)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(bytes(MIB))
    return path


# ---- translation


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("indirect", [False, True])
async def test_a_disk_finds_everything(guests: Guests, image: Path, packed: bool, indirect: bool) -> None:
    guest = guests(Blk(Image(image)))
    guest.lay_out()
    await guest.start(packed=packed, indirect=indirect)
    disk = disk_of(guest)
    for turn in range(3):
        for sector in range(20):
            await disk.write(sector, bytes([turn, sector]) * (SECTOR // 2))
        assert await disk.read(0, 20) == b"".join(bytes([turn, sector]) * (SECTOR // 2) for sector in range(20))
        base = await guest.pair.frontend.stop_ring(guest.pair.rings[0])
        await guest.pair.frontend.start_ring(guest.pair.rings[0], guest.iommu.view, base=base)
    assert guest.iommu.misses


async def test_a_device_in_python_finds_everything(guests: Guests) -> None:
    guest = guests(Echo())
    guest.lay_out()
    await guest.start(rings=2)
    for ring in (0, 1, 0):
        await ask(guest.pair, b"hello", ring)
        assert await answer(guest.pair, ring) == b"HELLO"


async def test_what_lies_in_pieces_is_put_together(guests: Guests) -> None:
    """Buffers may cross from one mapping to the next, each of which lies elsewhere in guest memory."""
    guest = guests(Echo())
    guest.iommu.map(0, BASE, HALF)
    for page in range(4):
        guest.iommu.map(HALF + page * PAGE, BASE + HALF + (6 - page) * PAGE, PAGE)
    guest.iommu.view.add(
        HALF + 4 * PAGE, PAGE
    )  # beside it; the driver's view has regions alone, so it writes page by page
    await guest.start()
    text = bytes(range(256)) * 16
    memory, queue = guest.memory, guest.pair.rings[0].queue
    memory.write(BASE + HALF + 6 * PAGE, text)
    memory.write(BASE + HALF + 5 * PAGE, text[::-1])
    queue.offer([(HALF + 100, PAGE)], [(HALF + 2 * PAGE + 100, PAGE)])
    queue.publish()
    guest.pair.rings[0].kick()
    assert (await next_used(guest.pair))[1] == PAGE
    expected = (text[100:] + text[::-1][:100]).upper()
    assert memory.read(BASE + HALF + 4 * PAGE + 100, PAGE - 100) == expected[:-100]
    assert memory.read(BASE + HALF + 3 * PAGE, 100) == expected[-100:]


async def test_all_that_a_request_needs_is_asked_for_at_once(guests: Guests) -> None:
    guest = guests(Echo())
    guest.lay_out()
    await guest.start()
    await ask(guest.pair, b"first")
    await answer(guest.pair)
    guest.iommu.answering.clear()
    queue = guest.pair.rings[0].queue
    queue.offer([(HALF + 64 * PAGE, 3 * PAGE)], [(HALF + 80 * PAGE, PAGE)])
    queue.publish()
    guest.pair.rings[0].kick()
    await guest.misses(*(HALF + page * PAGE for page in (64, 65, 66, 80)))
    guest.iommu.answering.set()
    await next_used(guest.pair)


# ---- waiting


async def test_a_ring_waits_for_its_own_translation(guests: Guests) -> None:
    """It cannot start before it is known where it lies; nothing is wrong with it."""
    guest = guests(Echo())
    guest.lay_out()
    guest.iommu.answering.clear()
    await guest.start()
    await ask(guest.pair, b"early")
    await soon(guest.iommu.asked())
    await quiet(guest.pair)
    guest.iommu.answering.set()
    assert await answer(guest.pair) == b"EARLY"


async def test_who_cannot_be_asked_learns_why_rings_stand_still(
    guests: Guests, caplog: pytest.LogCaptureFixture
) -> None:
    """A front-end may take ACCESS_PLATFORM without a thought: one line, and the questions when a channel comes."""
    guest = guests(Echo())
    guest.lay_out()
    await guest.start(channel=False)
    await ask(guest.pair, b"early")
    async with asyncio.timeout(5):
        while "ACCESS_PLATFORM needs BACKEND_REQ" not in caplog.text:  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(0)
    await guest.iommu.serve()
    assert await answer(guest.pair) == b"EARLY"
    assert caplog.text.count("rings wait for translations") == 1


async def test_updates_may_come_before_anybody_asks(guests: Guests) -> None:
    """QEMU tells of used rings as a device starts."""
    guest = guests(Echo())
    guest.lay_out()
    await guest.start()
    await guest.iommu.tell(0, RINGS)
    await guest.iommu.tell(DATA, 2 * PAGE)
    await ask(guest.pair, b"told")
    assert await answer(guest.pair) == b"TOLD"
    assert not guest.iommu.misses


async def test_what_was_taken_goes_on_while_the_next_waits(guests: Guests) -> None:
    """A stop meanwhile leaves what waits in the ring."""
    device = Echo()
    guest = guests(device)
    guest.lay_out()
    await guest.start()
    device.gate.clear()
    await ask(guest.pair, b"first")
    await device.taken(b"first")
    guest.iommu.answering.clear()
    queue, ring = guest.pair.rings[0].queue, guest.pair.rings[0]
    queue.offer([(HALF + 64 * PAGE, 5)], [(HALF + 65 * PAGE, 5)])
    queue.publish()
    ring.kick()
    await guest.misses(HALF + 64 * PAGE, HALF + 65 * PAGE)
    device.release()
    assert await answer(guest.pair) == b"FIRST"
    assert await guest.pair.frontend.stop_ring(ring) == 1
    guest.iommu.answering.set()
    await guest.pair.frontend.start_ring(ring, guest.iommu.view, base=1)
    ring.kick()
    assert (await next_used(guest.pair))[1] == 5


async def test_a_stopped_device_forgets(guests: Guests) -> None:
    """What becomes invalid meanwhile nobody tells it: QEMU listens to its IOMMU only while a device runs."""
    guest = guests(Echo())
    guest.lay_out()
    await guest.start()
    await ask(guest.pair, b"one")
    assert await answer(guest.pair) == b"ONE"
    asked = len(guest.iommu.misses)
    base = await guest.pair.frontend.stop_ring(guest.pair.rings[0])
    await guest.pair.frontend.start_ring(guest.pair.rings[0], guest.iommu.view, base=base)
    await ask(guest.pair, b"two")
    assert await answer(guest.pair) == b"TWO"
    assert len(guest.iommu.misses) > asked


# ---- invalidation


async def test_an_invalidation_waits_for_who_uses_it(guests: Guests) -> None:
    """And the request that used it is complete when it is answered."""
    device = Echo()
    guest = guests(device)
    guest.lay_out()
    await guest.start(rings=2)
    device.gate.clear()
    await ask(guest.pair, b"slow")
    await device.taken(b"slow")
    unmapping = asyncio.ensure_future(guest.pair.frontend.iotlb_msg(Iotlb(DATA, PAGE, 0, 0, INVALIDATE)))
    done, _ = await asyncio.wait([unmapping], timeout=0.05)
    assert not done
    device.release()
    await soon(unmapping)
    assert guest.pair.rings[0].queue.take() is not None
    await ask(guest.pair, b"again")
    assert await answer(guest.pair) == b"AGAIN"


async def test_an_invalidation_of_what_nobody_uses_waits_for_nothing(guests: Guests) -> None:
    device = Echo()
    guest = guests(device)
    guest.lay_out()
    await guest.start()
    device.gate.clear()
    await ask(guest.pair, b"slow")
    await device.taken(b"slow")
    await soon(guest.pair.frontend.iotlb_msg(Iotlb(DATA + 16 * PAGE, 16 * PAGE, 0, 0, INVALIDATE)))
    device.release()
    assert await answer(guest.pair) == b"SLOW"


async def test_what_was_invalidated_is_translated_anew(guests: Guests) -> None:
    guest = guests(Echo())
    guest.lay_out()
    await guest.start()
    await ask(guest.pair, b"here")
    await answer(guest.pair)
    await guest.iommu.unmap(HALF, HALF)
    guest.iommu.remap(HALF, BASE + HALF + MIB, MIB)
    guest.memory.write(BASE + HALF + MIB + DATA - HALF, b"there")
    queue = guest.pair.rings[0].queue
    queue.offer([(DATA, 5)], [(DATA + 8 * PAGE, 5)])
    queue.publish()
    guest.pair.rings[0].kick()
    await next_used(guest.pair)
    assert guest.memory.read(BASE + HALF + MIB + DATA - HALF + 8 * PAGE, 5) == b"THERE"


@pytest.mark.parametrize("packed", [False, True])
async def test_the_ring_itself_may_be_invalidated(guests: Guests, image: Path, packed: bool) -> None:
    """Everything by 0 bytes from 0, as QEMU's intel-iommu says it."""
    guest = guests(Blk(Image(image)))
    guest.lay_out()
    await guest.start(packed=packed)
    disk = disk_of(guest)
    for turn in range(5):
        await disk.write(turn, bytes([turn]) * SECTOR)
        await guest.pair.frontend.iotlb_msg(Iotlb(0, 0 if turn % 2 else RINGS, 0, 0, INVALIDATE))
        assert await disk.read(turn, 1) == bytes([turn]) * SECTOR


async def test_buffers_that_are_held_for_frames_are_let_go(guests: Guests) -> None:
    end = loopback()
    guest = guests(Net(end))
    guest.lay_out()
    await guest.start(rings=2)
    receive, transmit = (ring.queue for ring in guest.pair.rings)
    features = guest.pair.frontend.session.features
    receiver = FrameReceiver(receive, DATA, features=features, slots=16)
    sender = FrameSender(transmit, DATA + 64 * PAGE, features=features, slots=16)
    for turn in range(4):
        receiver.post()
        receive.publish()
        guest.pair.rings[0].kick()
        sender.send([bytes([turn]) * 60])
        transmit.publish()
        guest.pair.rings[1].kick()
        while not (frames := receiver.receive()):
            if not receive.arm():
                await soon(guest.pair.rings[0].called())
        assert frames[0][1] == bytes([turn]) * 60
        sender.collect()
        await soon(guest.pair.frontend.iotlb_msg(Iotlb(DATA, 64 * PAGE, 0, 0, INVALIDATE)))
    await guest.pair.close()
    ffi.release(end._hub)


async def test_every_request_is_mapped_for_itself(guests: Guests, image: Path) -> None:
    """As Linux does it with strict invalidation: what a request that is over had is taken back while others run."""
    guest = guests(Blk(Image(image)))
    guest.lay_out()
    await guest.start()
    disk = disk_of(guest, depth=8)

    async def use(sector: int) -> None:
        for turn in range(15):
            await disk.write(sector, bytes([sector, turn]) * (SECTOR // 2))
            assert await disk.read(sector, 1) == bytes([sector, turn]) * (SECTOR // 2)

    async def take_back() -> None:
        while True:
            for page in range(DATA, DATA + 20 * PAGE, PAGE):
                await guest.pair.frontend.iotlb_msg(Iotlb(page, PAGE, 0, 0, INVALIDATE))

    taking = asyncio.ensure_future(take_back())
    await asyncio.gather(*(use(sector) for sector in range(8)))
    taking.cancel()


# ---- permissions


async def test_what_may_not_be_written_stops_its_ring_alone(guests: Guests) -> None:
    """The front-end is told what was refused, and the ring is reported broken."""
    guest = guests(Echo())
    guest.lay_out(access=1)
    await guest.start(rings=2)
    guest.iommu.map(2 * HALF, BASE + HALF + MIB, PAGE)
    await ask(guest.pair, b"no")
    assert (await asyncio.wait_for(guest.iommu.failed(), 5)).iova == DATA + PAGE
    await soon(guest.pair.rings[0].broken())
    queue = guest.pair.rings[1].queue
    queue.offer([(DATA, 2)], [(2 * HALF, 2)])
    queue.publish()
    guest.pair.rings[1].kick()
    assert (await next_used(guest.pair, 1))[1] == 2


async def test_permissions_add_up(guests: Guests) -> None:
    """An IOMMU that is asked for reading may answer for reading alone."""
    guest = guests(Echo())
    guest.lay_out()
    await guest.start()
    user = guest.memory.map.guest_to_user(BASE)
    for access in (1, 2):
        await guest.pair.frontend.iotlb_msg(Iotlb(HALF, 2 * PAGE, user, access, UPDATE))
    await ask(guest.pair, b"both")
    assert await answer(guest.pair) == b"BOTH"


# ---- what is refused


async def test_nonsense_is_refused(guests: Guests, caplog: pytest.LogCaptureFixture) -> None:
    """And changes nothing."""
    guest = guests(Echo())
    guest.lay_out()
    await guest.start()
    user = guest.memory.map.guest_to_user(BASE)
    top = (1 << 64) - PAGE
    told = {
        "a size that the specification forbids": [(0, 0, user), (PAGE, 0, 0, 0, INVALIDATE)],
        "wrap around": [(top, 2 * PAGE, user), (0, PAGE, top + 1), (top, 2 * PAGE, 0, 0, INVALIDATE)],
        "outside of guest memory": [(0, PAGE, user - PAGE), (0, 2 * HALF + 1, user)],
        "the permissions are not": [(0, PAGE, user, access) for access in (0, 4, 255)],
    }
    for reason, messages in told.items():
        for message in messages:
            await guest.nacked(*message)
            assert reason in caplog.records[-1].message
    await guest.pair.frontend.iotlb_msg(Iotlb(HALF, PAGE, user, 3, UPDATE))
    await guest.nacked(HALF, PAGE, user + PAGE)
    await guest.nacked(HALF - PAGE, 3 * PAGE, user)
    assert "overlaps with another that says otherwise" in caplog.records[-1].message
    await guest.pair.frontend.iotlb_msg(Iotlb(HALF, PAGE, user, 3, UPDATE))
    await ask(guest.pair, b"fine")
    assert await answer(guest.pair) == b"FINE"


# ---- the dirty log


@pytest.mark.parametrize("packed", [False, True])
async def test_the_log_has_guest_addresses(guests: Guests, packed: bool) -> None:
    """Of data and of the ring, whatever the front-end gives for the ring's."""
    guest = guests(Echo())
    guest.lay_out()
    await guest.start(packed=packed, log_used=True)
    log = SharedLog(BASE + 2 * HALF)
    await guest.pair.frontend.start_log(log)
    await ask(guest.pair, b"dirty")
    assert await answer(guest.pair) == b"DIRTY"
    marked = {at + offset for at, length in log.take() for offset in range(0, length, PAGE)}
    log.close()
    queue = guest.pair.rings[0].queue
    written = queue.desc if packed else queue.used
    assert BASE + DATA + PAGE - HALF in marked
    assert BASE + HALF + written // PAGE * PAGE in marked
    assert all(BASE <= page < BASE + PAGE * 2 or BASE + HALF <= page < BASE + HALF + RING_BYTES for page in marked)
