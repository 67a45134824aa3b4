"""What a missing page costs a request of the block engine, against the least that it can cost.

    python tests/bench/faults.py [--runs=5] [--fifo]

fault_floor.c says what is measured. Floor and engine take turns in one process, against the same server on the same
CPUs; the median run counts. Only the ratios mean anything elsewhere, and even they need a machine that does little
else, or --fifo.
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
    """Medians and 90th percentiles, in microseconds; ``resident``: of the engine's request when its pages are there."""

    floor: float
    floor_slow: float
    engine: float
    engine_slow: float
    resident: float


@dataclass(frozen=True)
class Bench:
    """The program, and how often it is run."""

    command: list[str]
    runs: int

    def run(self, *, pages: int, delay: int, cpus: tuple[int, int], rounds: int) -> Times:
        """Requests over so many pages, from a source so far away; ``cpus``: of the client and of the server."""
        command = [*self.command, *map(str, (pages, delay, THREADS, *cpus, rounds))]
        runs = [self._once(command) for _ in range(self.runs)]
        return Times(*(statistics.median(column) for column in zip(*runs, strict=True)))

    @staticmethod
    def _once(command: list[str]) -> Times:
        found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return Times(*(int(word) / 1000 for word in found.stdout.split()))


def line(label: str, ratio: float, most: float | None = None) -> bool:
    """Prints a ratio; whether it is what it must be."""
    good = most is None or ratio <= most
    limit = f"   must be at most {most}" if most is not None else ""
    print(f"  {label:48}{ratio:6.2f}{limit}{'' if good else '  ABOVE'}")
    return good


def report_latency(where: str, times: Times, *, whole_most: float | None) -> bool:
    """One placement. What the fault adds to a request is compared everywhere, the whole request where it is asked."""
    print(
        f"one missing page, {where}: floor {times.floor:.1f} us (90 %: {times.floor_slow:.1f}), engine "
        f"{times.engine:.1f} us (90 %: {times.engine_slow:.1f}), its request without a fault {times.resident:.1f} us"
    )
    whole = line("whole request of the engine / floor", times.engine / times.floor, whole_most)
    return line("what the fault adds to it / floor", (times.engine - times.resident) / times.floor, MOST) and whole


def report_parallel(one: Times, many: Times) -> bool:
    """Fault-ahead."""
    print(
        f"source of {SOURCE_US} us: one page {one.engine:.0f} us (90 %: {one.engine_slow:.0f}), "
        f"{PAGES} pages {many.engine:.0f} us (90 %: {many.engine_slow:.0f})"
    )
    return line(f"{PAGES} pages / one page", many.engine / one.engine, MOST_PARALLEL)


def build(directory: Path) -> Path:
    """Compiles the program with the project's own C files."""
    program = directory / "fault_floor"
    sources = [Path(__file__).with_name("fault_floor.c"), *sorted(NATIVE.glob("*.c"))]
    flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", f"-I{NATIVE}", "-pthread"]
    subprocess.run(["gcc", *flags, *map(str, sources), "-o", program], check=True)
    return program


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--runs", type=int, default=5, help="default 5")
    parser.add_argument("--fifo", action="store_true", help="real-time priority, so that other load counts less (root)")
    options = parser.parse_args()
    if shutil.which("gcc") is None:
        raise SystemExit("gcc is missing: apt-get install gcc")
    cpus = sorted(os.sched_getaffinity(0))
    apart = (cpus[0], cpus[-1])
    with tempfile.TemporaryDirectory() as name:
        command = [*(["chrt", "--fifo", "10"] if options.fifo else []), str(build(Path(name)))]
        bench = Bench(command, options.runs)
        good = True
        if len(cpus) > 1:
            good &= report_latency("two CPUs", bench.run(pages=1, delay=0, cpus=apart, rounds=2000), whole_most=MOST)
        together = (cpus[0], cpus[0])
        good &= report_latency("one CPU", bench.run(pages=1, delay=0, cpus=together, rounds=2000), whole_most=None)
        one, many = (bench.run(pages=n, delay=SOURCE_US, cpus=apart, rounds=200) for n in (1, PAGES))
        good &= report_parallel(one, many)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
