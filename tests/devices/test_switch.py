"""Several network devices in one process: peers and a switch, with guests' drivers in front of each port."""

from __future__ import annotations

import asyncio
import random

import pytest

from tests.devices.interface import EVERYBODY, MAC, Connected, Driver, Interface, SecondPair, frame
from vhostuser.devices.ends import Hub, Port
from vhostuser.devices.net import FRAMES
from vhostuser.frontend import DRIVABLE
from vhostuser.protocol import VirtioFeature

STATIONS = [bytes([2, 0, 0, 0, 0, number]) for number in range(8)]
GROUP = bytes.fromhex("01005e000001")
NEIGHBOUR = bytes.fromhex("0180c2000000")
LAST = b"\xff" * 6 + STATIONS[7] + b"the last"
"""A broadcast: whoever has received it has received everything before."""


async def guests_of(connected: Connected, ports: list[Port], **options: object) -> list[Interface]:
    return [await connected(port, **options) for port in ports]


async def heard(guest: Interface) -> list[bytes]:
    """Everything up to the last."""
    got: list[bytes] = []
    while LAST not in got:
        got += [data for _, data in await guest.receive(1)]
    return [data for data in got if data != LAST]


async def send(guest: Driver, *frames: bytes) -> None:
    """Returns when the device has taken them."""
    guest.send(*frames)
    await guest.sent(len(frames))


# ---- where frames go


class SlowSwitch:
    """What a learning bridge does (IEEE 802.1D, 7.7 and 7.8), in as many words."""

    def __init__(self, ports: int) -> None:
        self.ports = set(range(ports))
        self.where: dict[bytes, int] = {}

    def hears(self, port: int, data: bytes) -> set[int]:
        """The ports to which it goes."""
        to, source = data[:6], data[6:12]
        if source[0] & 1 or source == bytes(6) or NEIGHBOUR <= to <= NEIGHBOUR[:5] + b"\x0f":
            return set()
        self.where[source] = port
        known = self.where.get(to) if not to[0] & 1 else None
        return (self.ports if known is None else {known}) - {port}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
async def test_frames_go_where_a_slow_switch_says(connected: Connected, seed: int, packed: bool) -> None:
    """Stations that move, groups, unknown ones, wrong sources, frames to oneself; in order, and each port once."""
    features = DRIVABLE | (VirtioFeature.RING_PACKED.mask if packed else 0)
    guests = await guests_of(connected, Hub(4, 1, learn=True).ports, features=features)
    slow, dice = SlowSwitch(4), random.Random(seed)
    expected: list[list[bytes]] = [[] for _ in guests]
    destinations = [*STATIONS[:6], EVERYBODY, GROUP, NEIGHBOUR, bytes(6)]
    for number in range(150):
        port = dice.randrange(4)
        batch = []
        for _ in range(dice.randint(1, 6)):
            # Mostly a station of its own, now and then one of others: it has moved.
            source = STATIONS[dice.choice((port, port, port, dice.randrange(6)))]
            source = dice.choice([source] * 20 + [GROUP, bytes(6)])
            batch.append(frame(dice.choice((60, 61, 600, 1514)), number, dice.choice(destinations), source))
            for to in slow.hears(port, batch[-1]):
                expected[to].append(batch[-1])
        await send(guests[port], *batch)
    for port in (0, 1):
        await send(guests[port], LAST)
    for port, guest in enumerate(guests):
        assert await heard(guest) == expected[port], port


async def test_frames_between_neighbours_and_from_groups_do_not_pass_a_switch_and_are_counted(
    connected: Connected,
) -> None:
    """7.12.6, and a group never sends."""
    one, other, _ = await guests_of(connected, Hub(3, 1, learn=True).ports)
    await send(one, *[frame(60, 1, NEIGHBOUR[:5] + bytes([n])) for n in range(17)])
    await send(one, frame(60, 2, source=GROUP), frame(60, 2, source=bytes(6)), LAST)
    assert await heard(other) == [frame(60, 1, NEIGHBOUR[:5] + b"\x10")]
    assert one.dropped(1) == {"refused": 18}
    assert one.counted(FRAMES, 1) == 2


async def test_peers_pass_everything_and_learn_nothing(connected: Connected) -> None:
    """A wire: what is between neighbours, what comes from nobody, what is for oneself."""
    hub = Hub(2, 1)
    one, other = await guests_of(connected, hub.ports)
    frames = [frame(60, 1, to, source) for to in (NEIGHBOUR, MAC, EVERYBODY) for source in (bytes(6), GROUP, MAC)]
    await send(one, *frames, LAST)
    assert await heard(other) == frames
    assert [port.stations for port in hub.ports] == [0, 0]


