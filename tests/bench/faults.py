"""What a missing page costs a request of the block engine, against the least that it can cost.

    python tests/bench/faults.py [--rounds=5] [--fifo]

fault_floor.c says what is measured. Floor and engine take turns, against the same server on the same CPUs; the median
round counts. Only the ratios mean anything elsewhere, and even they need a machine that does little else, or --fifo.
Status 1 if one is above what the project promises.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
NATIVE = ROOT / "vhostuser" / "native"
THREADS = 32
"""As many as vhostuser.uffd.TouchPool has unless told otherwise."""
MOST = 1.3
"""An engine's fault, as a multiple of the floor's."""
SOURCE_US, PAGES, MOST_PARALLEL = 200, 32, 4.0
"""A request over so many missing pages, each so far away, takes at most so many times what one over one page takes."""


class Times(NamedTuple):
    """Of a request, in microseconds; ``resident`` is the median of the same request when its pages are there."""

    median: float
    slow: float
    resident: float


@dataclass(frozen=True)
class Bench:
    """The program, and how often it is run."""

    command: list[str]
    rounds: int

    def run(self, kind: str, *, pages: int, delay: int, cpus: tuple[int, int], requests: int) -> Times:
        """One run; ``cpus``: of the client and of the server."""
        numbers = map(str, (pages, delay, THREADS, *cpus, requests))
        found = subprocess.run([*self.command, kind, *numbers], capture_output=True, text=True, timeout=60, check=True)
        return Times(*(int(word) / 1000 for word in found.stdout.split()))

    def compare(self, cpus: tuple[int, int]) -> tuple[Times, Times]:
        """Floor and engine, a page a request, from a source without delay."""
        runs = [
            [self.run(kind, pages=1, delay=0, cpus=cpus, requests=2000) for kind in ("floor", "engine")]
            for _ in range(self.rounds)
        ]
        floor, engine = (median(list(column)) for column in zip(*runs, strict=True))
        return floor, engine

    def parallel(self, cpus: tuple[int, int]) -> tuple[Times, Times]:
        """One page and many a request, from a source that is far away."""
        runs = [
            [self.run("engine", pages=pages, delay=SOURCE_US, cpus=cpus, requests=200) for pages in (1, PAGES)]
            for _ in range(self.rounds)
        ]
        one, many = (median(list(column)) for column in zip(*runs, strict=True))
        return one, many


def median(runs: list[Times]) -> Times:
    """Each column's own."""
    return Times(*(statistics.median(column) for column in zip(*runs, strict=True)))


def line(label: str, ratio: float, most: float | None = None) -> bool:
    """Prints a ratio; whether it is what it must be."""
    good = most is None or ratio <= most
    limit = f"   must be at most {most}" if most is not None else ""
    print(f"  {label:48}{ratio:6.2f}{limit}{'' if good else '  ABOVE'}")
    return good


def report_latency(where: str, floor: Times, engine: Times, *, whole_most: float | None) -> bool:
    """One placement. What the fault adds to a request is compared everywhere, the whole request where it is asked."""
    print(
        f"one missing page, {where}: floor {floor.median:.1f} us (90 %: {floor.slow:.1f}), "
        f"engine {engine.median:.1f} us (90 %: {engine.slow:.1f}), its request without a fault {engine.resident:.1f} us"
    )
    whole = line("whole request of the engine / floor", engine.median / floor.median, whole_most)
    return line("what the fault adds to it / floor", (engine.median - engine.resident) / floor.median, MOST) and whole


def report_parallel(one: Times, many: Times) -> bool:
    """Fault-ahead."""
    print(
        f"source of {SOURCE_US} us: one page {one.median:.0f} us (90 %: {one.slow:.0f}), "
        f"{PAGES} pages {many.median:.0f} us (90 %: {many.slow:.0f})"
    )
    return line(f"{PAGES} pages / one page", many.median / one.median, MOST_PARALLEL)


def build(directory: Path) -> Path:
    """Compiles the program with the project's own C files."""
    program = directory / "fault_floor"
    sources = [Path(__file__).with_name("fault_floor.c"), *sorted(NATIVE.glob("*.c"))]
    flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", f"-I{NATIVE}", "-pthread"]
    subprocess.run(["gcc", *flags, *map(str, sources), "-o", program], check=True)
    return program


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument("--fifo", action="store_true", help="real-time priority, so that other load counts less (root)")
    options = parser.parse_args()
    if shutil.which("gcc") is None:
        raise SystemExit("gcc is missing: apt-get install gcc")
    cpus = sorted(os.sched_getaffinity(0))
    apart = (cpus[0], cpus[-1])
    with tempfile.TemporaryDirectory() as name:
        command = [*(["chrt", "--fifo", "10"] if options.fifo else []), str(build(Path(name)))]
        bench = Bench(command, options.rounds)
        good = True
        if len(cpus) > 1:
            good &= report_latency("two CPUs", *bench.compare(apart), whole_most=MOST)
        good &= report_latency("one CPU", *bench.compare((cpus[0], cpus[0])), whole_most=None)
        good &= report_parallel(*bench.parallel(apart))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
