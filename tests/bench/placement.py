"""What it costs to place guest memory in the background while other processes share it, against plain pwrite.

    python tests/bench/placement.py [--rounds=5] [--mib=256] [--clients=1,2,4,8] [--fifo]

The same bytes are placed into a new memfd by a fault server with that many idle clients, under each wake policy, and
written into one by a C program that has nobody to wake (placement_floor.c). All take turns; the best round counts,
since whatever else the machine does only ever adds. Only ratios mean anything elsewhere. Status 1 if one is worse than
what the project promises.

At last pages come from other processes that are slow, over one stream and over four.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.faultserver.conftest import PAGE, Process, SharedMemory  # noqa: E402
from vhostuser.faultserver import (  # noqa: E402
    Channels,
    FaultServer,
    FilePiece,
    MappedFile,
    Placement,
    StreamSource,
    WakePolicy,
)
from vhostuser.uffd import Mode  # noqa: E402

CHUNK = 64 * PAGE
"""Bytes of a write of the floor: as many pages as a placement of ours has."""
BOTH = Mode.MISSING | Mode.MINOR


def floor(program: Path, size: int) -> float:
    """Seconds of one filling by pwrite."""
    found = subprocess.run([program, str(size), str(CHUNK), "1"], capture_output=True, text=True, check=True)
    return int(found.stdout) / 1e9


def image_file(size: int) -> int:
    """A file of bytes to place; resident."""
    fd = os.memfd_create("image", os.MFD_CLOEXEC)
    for at in range(0, size, 1 << 20):
        os.pwrite(fd, b"\1" * min(1 << 20, size - at), at)
    return fd


def image(size: int) -> MappedFile:
    """The same, mapped."""
    fd = image_file(size)
    source = MappedFile(FilePiece(0, size, fd))
    os.close(fd)
    return source


def place(source: MappedFile, size: int, clients: int, wake: WakePolicy, placement: Placement) -> float:
    """Seconds in which a server with so many idle clients places everything."""
    memory = SharedMemory((0, size))
    mode = BOTH if placement is Placement.CONTINUE else Mode.MISSING
    processes = [Process(memory, mode) for _ in range(clients)]
    try:
        with FaultServer(memory, source, wake=wake, placement=placement) as server:
            for process in processes:
                server.add_client("idle", process.uffd, process.regions, mode=mode)
            start = time.perf_counter()
            server.prefetch()
            assert server.wait()
            return time.perf_counter() - start
    finally:
        for process in processes:
            process.close()
        memory.close()


SLOW, SLOW_SIZE = 32 << 20, 16 << 20
"""Bytes a second that one stream carries, and bytes that are brought."""


def bring(paths: Sequence[Path], size: int, placement: Placement) -> float:
    """Seconds in which streams to these sockets bring everything."""
    memory = SharedMemory((0, size))
    mode = BOTH if placement is Placement.CONTINUE else Mode.MISSING
    process = Process(memory, mode)
    channels = Channels(*(StreamSource(partial(connected, path)) for path in paths))
    try:
        with FaultServer(memory, channels, placement=placement) as server:
            server.add_client("idle", process.uffd, process.regions, mode=mode)
            start = time.perf_counter()
            server.prefetch()
            assert server.wait()
            return time.perf_counter() - start
    finally:
        process.close()
        memory.close()


def connected(path: Path) -> socket.socket:
    """To a process that serves pages."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(str(path))
    return sock


@contextmanager
def servers(directory: Path, count: int, bandwidth: int) -> Iterator[list[Path]]:
    """So many processes that serve pages, each on a socket of its own."""
    paths = [directory / f"pages{number}" for number in range(count)]
    command = [sys.executable, "-m", "tests.faultserver.source"]
    with ExitStack() as stack:
        for path in paths:
            words = [*command, str(path), "0", str(bandwidth)]
            process = stack.enter_context(subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE))
            stack.callback(process.kill)
            assert process.stdout is not None
            process.stdout.readline()
        yield paths


