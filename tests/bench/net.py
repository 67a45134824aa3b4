"""Frames per second: our network back-end against DPDK's, driven by the same front-end.

    python tests/bench/net.py [--seconds=1] [--rounds=5] [--size=64] [--packed] [--huge-pages]

The front-end is DPDK's virtio driver (net_virtio_user in testpmd): one queue, its thread on the first CPU and the
back-end's on the last. It transmits into our `sink` and receives from our `source`, which copy each byte out of guest
memory and into it; then the same with the back-end of DPDK (net_vhost in another testpmd, `rxonly` and `txonly`), which
copies too. Both sides poll: whatever else runs on one of the CPUs costs a multiple of its time, so such a run is done
again. The back-ends take turns; the best round of each counts. Only the ratios mean anything elsewhere. Status 1 if one
is below what the project promises.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
MUST, GOAL = 1.0, 1.2
FIRST, LAST = min(os.sched_getaffinity(0)), max(os.sched_getaffinity(0))
QUIET = 0.03  # of a CPU: what others may use during a run, which is otherwise done again
TRIES = 4
HUGE_PAGES = Path("/proc/sys/vm/nr_hugepages")
NEEDED_PAGES = 340  # of 2 MiB, for two testpmd


@dataclass(frozen=True)
class Direction:
    """What each side does. counter: which of the front-end's port counters is the result."""

    name: str
    frontend: str
    dpdk: str
    ours: str
    counter: str


DIRECTIONS = (
    Direction("guest to back-end", "txonly", "rxonly", "sink", "Tx-pps"),
    Direction("back-end to guest", "rxonly", "txonly", "source:{size}", "Rx-pps"),
)


def testpmd(prefix: str, cpu: int, vdev: str, mode: str, options: argparse.Namespace) -> list[str]:
    """The command line of one testpmd whose threads share a CPU; the one that waits for commands sleeps."""
    memory = ["--no-huge", "-m", "256", "--no-shconf"]
    if options.huge_pages:
        memory = ["--socket-mem=300", "--single-file-segments", f"--file-prefix={prefix}"]
    lcores = f"--lcores=0@{cpu},1@{cpu}"
    forward = [f"--forward-mode={mode}", "--nb-cores=1", "--total-num-mbufs=8192", f"--txpkts={options.size}"]
    return ["dpdk-testpmd", lcores, "--no-pci", "--no-telemetry", *memory, f"--vdev={vdev}", "--", "-i", *forward]


@contextlib.contextmanager
def started(command: Sequence[str], **options: object) -> Iterator[subprocess.Popen[str]]:
    """A child until the end of the block."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=env, text=True, stdin=subprocess.PIPE, **options) as process:  # type: ignore[call-overload]
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)


def ticks(cpu: int) -> int:
    """What a CPU has done so far beside idling, in clock ticks."""
    (line,) = (line for line in Path("/proc/stat").read_text().splitlines() if line.startswith(f"cpu{cpu} "))
    user, nice, system, _, _, *rest = map(int, line.split()[1:9])
    return user + nice + system + sum(rest)


def own_ticks(process: subprocess.Popen[str]) -> int:
    """What a process has used of its CPU so far."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def others(backend: subprocess.Popen[str], frontend: subprocess.Popen[str]) -> int:
    """What everybody else has used of both CPUs so far."""
    return sum(map(ticks, {FIRST, LAST})) - own_ticks(backend) - own_ticks(frontend)


def rate(
    backend: subprocess.Popen[str], frontend: subprocess.Popen[str], counter: str, seconds: float
) -> tuple[float, float]:
    """Frames per second as the front-end counts them, and which part of a CPU everybody else has used meanwhile.

    The front-end says what happened since it was asked last; and all at its end, for its output is buffered.
    """
    assert frontend.stdin is not None
    used = []
    for command, pause in (("start", 1.5), ("show port stats 0", seconds), ("show port stats 0", 0.0), ("quit", 0.0)):
        if command.startswith("show"):
            used.append(others(backend, frontend))
        frontend.stdin.write(command + "\n")
        frontend.stdin.flush()
        time.sleep(pause)
    said = frontend.communicate(timeout=20)[0]
    found = re.findall(rf"{counter}: +(\d+)", said)
    if len(found) < 2:
        raise SystemExit(f"testpmd says nothing of {counter}:\n{said}")
    return float(found[-1]), (used[1] - used[0]) / os.sysconf("SC_CLK_TCK") / seconds


