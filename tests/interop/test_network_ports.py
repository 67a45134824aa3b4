"""Two real guests and one process between them, without a tap: what Linux's driver sends arrives, both ways."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest

from vhostuser.devices.net import BYTES, DROPPED, FRAMES
from vhostuser.metrics import value_in
from vhostuser.tools.lab.backend import BackendProcess, Port
from vhostuser.tools.lab.bench import Bench
from vhostuser.tools.lab.guest import Guest
from vhostuser.tools.lab.image import GuestImage
from vhostuser.tools.lab.machine import Hardware
from vhostuser.tools.lab.transfer import PORT, guest_receives

pytestmark = [pytest.mark.interop, pytest.mark.timeout(240)]

MEBIBYTES = 4
VLAN = 5


@pytest.fixture
async def neighbour(image: GuestImage) -> AsyncIterator[Bench]:
    """A bench for the second guest."""
    async with Bench(image) as bench:
        yield bench


@dataclass(frozen=True)
class Side:
    """A guest with its addresses: in the network itself, and behind a tag."""

    guest: Guest
    number: int
    socket: str

    @property
    def address(self) -> str:
        return f"10.77.0.{self.number}"

    @property
    def tagged(self) -> str:
        return f"10.78.0.{self.number}"

    async def up(self) -> None:
        await self.guest.booted()
        await self.guest.run(
            f"ip link set eth0 address 52:54:00:00:00:0{self.number} && ip address add {self.address}/24 dev eth0"
            f" && ip link set eth0 up && ip link add link eth0 name tagged type vlan id {VLAN}"
            f" && ip address add {self.tagged}/24 dev tagged && ip link set tagged up"
        )


async def two(
    bench: Bench, neighbour: Bench, *options: str, offloads: bool = True, **hardware: int
) -> tuple[BackendProcess, Side, Side]:
    """Both guests, up, on two sockets of one back-end; ``offloads``: of the second."""
    other = bench.directory / "other.sock"
    backend = await bench.network(*options, f"--socket-path={other}")
    await bench.machine(Hardware(**hardware), backend)
    await neighbour.machine(Hardware(**hardware, offloads=offloads), Port(other))
    sides = Side(bench.guest, 1, str(backend.socket)), Side(neighbour.guest, 2, str(other))
    await asyncio.gather(*(side.up() for side in sides))
    return backend, *sides


async def pings(one: Side, address: str, *options: str) -> None:
    assert "0% packet loss" in await one.guest.run(f"ping {' '.join(options)} -c 3 -w 20 {address}", within=30)


async def sends(sender: Side, receiver: Side, address: str) -> None:
    """A file over TCP, from ``sender`` at ``address``, arrives byte for byte."""
    data = f"/tmp/data{sender.number}"
    made = await sender.guest.run(f"head -c {MEBIBYTES << 20} /dev/urandom >{data}; md5sum <{data}")
    sender.guest.start(f"nc -l -p {PORT} <{data}")
    await sender.guest.run(f"until netstat -ltn | grep -q :{PORT}; do usleep 10000; done")
    got = await receiver.guest.run(guest_receives(address), within=120)
    assert got.split()[0] == made.split()[0]


async def ports_of(backend: BackendProcess) -> dict[str, Any]:
    shown: dict[str, Any] = (await backend.state())["ports"]
    return shown


async def mean_received(backend: BackendProcess, side: Side) -> float:
    """Bytes of the frames that the guest of a side has received so far."""
    metrics = (await ports_of(backend))[side.socket]["metrics"]
    return value_in(metrics, BYTES, queue=0) / value_in(metrics, FRAMES, queue=0)


async def nothing_was_dropped(backend: BackendProcess) -> None:
    for port in (await ports_of(backend)).values():
        assert not [sample for sample in port["metrics"][DROPPED.name] if sample["value"]]


async def exchange(one: Side, other: Side) -> None:
    for sender, receiver in ((one, other), (other, one)):
        await pings(sender, receiver.address)
        await sends(sender, receiver, sender.address)
    await pings(one, other.tagged)
    await sends(other, one, other.tagged)


async def test_two_guests_on_a_switch(bench: Bench, neighbour: Bench) -> None:
    """With all that their drivers leave to each other."""
    backend, one, other = await two(bench, neighbour, "--end=switch")
    await exchange(one, other)
    assert await mean_received(backend, one) > 1600, "segments longer than a frame passed whole"
    assert await mean_received(backend, other) > 1600
    await nothing_was_dropped(backend)
    assert await backend.stop(within=5) == 0


async def test_a_guest_that_takes_no_offloads(bench: Bench, neighbour: Bench) -> None:
    """Its neighbour leaves everything to it: what that sends is cut, and its checksums are completed, on the way."""
    backend, one, other = await two(bench, neighbour, "--end=switch", offloads=False)
    await exchange(one, other)
    assert await mean_received(backend, other) < 1515
    transmitted = [value_in((await ports_of(backend))[one.socket]["metrics"], of, queue=1) for of in (BYTES, FRAMES)]
    assert transmitted[0] / transmitted[1] > 1600, "segments longer than a frame were sent to it"
    await nothing_was_dropped(backend)


async def test_two_guests_as_peers(bench: Bench, neighbour: Bench) -> None:
    """With two pairs of queues each."""
    backend, one, other = await two(bench, neighbour, "--end=peer", "--queue-pairs=2", cpus=2, pairs=2)
    await exchange(one, other)
    for cpu in (0, 1):
        await one.guest.run(f"taskset -c {cpu} ping -c 3 -w 20 {other.address}", within=30)
    metrics = (await ports_of(backend))[one.socket]["metrics"]
    assert value_in(metrics, FRAMES, queue=1) and value_in(metrics, FRAMES, queue=3)
    await nothing_was_dropped(backend)
