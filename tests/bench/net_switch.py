"""Frames per second between two guests: through our switch against a testpmd that forwards between two of DPDK's ports.

    python tests/bench/net_switch.py [--seconds=1] [--rounds=3] [--size=1500] [--packed] [--huge-pages]

Both guests are DPDK's virtio driver (net_virtio_user in testpmd), one that only transmits and one that only receives.
They share the first CPU, which they poll in turns; on the last one is what is between them: `vhostuser-net
--end=switch`, or a testpmd with two back-ends (net_vhost) that forwards from each to the other. What arrives counts, so
frames that were lost on the way do not: what holds more of them while the receiver has no CPU has an advantage here.
Both take turns, so that a slow moment of the machine hits both; the median round counts. Only the ratio means anything
elsewhere. Status 1 if it is below what the project promises.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.bench.net import FIRST, LAST, huge_pages, rate, started, testpmd  # noqa: E402

MUST = 0.8


def between(sockets: list[Path], ours: bool, options: argparse.Namespace) -> list[str]:
    """The command line of what joins the sockets."""
    if ours:
        tool = [sys.executable, "-P", "-m", "vhostuser.tools.net", "--log-level=error", "--end=switch"]
        return ["taskset", "-c", str(LAST), *tool, *(f"--socket-path={socket}" for socket in sockets)]
    devices = [f"net_vhost{number},iface={socket},queues=1" for number, socket in enumerate(sockets)]
    command = testpmd("between", LAST, devices[0], "io", options)
    command[command.index("--") : command.index("--")] = [f"--vdev={devices[1]}"]
    command.insert(command.index("-i") + 1, "--auto-start")
    return command


def run(ours: bool, options: argparse.Namespace) -> float:
    """Frames per second that arrive, on fresh processes."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name, ExitStack() as stack:
        sockets = [Path(name) / "transmits", Path(name) / "receives"]
        command = between(sockets, ours, options)
        switch = stack.enter_context(started(command, **quiet))
        while not all(socket.exists() for socket in sockets):
            if switch.poll() is not None:
                raise SystemExit(f"{command[0]} ended with status {switch.returncode}")
            time.sleep(0.02)
        guests = []
        for socket, mode in zip(sockets, ("txonly", "rxonly"), strict=True):
            device = f"net_virtio_user0,path={socket},queues=1,queue_size=256,packed_vq={options.packed:d}"
            guests.append(testpmd(socket.name, FIRST, device, mode, options))
        sender = stack.enter_context(started(guests[0], **quiet))
        receiver = stack.enter_context(started(guests[1], stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
        assert sender.stdin is not None
        sender.stdin.write("start\n")
        sender.stdin.flush()
        return rate(receiver, "Rx-pps", options.seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--seconds", type=float, default=1.0, help="of one run, default 1")
    parser.add_argument("--rounds", type=int, default=3, help="default 3")
    parser.add_argument("--size", type=int, default=1500, help="bytes of a frame, 64 to 2036, default 1500")
    parser.add_argument("--packed", action="store_true", help="packed rings")
    parser.add_argument("--huge-pages", action="store_true", help="2 MiB pages for every testpmd; as root")
    options = parser.parse_args()
    if shutil.which("dpdk-testpmd") is None:
        raise SystemExit("dpdk-testpmd is missing: apt-get install dpdk")
    rates: dict[bool, list[float]] = {False: [], True: []}
    with huge_pages(options.huge_pages):
        for _ in range(options.rounds):
            for ours, measured in rates.items():
                measured.append(run(ours, options))
    theirs, ours_ = (statistics.median(rates[ours]) for ours in (False, True))
    print(f"{options.size} bytes, guest to guest: {theirs / 1e3:8.0f}{ours_ / 1e3:8.0f} k frames/s (testpmd, ours)"
          f"   ratio {ours_ / theirs:.2f}, must {MUST}   {'' if ours_ >= MUST * theirs else 'BELOW'}")  # fmt: skip
    print("rounds:", " ".join(f"{a / 1e3:.0f}/{b / 1e3:.0f}" for a, b in zip(rates[False], rates[True], strict=True)))
    return int(ours_ < MUST * theirs)


if __name__ == "__main__":
    sys.exit(main())