def run(direction: Direction, ours: bool, options: argparse.Namespace) -> tuple[float, float]:
    """One run on fresh processes: as ``rate``."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        socket = Path(name) / "socket"
        command = testpmd("back", LAST, f"net_vhost0,iface={socket},queues=1", direction.dpdk, options)
        command.insert(command.index("-i") + 1, "--auto-start")
        if ours:
            tool = [sys.executable, "-P", "-m", "vhostuser.tools.net", "--log-level=warn"]
            command = ["taskset", "-c", str(LAST), *tool, f"--socket-path={socket}"]
            command.append("--end=" + direction.ours.format(size=options.size))
        device = f"net_virtio_user0,path={socket},queues=1,queue_size=256,packed_vq={options.packed:d}"
        front = testpmd("front", FIRST, device, direction.frontend, options)
        with started(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as backend:
            while not socket.exists():
                if backend.poll() is not None:
                    raise SystemExit(f"{command[0]} ended with status {backend.returncode}")
                time.sleep(0.02)
            with started(front, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
                return rate(backend, process, direction.counter, options.seconds)


def quiet_run(direction: Direction, ours: bool, options: argparse.Namespace) -> float:
    """Frames per second of the first run in which nobody else was there, or of the quietest of some."""
    runs: list[tuple[float, float]] = []
    while len(runs) < TRIES and all(disturbance > QUIET for _, disturbance in runs):
        runs.append(run(direction, ours, options))
    return min(runs, key=lambda one: one[1])[0]


@contextlib.contextmanager
def huge_pages(wanted: bool) -> Iterator[None]:
    """Enough of them for the time of the block."""
    before = HUGE_PAGES.read_text()
    if wanted:
        HUGE_PAGES.write_text(str(int(before) + NEEDED_PAGES))
    try:
        yield
    finally:
        if wanted:
            HUGE_PAGES.write_text(before)


def measure(options: argparse.Namespace) -> dict[tuple[Direction, bool], list[float]]:
    """Every direction with both back-ends, in turns."""
    rates: dict[tuple[Direction, bool], list[float]] = {}
    with huge_pages(options.huge_pages):
        for _ in range(options.rounds):
            for direction in DIRECTIONS:
                for ours in (False, True):
                    rates.setdefault((direction, ours), []).append(quiet_run(direction, ours, options))
    return rates


def report(rates: dict[tuple[Direction, bool], list[float]]) -> bool:
    """Prints the table; whether both ratios are what they must be."""
    good = True
    for direction in DIRECTIONS:
        theirs, ours = (max(rates[direction, which]) for which in (False, True))
        rounds = " ".join(f"{rate / 1e6:.1f}" for which in (False, True) for rate in rates[direction, which])
        verdict = "" if ours >= MUST * theirs else "  BELOW"
        print(f"{direction.name:20}{theirs / 1e6:8.2f}{ours / 1e6:8.2f} M frames/s (net_vhost, ours)"
              f"   ratio {ours / theirs:.2f}, must {MUST}, goal {GOAL}{verdict}   rounds {rounds}")  # fmt: skip
        good &= ours >= MUST * theirs
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--seconds", type=float, default=1.0, help="of one run, default 1")
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument("--size", type=int, default=64, help="bytes of a frame, 64 to 2036, default 64")
    parser.add_argument("--packed", action="store_true", help="packed rings")
    parser.add_argument("--huge-pages", action="store_true", help="2 MiB pages for both testpmd; as root")
    options = parser.parse_args()
    if shutil.which("dpdk-testpmd") is None:
        raise SystemExit("dpdk-testpmd is missing: apt-get install dpdk")
    return 0 if report(measure(options)) else 1


if __name__ == "__main__":
    sys.exit(main())
