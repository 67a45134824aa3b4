"""A real guest's network over sockets: to passt, and to another QEMU whose hub stands between a socket and a tap."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from vhostuser.devices.capture import LOST
from vhostuser.devices.net import FRAMES
from vhostuser.metrics import value_in
from vhostuser.tools.lab.backend import BackendProcess
from vhostuser.tools.lab.bench import Bench
from vhostuser.tools.lab.machine import Hardware
from vhostuser.tools.lab.namespace import Namespace
from vhostuser.tools.lab.process import Process
from vhostuser.tools.lab.transfer import PORT, guest_sends, host_sends

pytestmark = [pytest.mark.interop, pytest.mark.timeout(180)]

HOST, GUEST = "10.77.0.1", "10.77.0.2"
UP = f"ip address add {GUEST}/24 dev eth0 && ip link set eth0 up"
MEBIBYTES = 4
TAP_MAC = "02:00:00:00:00:01"
"""The guest remembers it when another tap has taken the place of the first."""


async def linked(backend: BackendProcess, start: int) -> None:
    """Waits until somebody is at the other side, which is told behind the first ``start`` lines of the log."""
    await backend.output.find(lambda line: line.endswith("the link is up"), "the link", start=start, within=20)


async def boot(bench: Bench, backend: BackendProcess) -> None:
    await bench.machine(Hardware(), backend)
    await bench.guest.booted()
    await bench.guest.run(UP)


# ---- passt


@asynccontextmanager
async def passt(socket: Path, host: Namespace, *options: str) -> AsyncIterator[Process]:
    """passt in that namespace. --runas: the test's directory belongs to us alone."""
    command = ["passt", "--foreground", "--stderr", "--runas", "0", "--socket", str(socket), *options]
    async with Process("passt", host.command(*command)) as process:
        yield process


@pytest.mark.skipif(not shutil.which("passt"), reason="passt is not installed")
async def test_a_guest_behind_passt(bench: Bench) -> None:
    """TCP both ways, byte for byte; and once more after passt has ended and been started again."""
    host = bench.namespace(f"{HOST}/24")
    host.bridge("uplink0")
    host.run("ip", "route", "add", "default", "via", "10.77.0.254")
    socket = bench.directory / "passt.sock"
    options = ("--address", GUEST, "--netmask", "24", "--no-map-gw", "-t", f"127.0.0.2/{PORT}")
    record = bench.directory / "frames.pcapng"
    backend = await bench.network(f"--end=stream:{socket}", f"--pcap={record}", namespace=host)
    async with passt(socket, host, *options) as first:
        await boot(bench, backend)
        assert await host_sends(bench.guest, HOST, host, MEBIBYTES)
        assert await guest_sends(bench.guest, "127.0.0.2", host, MEBIBYTES)
        assert await first.stop() == 0
    told = len(backend.output.entries)
    async with passt(socket, host, *options):
        await linked(backend, told)
        assert await host_sends(bench.guest, HOST, host, MEBIBYTES)
    await bench.guest.run("ip link set eth0 down")
    state = (await backend.state())["metrics"]
    moved = sum(value_in(state, FRAMES, queue=queue) for queue in (0, 1))
    assert await backend.stop(within=5) == 0
    if shutil.which("capinfos"):
        told = await asyncio.to_thread(subprocess.check_output, ["capinfos", "-rTMc", str(record)], text=True)
        assert int(told.split()[1]) + value_in(state, LOST) == moved > 2 * MEBIBYTES << 20 >> 11


# ---- QEMU


@asynccontextmanager
async def qemu(host: Namespace, netdev: str) -> AsyncIterator[None]:
    """A QEMU without a guest, whose hub has ``netdev`` and a tap of the host's, which has our address."""
    ports = [f"hubport,id=port{number},hubid=0,netdev={end}" for number, end in enumerate(("end", "tap"))]
    netdevs = [f"{netdev},id=end", "tap,id=tap,ifname=tap0,script=no,downscript=no", *ports]
    command = ["qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none"]
    for each in netdevs:
        command += ["-netdev", each]
    async with Process("hub", host.command(*command)) as process:
        while not (Path("/run/netns") / host.name).exists() or "tap0" not in host.run("ip", "link"):
            assert process.running, process.output.entries
            await asyncio.sleep(0.05)
        host.run("ip", "link", "set", "tap0", "address", TAP_MAC)
        host.address_to("tap0")
        yield


async def exchange(bench: Bench, host: Namespace) -> None:
    assert "0% packet loss" in await bench.guest.run(f"ping -c 2 -w 20 {HOST}", within=30)
    assert await host_sends(bench.guest, HOST, host, MEBIBYTES)
    assert await guest_sends(bench.guest, GUEST, host, MEBIBYTES)


@pytest.mark.parametrize("listens", [False, True], ids=["it listens", "we listen"])
async def test_a_guest_behind_the_stream_of_another_qemu(bench: Bench, listens: bool) -> None:
    """And behind the next one, after the first was killed."""
    host = bench.namespace(f"{HOST}/24")
    socket = bench.directory / "stream.sock"
    backend = await bench.network(f"--end=stream:{'listen=' * listens}{socket}", namespace=host)
    netdev = f"stream,server={'off' if listens else 'on'},addr.type=unix,addr.path={socket}"
    async with qemu(host, netdev):
        await boot(bench, backend)
        await exchange(bench, host)
    if not listens:
        socket.unlink()
    told = len(backend.output.entries)
    async with qemu(host, netdev):
        await linked(backend, told)
        await exchange(bench, host)
    assert await backend.stop(within=5) == 0
    assert socket.exists() is not listens


async def test_a_guest_behind_the_datagrams_of_another_qemu(bench: Bench) -> None:
    host = bench.namespace(f"{HOST}/24")
    ours, qemus = bench.directory / "ours.sock", bench.directory / "qemus.sock"
    backend = await bench.network(f"--end=dgram:local={ours},remote={qemus}", namespace=host)
    netdev = f"dgram,local.type=unix,local.path={qemus},remote.type=unix,remote.path={ours}"
    async with qemu(host, netdev):
        await boot(bench, backend)
        await exchange(bench, host)
    assert await backend.stop(within=5) == 0
    assert not ours.exists()
