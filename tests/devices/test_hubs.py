"""The hub and the switch through real connections: who hears whom, and what is lost."""

from __future__ import annotations

from tests.devices.interface import Connected, frame
from vhostuser.devices.ends import Hub
from vhostuser.devices.net import FRAMES


async def test_peers_hear_each_other(connected: Connected) -> None:
    one, other = [await connected(port) for port in Hub(2, 1).ports]
    for size in (60, 1514):
        one.send(frame(size, 1))
        other.send(frame(size, 2))
        assert [data for _, data in await other.receive(1)] == [frame(size, 1)]
        assert [data for _, data in await one.receive(1)] == [frame(size, 2)]


STATIONS = [bytes([2, 0, 0, 0, 0, number]) for number in range(4)]


async def test_a_switch_learns_who_is_where(connected: Connected) -> None:
    """802.1D, 7.7 and 7.8: to everybody while the station was not heard, then to its port alone."""
    guests = [await connected(port) for port in Hub(3, 1, learn=True).ports]

    async def hears(number: int, *expected: bytes) -> None:
        assert [data for _, data in await guests[number].receive(len(expected))] == list(expected)

    unknown = frame(60, 1, STATIONS[1], STATIONS[0])
    guests[0].send(unknown)
    await hears(1, unknown)
    await hears(2, unknown)
    answer = frame(60, 2, STATIONS[0], STATIONS[1])
    guests[1].send(answer)
    await hears(0, answer)
    known, all_of_them = frame(60, 3, STATIONS[1], STATIONS[0]), frame(60, 4, source=STATIONS[0])
    guests[0].send(known, all_of_them)
    await hears(1, known, all_of_them)
    await hears(2, all_of_them)
    # The station moves.
    moved = frame(60, 5, STATIONS[0], STATIONS[1])
    guests[2].send(moved)
    await hears(0, moved)
    guests[0].send(known)
    await hears(2, known)
    # To oneself: nobody else has to hear it.
    guests[0].send(frame(60, 6, STATIONS[0], STATIONS[0]), all_of_them)
    await hears(1, all_of_them)
    await hears(2, all_of_them)


async def test_frames_for_one_who_does_not_receive_are_lost_and_counted(connected: Connected) -> None:
    one, other = [await connected(port) for port in Hub(2, 1).ports]
    await other.pair.frontend.set_vring_enable(0, False)
    for _ in range(200):
        one.send(*[frame(60)] * 30)
        await one.sent(30)
    await other.pair.frontend.set_vring_enable(0, True)
    got = await other.receive(4096)
    assert len(got) == 4096 and other.dropped(0) == {"full": 200 * 30 - 4096}
    assert one.counted(FRAMES, 1) == 6000


async def test_frames_for_whoever_was_there_before_are_forgotten(connected: Connected) -> None:
    one, other = [await connected(port) for port in Hub(2, 1).ports]
    for ring in other.pair.rings:
        await other.pair.frontend.stop_ring(ring)
    one.send(frame(60))
    await one.sent(1)
    for ring in other.pair.rings:
        await other.pair.frontend.start_ring(ring, other.pair.memory)  # type: ignore[arg-type]
    await other.running()
    one.send(frame(61))
    assert [len(data) for _, data in await other.receive(1)] == [61]
