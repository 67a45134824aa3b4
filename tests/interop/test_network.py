"""A real guest's network: to the host through a tap, with everything that Linux's driver negotiates and without."""

from __future__ import annotations

import pytest

from vhostuser.devices.net import BYTES, DROPPED, FRAMES
from vhostuser.metrics import Metric, value_in
from vhostuser.tools.lab.backend import BackendProcess
from vhostuser.tools.lab.bench import Bench
from vhostuser.tools.lab.machine import Hardware
from vhostuser.tools.lab.namespace import Namespace
from vhostuser.tools.lab.transfer import guest_sends, host_sends

pytestmark = [pytest.mark.interop, pytest.mark.timeout(180)]

HOST, GUEST = "10.77.0.1", "10.77.0.2"
UP = f"ip address add {GUEST}/24 dev eth0 && ip link set eth0 up"
MEBIBYTES = 4


async def boot(bench: Bench, *options: str, **hardware: int) -> tuple[Namespace, BackendProcess]:
    """A guest on a tap in a namespace of its own, both with an address."""
    host = bench.namespace(f"{HOST}/24")
    backend = await bench.network("--end=tap:tap0", *options, namespace=host)
    host.address_to("tap0")
    await bench.machine(Hardware(**hardware), backend)
    await bench.guest.booted()
    await bench.guest.run(UP)
    return host, backend


async def counted(backend: BackendProcess, metric: Metric, queue: int) -> int:
    return int(value_in((await backend.state())["metrics"], metric, queue=queue))


async def nothing_was_dropped(backend: BackendProcess) -> None:
    shown = (await backend.state())["metrics"][DROPPED.name]
    assert not [sample for sample in shown if sample["value"]]


async def exchange(bench: Bench, host: Namespace) -> None:
    """Files both ways, byte for byte."""
    assert await host_sends(bench.guest, HOST, host, MEBIBYTES)
    assert await guest_sends(bench.guest, GUEST, host, MEBIBYTES)


async def test_a_guest_and_the_host_through_a_tap(bench: Bench) -> None:
    """TCP with the segmentation that both sides leave to each other, then with none of it, then with jumbo frames."""
    host, backend = await boot(bench)
    assert "0% packet loss" in await bench.guest.run(f"ping -c 3 -w 20 {HOST}", within=30)
    await exchange(bench, host)
    for queue in (0, 1):
        assert await counted(backend, BYTES, queue) > MEBIBYTES << 20
    mean = await counted(backend, BYTES, 0) / await counted(backend, FRAMES, 0)
    assert mean > 1600, "segments longer than a frame came in"

    await bench.guest.run("ip link set eth0 down && rmmod virtio_net && insmod /modules/virtio_net.ko csum=0 gso=0")
    await bench.guest.run(UP)
    await exchange(bench, host)

    host.run("ip", "link", "set", "tap0", "mtu", "9000")
    await bench.guest.run("ip link set eth0 mtu 9000")
    assert "0% packet loss" in await bench.guest.run(f"ping -s 8000 -c 2 -w 20 {HOST}", within=30)
    await exchange(bench, host)
    await nothing_was_dropped(backend)
    assert await backend.stop(within=5) == 0


async def test_two_pairs_of_queues(bench: Bench) -> None:
    host, backend = await boot(bench, "--queue-pairs=2", cpus=2, pairs=2)
    # One stream from each CPU: each sends through the ring of its own.
    for cpu in (0, 1):
        assert "0% packet loss" in await bench.guest.run(f"taskset -c {cpu} ping -c 3 -w 20 {HOST}", within=30)
    await exchange(bench, host)
    assert await counted(backend, FRAMES, 1) and await counted(backend, FRAMES, 3)
    await nothing_was_dropped(backend)
