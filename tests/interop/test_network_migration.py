"""A guest migrates with its network: a TCP connection through two taps on one bridge survives and loses no byte."""

from __future__ import annotations

import asyncio
import sys

import pytest

from vhostuser.devices.net import BYTES
from vhostuser.metrics import Metric, value_in
from vhostuser.tools.lab.backend import BackendProcess
from vhostuser.tools.lab.bench import Bench
from vhostuser.tools.lab.machine import Hardware, Machine, mac
from vhostuser.tools.lab.namespace import Namespace
from vhostuser.tools.lab.observation import observe_postcopy
from vhostuser.tools.lab.process import Process
from vhostuser.tools.lab.transfer import Stream

pytestmark = [pytest.mark.interop, pytest.mark.timeout(180)]

HOST, GUEST = "10.77.0.1", "10.77.0.2"
UP = f"ip address add {GUEST}/24 dev eth0 && ip link set eth0 up"
HARDWARE = Hardware()
RECEIVES = 0
MOVED = 4 << 20
WAITS = 1 << 20
"""Bytes that have come and are read by nobody; about 3.5 MB are seen."""


# A bridge has to hear a guest first, and TCP's next attempt may be seconds away: these frames come to all ports at
# once.
BROADCASTS = """
import socket, time
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
    sender.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    sender.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"bridge0")
    while True:
        sender.sendto(bytes(1400), ("255.255.255.255", 9))
        time.sleep(0.002)
"""


class Scene:
    """A guest on a tap, a destination on another one, both taps on a bridge of the host."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench

    async def set(self) -> None:
        bench = self._bench
        self.host: Namespace = bench.namespace(f"{HOST}/24")
        self.before, self.after = [
            await bench.network(f"--end=tap:tap{number}", namespace=self.host) for number in range(2)
        ]
        self.host.bridge("bridge0", "tap0", "tap1")
        self.source: Machine = await bench.machine(HARDWARE, self.before)
        await bench.guest.booted()
        await bench.guest.run(UP)
        self.destination: Machine = await bench.destination(HARDWARE, self.after)

    def port_of_guest(self) -> str:
        """The interface at which the bridge has heard the guest last."""
        entries = self.host.run("bridge", "fdb", "show", "br", "bridge0").splitlines()
        (port,) = {words[2] for words in map(str.split, entries) if words[0] == mac(0) and "permanent" not in words}
        return port


async def counted(backend: BackendProcess, metric: Metric, queue: int) -> int:
    return int(value_in((await backend.state())["metrics"], metric, queue=queue))


async def more_received(backend: BackendProcess, more: int) -> None:
    """Waits until the guest has received so many bytes more through ``backend``."""
    enough = await counted(backend, BYTES, RECEIVES) + more
    async with asyncio.timeout(60):
        while await counted(backend, BYTES, RECEIVES) < enough:  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(0.05)


async def test_a_connection_survives_precopy(bench: Bench) -> None:
    """What comes while memory is sent is in the dirty log: no byte is lost, and the bridge hears where the guest is."""
    scene = Scene(bench)
    await scene.set()
    migration = bench.migration(scene.source, scene.destination)
    async with Stream(bench.guest, HOST, scene.host) as stream:
        await more_received(scene.before, MOVED)
        await migration.start()
        await migration.completed()
        await scene.source.quit()
        await more_received(scene.after, MOVED)
        assert scene.port_of_guest() == "tap1"
        assert await stream.arrived()


async def test_the_dirty_log_has_what_was_received(bench: Bench) -> None:
    """What comes when all memory has been sent once, and is read by nobody before the end, is sent again."""
    scene = Scene(bench)
    await scene.set()
    migration = bench.migration(scene.source, scene.destination, bandwidth=20_000_000)
    await bench.guest.run("echo 4096 4194304 4194304 >/proc/sys/net/ipv4/tcp_rmem")
    async with Stream(bench.guest, HOST, scene.host) as stream:
        await more_received(scene.before, MOVED)
        # Faster than it can be sent, so that there is no end before there is to be one.
        bench.guest.start(
            "while [ ! -e /tmp/stop ]; do dd if=/dev/urandom of=/tmp/churn bs=1M count=16 conv=notrunc; done"
        )
        await migration.start()
        await scene.source.event("MIGRATION_PASS", **{"pass": 2})
        await bench.guest.run("killall -STOP nc")
        await bench.guest.run(f"until [ $(netstat -tn | awk '/{HOST}/ {{ print $2 }}') -ge {WAITS} ]; do :; done")
        assert (await migration.progress())["status"] == "active"
        await bench.guest.run("touch /tmp/stop")
        await migration.release()
        await migration.completed()
        await bench.guest.run("killall -CONT nc")
        await more_received(scene.after, MOVED)
        assert await stream.arrived()


@pytest.mark.postcopy
async def test_a_connection_survives_postcopy(bench: Bench) -> None:
    """Frames go on to come while memory is still on its way; for how many of them a page is missing is chance.

    What happens to these is shown in tests/runtime/test_net_postcopy.py.
    """
    scene = Scene(bench)
    await scene.set()
    migration = bench.migration(scene.source, scene.destination, postcopy=True)
    # What it makes dirty has to come as well, so that there is time in which frames meet missing pages.
    bench.guest.start("while dd if=/dev/urandom of=/tmp/churn bs=1M count=32 conv=notrunc; do :; done")
    async with Stream(bench.guest, HOST, scene.host) as stream:
        async with Process("broadcasts", scene.host.command(sys.executable, "-c", BROADCASTS)):
            await more_received(scene.before, MOVED)
            await migration.start()
            await migration.switch()
            seen = await observe_postcopy(migration, scene.after, faults=20, requests=50)
        assert seen.bases and not seen.wrong_bases
        await scene.source.quit()
        await more_received(scene.after, MOVED)
        assert scene.port_of_guest() == "tap1"
        assert await stream.arrived()
