"""TCP between a guest and the host: through our tap, and through the one of QEMU's own virtio-net, in the same guest.

    python tests/bench/net_tap.py [--rounds=5] [--mebibytes=256]

One QEMU has both interfaces, with the same offloads and ring sizes; they take turns, so that a slow moment of the
machine hits both, and the median round counts. TCP is as fast as the CPUs are: the guest runs under TCG, which is most
of the work on either side, so that a ratio of 1 says that the back-end is not what is waited for, and no more. All is
in a network namespace that ends with this program; it takes root. Status 1 if a ratio is below what is promised.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from vhostuser.tools.lab.bench import Bench  # noqa: E402
from vhostuser.tools.lab.image import guest_image  # noqa: E402
from vhostuser.tools.lab.machine import Hardware  # noqa: E402

MUST = 0.9
INSIDE = "--inside"
PORT = 8000
MEMORY = 640
# The last octets of the networks of both: the host has .1, the guest .2.
OURS, QEMUS = "10.77.0", "10.78.0"


class Both(Hardware):
    """Beside the vhost-user interface one of QEMU's own, made alike."""

    def arguments(self, disks: Sequence[Path], networks: Sequence[Path] = ()) -> list[str]:
        own = "virtio-net-pci,netdev=own,mac=52:54:00:00:01:00,vectors=0"
        tap = "tap,id=own,ifname=own0,script=no,downscript=no"
        return [*super().arguments(disks, networks), "-netdev", tap, "-device", own]


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


# ---- one transfer

Transfer = Callable[[str], Coroutine[Any, Any, float]]
"""Over that network; seconds."""


def from_guest(network: str, size: int) -> float:
    """Seconds in which the guest's server sends that many bytes."""
    with socket.create_connection((f"{network}.2", PORT), timeout=60) as connection:
        connection.sendall(b"GET /data HTTP/1.0\r\n\r\n")
        buffer = bytearray(1 << 20)
        got, began = 0, time.monotonic()
        while count := connection.recv_into(buffer):
            got += count
    if got < size:
        raise SystemExit(f"only {got} bytes came")
    return time.monotonic() - began


def serve(listener: socket.socket, size: int) -> float:
    """Seconds in which one client takes that many bytes."""
    with listener.accept()[0] as connection:
        connection.recv(4096)
        connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        piece = bytes(1 << 20)
        began = time.monotonic()
        for _ in range(size >> 20):
            connection.sendall(piece)
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)
    return time.monotonic() - began


async def to_guest(bench: Bench, network: str, size: int) -> float:
    with socket.create_server((f"{network}.1", PORT)) as listener:
        taking = asyncio.ensure_future(asyncio.to_thread(serve, listener, size))
        await bench.guest.run(f"wget -q -O /dev/null http://{network}.1:{PORT}/")
        return await taking


# ---- all of them


def cpu(*pids: int) -> float:
    """CPU seconds that these processes have used so far."""
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


async def set_up(bench: Bench, mebibytes: int) -> tuple[int, int]:
    """Boots the guest, with addresses and a server; the process ids of the machine and of our back-end."""
    backend = await bench.network("--end=tap:ours0", "--log-level=error")
    machine = await bench.machine(Both(memory=MEMORY), backend)
    await bench.guest.booted()
    for number, (tap, network) in enumerate((("ours0", OURS), ("own0", QEMUS))):
        ip("address", "add", f"{network}.1/24", "dev", tap)
        ip("link", "set", tap, "up")
        await bench.guest.run(f"ip address add {network}.2/24 dev eth{number} && ip link set eth{number} up")
    await bench.guest.run(f"mkdir /tmp/www; head -c {mebibytes << 20} /dev/zero >/tmp/www/data")
    await bench.guest.run(f"httpd -p {PORT} -h /tmp/www")
    return machine.pid, backend.pid


async def compare(name: str, transfer: Transfer, rounds: int, mebibytes: int, pids: Sequence[int]) -> bool:
    seconds: dict[str, list[float]] = {OURS: [], QEMUS: []}
    used: dict[str, list[float]] = {OURS: [], QEMUS: []}
    for network in seconds:
        await transfer(network)  # QEMU translates the guest's code
    for _ in range(rounds):
        for network in seconds:
            before = cpu(*pids)
            seconds[network].append(await transfer(network))
            used[network].append(cpu(*pids) - before)
    ours, qemus = (statistics.median(seconds[network]) for network in (OURS, QEMUS))
    spent = statistics.median(used[OURS]) / statistics.median(used[QEMUS])
    print(
        f"{name}: ours {mebibytes / ours:.0f} MiB/s, QEMU's {mebibytes / qemus:.0f} MiB/s, "
        f"ratio {qemus / ours:.2f} (at least {MUST}); CPU time of both processes {spent:.2f} times QEMU's"
    )
    return qemus / ours >= MUST


async def measure(rounds: int, mebibytes: int) -> bool:
    size = mebibytes << 20
    async with Bench(guest_image()) as bench:
        pids = await set_up(bench, mebibytes)
        directions: dict[str, Transfer] = {
            "guest to host": lambda network: asyncio.to_thread(from_guest, network, size),
            "host to guest": lambda network: to_guest(bench, network, size),
        }
        good = [await compare(name, transfer, rounds, mebibytes, pids) for name, transfer in directions.items()]
    return all(good)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mebibytes", type=int, default=256)
    parser.add_argument(INSIDE, action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.inside:
        os.execvp("unshare", ["unshare", "--net", sys.executable, *sys.argv, INSIDE])
    ip("link", "set", "lo", "up")
    sys.exit(0 if asyncio.run(measure(options.rounds, options.mebibytes)) else 1)


if __name__ == "__main__":
    main()