async def test_a_switch_that_forgets_at_once_floods(connected: Connected) -> None:
    guests = await guests_of(connected, Hub(3, 1, learn=True, ageing=0).ports)
    known = frame(60, 1, STATIONS[0], STATIONS[1])
    await send(guests[0], frame(60, 2, source=STATIONS[0]))
    await send(guests[1], known, LAST)
    assert known in await heard(guests[2])


async def test_a_port_whose_guest_goes_is_forgotten_and_serves_the_next_one(connected: Connected) -> None:
    """The others go on; what was for the guest that went is not for the one that comes."""
    hub = Hub(3, 1, learn=True)
    guests = await guests_of(connected, hub.ports)
    for number, guest in enumerate(guests):
        await send(guest, frame(60, 1, source=STATIONS[number]))
    assert [port.stations for port in hub.ports] == [1, 1, 1]
    await guests[1].close()
    assert [port.stations for port in hub.ports] == [1, 0, 1]
    unknown_now = frame(61, 1, STATIONS[1], STATIONS[0])
    await send(guests[0], unknown_now, LAST)
    assert (await heard(guests[2]))[-1] == unknown_now, "it may be anywhere now"
    again = await connected(hub.ports[1])
    known = frame(62, 1, STATIONS[0], STATIONS[1])
    await send(again, known, LAST)
    assert (await heard(guests[0]))[-1] == known
    await send(guests[0], frame(63, 1, STATIONS[1], STATIONS[0]), LAST)
    assert await heard(again) == [frame(63, 1, STATIONS[1], STATIONS[0])], "and nothing from before"


async def test_one_that_does_not_receive_loses_its_frames_and_holds_up_nobody(connected: Connected) -> None:
    """Flooded and full: the third port gets every frame while the second, whose guest offers no buffers, is full."""
    ports = Hub(3, 1, learn=True).ports
    one, third = await connected(ports[0]), await connected(ports[2])
    slow = await connected(ports[1], post=False)
    await slow.running()
    count = 0
    while slow.dropped(0).get("full", 0) < 100:
        await send(one, *[frame(1514, count + n) for n in range(16)])
        assert [data for _, data in await third.receive(16)] == [frame(1514, count + n) for n in range(16)]
        count += 16
        await asyncio.sleep(0)
    assert not third.dropped(0) and not one.dropped(1)
    slow.post()
    got = [data for _, data in await slow.receive(10)]
    assert got == [frame(1514, n) for n in range(len(got))], "those that there was room for come first"


# ---- several pairs of queues


async def second_pairs(one: Interface, other: Interface) -> tuple[SecondPair, SecondPair]:
    """When the first pair of ``other`` receives what was sent there before its second did, and the second does."""
    sender, receiver = SecondPair(one.pair), SecondPair(other.pair)
    other.kick()
    while not receiver.receiver.receive():
        await send(sender, LAST)
    end = frame(99)
    await send(one, end)
    while end not in [data for _, data in await other.receive(1)]:
        pass
    receiver.post()
    return sender, receiver


async def test_each_pair_of_queues_forwards_in_order(connected: Connected) -> None:
    """Frames that a guest transmits on one pair come to the same pair of the other, where somebody receives there."""
    one, other = await guests_of(connected, Hub(2, 2).ports, rings=4)
    pairs = [await second_pairs(one, other), (one, other)]
    before = [other.counted(FRAMES, ring) for ring in (0, 2)]
    for seed in range(20):
        for sender, receiver in pairs:
            frames = [frame(100 + n, seed) for n in range(8)]
            await send(sender, *frames)
            got = []
            while len(got) < len(frames):
                got += [data for _, data in await receiver.receive(1) if data != LAST]
            assert got == frames
    assert other.counted(FRAMES, 0) == before[0] + 160
    assert other.counted(FRAMES, 2) >= before[1] + 160


async def test_frames_for_a_pair_that_nobody_receives_on_come_to_the_first(connected: Connected) -> None:
    """A guest with two CPUs and one with one."""
    ports = Hub(2, 2).ports
    one, other = await connected(ports[0], rings=4), await connected(ports[1])
    await send(SecondPair(one.pair), frame(77))
    assert [data for _, data in await other.receive(1)] == [frame(77)]