def streams(directory: Path, rounds: int) -> bool:
    """One stream and four, to slow sources: how much sooner everything is there."""
    good = True
    with servers(directory, 4, SLOW) as paths:
        for placement in (Placement.COPY, Placement.CONTINUE):
            pairs = [[bring(some, SLOW_SIZE, placement) for some in (paths[:1], paths)] for _ in range(rounds)]
            one, four = (min(column) for column in zip(*pairs, strict=True))
            label = f"four streams / one, {SLOW >> 20} MiB/s each, {placement.name}"
            good &= line(label, one / four, least=3.0)
    return good


def line(label: str, ratio: float, *, least: float | None = None, most: float | None = None) -> bool:
    """Prints a ratio; whether it is what it must be."""
    good = (least is None or ratio >= least) and (most is None or ratio <= most)
    limit = f"   must be at least {least}" if least is not None else f"   must be at most {most}" if most else ""
    print(f"  {label:52}{ratio:6.2f}{limit}{'' if good else '  MISSED'}")
    return good


Case = tuple[int, WakePolicy, Placement]


def measure(program: Path, size: int, cases: list[Case], rounds: int) -> tuple[float, dict[Case, float]]:
    """The floor's and each case's best time; they take turns."""
    source = image(size)
    floors: list[float] = []
    times: dict[Case, list[float]] = {case: [] for case in cases}
    place(source, size, 1, WakePolicy.BATCH, Placement.COPY)  # what is done once is not measured
    for _ in range(rounds):
        floors.append(floor(program, size))
        for case in cases:
            times[case].append(place(source, size, *case))
    source.close()
    return min(floors), {case: min(each) for case, each in times.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument("--mib", type=int, default=256, help="default 256")
    parser.add_argument("--clients", default="1,2,4,8", help="numbers of idle clients; default 1,2,4,8")
    parser.add_argument("--fifo", action="store_true", help="real-time priority, so that other load counts less (root)")
    options = parser.parse_args()
    if options.fifo:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))
    numbers = [int(word) for word in options.clients.split(",")]
    size = options.mib << 20
    cases: list[Case] = [(number, wake, Placement.COPY) for number in numbers for wake in WakePolicy]
    cases += [(numbers[0], WakePolicy.BATCH, Placement.CONTINUE)]
    with tempfile.TemporaryDirectory() as name:
        program = Path(name) / "floor"
        subprocess.run(["gcc", "-O2", Path(__file__).with_name("placement_floor.c"), "-o", program], check=True)
        pwrite, times = measure(program, size, cases, options.rounds)
        good = streams(Path(name), options.rounds)
    pages = size // PAGE
    print(f"{options.mib} MiB in pages of {PAGE} bytes, pages/s; pwrite: {pages / pwrite:,.0f}")
    print(f"  {'idle clients':14}" + "".join(f"{wake.name.lower():>12}" for wake in WakePolicy))
    for number in numbers:
        row = (pages / times[number, wake, Placement.COPY] for wake in WakePolicy)
        print(f"  {number:<14}" + "".join(f"{speed:12,.0f}" for speed in row))
    few, many = numbers[0], numbers[-1]

    def of(number: int, wake: WakePolicy) -> float:
        return times[number, wake, Placement.COPY]

    for number in numbers:
        good &= line(f"batch / pwrite, {number} clients", pwrite / of(number, WakePolicy.BATCH), least=0.85)
    good &= line(
        f"batch / broadcast, {many} clients", of(many, WakePolicy.BROADCAST) / of(many, WakePolicy.BATCH), least=2.5
    )
    for wake in (WakePolicy.DEMAND, WakePolicy.BATCH):
        good &= line(f"time of {wake.name.lower()}, {many} clients / {few}", of(many, wake) / of(few, wake), most=1.1)
    line("CONTINUE / pwrite, batch", pwrite / times[cases[-1]])
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
