"""What a fault costs with the fault server, against a server in C that keeps no books.

    python tests/bench/faultserver.py [--rounds=5] [--fifo] [--huge]

The clients are the same C program for both (faultserver_floor.c says what it does), on one CPU, the server on another.
Floor and server take turns. The best round counts: whatever else the machine does only ever adds. Only ratios mean
anything elsewhere. Status 1 if one is worse than what the project promises. --huge: 2 MiB pages too (root).
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
NATIVE = ROOT / "vhostuser" / "native"
sys.path.insert(0, str(ROOT))

from tests.bench.placement import BOTH, image, image_file, line  # noqa: E402
from tests.faultserver.conftest import HUGE, PAGE, ClientRegion, SharedMemory, more_huge_pages  # noqa: E402
from vhostuser.faultserver import FaultServer, Placement  # noqa: E402
from vhostuser.uffd import Mode  # noqa: E402

HUGE_FAULTS = 32


class Times(NamedTuple):
    """median, slow: of a fault, in microseconds. rate: faults a second, of all clients together."""

    median: float
    slow: float
    rate: float


@dataclass(frozen=True)
class Case:
    """Clients, threads of each, pages that each touches, which are its own or, if ``shared``, those of the others."""

    clients: int
    threads: int
    faults: int
    page: int = PAGE
    mode: Mode = Mode.MISSING
    shared: bool = False

    @property
    def size(self) -> int:
        return self.faults * self.page * (1 if self.shared else self.clients)

    def pages(self, client: int) -> tuple[int, int]:
        """From and to."""
        first = 0 if self.shared else client * self.faults
        return first, first + self.faults


class Clients:
    """The processes that fault, and what they say."""

    def __init__(self, program: Sequence[str], case: Case, memory: SharedMemory) -> None:
        self.ours, self._processes = [], []
        self.case = case
        for number in range(case.clients):
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            numbers = (theirs.fileno(), memory.fds[0], case.size, case.page, case.threads, int(case.mode))
            numbers += case.pages(number)
            command = [*program, "client", *map(str, numbers)]
            fds = [theirs.fileno(), memory.fds[0]]
            self._processes.append(subprocess.Popen(command, pass_fds=fds, stdout=subprocess.PIPE, text=True))
            theirs.close()
            self.ours.append(ours)

    def run(self) -> Times:
        for sock in self.ours:
            sock.send(b"g")
        said = [tuple(map(int, process.communicate(timeout=60)[0].split())) for process in self._processes]
        rate = sum(faults for faults, *_ in said) / max(each[1] for each in said) * 1e9
        return Times(max(each[2] for each in said) / 1000, max(each[3] for each in said) / 1000, rate)

    def close(self) -> None:
        """Also those that wait for a page which did not come."""
        for sock, process in zip(self.ours, self._processes, strict=True):
            sock.close()
            process.kill()
            process.wait()


@contextmanager
def on_cpu(cpu: int) -> Iterator[None]:
    """What is started meanwhile stays on this CPU."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@dataclass(frozen=True)
class Bench:
    program: list[str]
    cpus: tuple[int, int]

    def _clients(self, case: Case, memory: SharedMemory) -> Clients:
        with on_cpu(self.cpus[0]):
            return Clients(self.program, case, memory)

    def floor(self, case: Case) -> Times:
        """With the server in C."""
        memory = SharedMemory((0, case.size), hugetlb=case.page == HUGE)
        clients = self._clients(case, memory)
        relays = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in clients.ours]
        picture = image_file(case.size)
        command = [*self.program, "server", *map(str, (memory.fds[0], case.size, case.page, picture))]
        command += [str(relay[1].fileno()) for relay in relays]
        with on_cpu(self.cpus[1]):
            passed = [memory.fds[0], picture, *(relay[1].fileno() for relay in relays)]
            server = subprocess.Popen(command, pass_fds=passed)
        try:
            for sock, (relay, other) in zip(clients.ours, relays, strict=True):
                other.close()
                base, uffd = greeted(sock)
                socket.send_fds(relay, [base.to_bytes(8, sys.byteorder)], [uffd])
                os.close(uffd)
                relay.recv(1)
            return clients.run()
        finally:
            for relay, _ in relays:
                relay.close()
            server.wait(10)
            clients.close()
            memory.close()
            os.close(picture)

    def ours(self, case: Case, placement: Placement = Placement.COPY) -> Times:
        """With the fault server."""
        memory = SharedMemory((0, case.size), hugetlb=case.page == HUGE)
        source = image(case.size)
        clients = self._clients(case, memory)
        try:
            with on_cpu(self.cpus[1]), FaultServer(memory, source, placement=placement) as server:
                for sock in clients.ours:
                    base, uffd = greeted(sock)
                    server.add_client("bench", uffd, [ClientRegion(0, base, case.size)], mode=case.mode)
                    os.close(uffd)
                times = clients.run()
                assert not server.paused, f"placing failed: {os.strerror(server.stats().error)}"
                return times
        finally:
            clients.close()
            source.close()
            memory.close()


def greeted(sock: socket.socket) -> tuple[int, int]:
    """A client's address of the memory, and its userfaultfd."""
    message, (uffd,), _, _ = socket.recv_fds(sock, 8, 1)
    return int.from_bytes(message, sys.byteorder), uffd


def best(rounds: list[Times]) -> Times:
    """Each column's own."""
    return Times(min(t.median for t in rounds), min(t.slow for t in rounds), max(t.rate for t in rounds))


def compare(rounds: int, *runs: Callable[[], Times]) -> list[Times]:
    """They take turns."""
    taken = [[run() for run in runs] for _ in range(rounds)]
    return [best(list(column)) for column in zip(*taken, strict=True)]


def say(label: str, times: Times) -> None:
    print(f"  {label:36}median {times.median:7.1f} us, 90 %: {times.slow:7.1f} us, {times.rate:9,.0f} faults/s")


def build(directory: Path) -> Path:
    """Compiles the program with the project's own C files."""
    program = directory / "faultserver_floor"
    sources = [Path(__file__).with_name("faultserver_floor.c"), *sorted(NATIVE.glob("*.c"))]
    flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", f"-I{NATIVE}", "-pthread"]
    subprocess.run(["gcc", *flags, *map(str, sources), "-o", program], check=True)
    return program


def one_client(bench: Bench, rounds: int) -> bool:
    case = Case(1, 1, 4000)
    both = Case(1, 1, 4000, mode=BOTH)
    floor, copy, minor = compare(
        rounds,
        lambda: bench.floor(case),
        lambda: bench.ours(case),
        lambda: bench.ours(both, Placement.CONTINUE),
    )
    print("one client, one thread")
    say("floor", floor)
    say("COPY", copy)
    say("CONTINUE", minor)
    good = line("fault to wake, COPY / floor", copy.median / floor.median, most=1.2)
    return line("fault to wake, CONTINUE / COPY", minor.median / copy.median, most=1.0) and good


def many_threads(bench: Bench, rounds: int) -> bool:
    case = Case(2, 8, 8000)
    floor, ours = compare(rounds, lambda: bench.floor(case), lambda: bench.ours(case))
    print("two clients, eight threads each")
    say("floor", floor)
    say("COPY", ours)
    good = line("faults/s, COPY / floor", ours.rate / floor.rate, least=0.8)
    both = Case(2, 8, 8000, shared=True)
    floor, ours = compare(rounds, lambda: bench.floor(both), lambda: bench.ours(both))
    print("the same, both for the same pages: who comes second need not always wait")
    say("floor", floor)
    say("COPY", ours)
    line("touches/s, COPY / floor", ours.rate / floor.rate)
    return good


def huge_pages(bench: Bench, rounds: int) -> bool:
    small, large = Case(1, 1, 4000), Case(1, 1, HUGE_FAULTS, page=HUGE)
    few, many = compare(rounds, lambda: bench.ours(small), lambda: bench.ours(large))
    print("one client, one thread, small and huge pages")
    say("4 KiB", few)
    say("2 MiB", many)
    return line("bytes/s on demand, 2 MiB / 4 KiB", many.rate * HUGE / (few.rate * PAGE), least=3)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument("--fifo", action="store_true", help="real-time priority, so that other load counts less (root)")
    parser.add_argument("--huge", action="store_true", help="2 MiB pages too")
    options = parser.parse_args()
    if shutil.which("gcc") is None:
        raise SystemExit("gcc is missing: apt-get install gcc")
    if options.fifo:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))
    cpus = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as name:
        bench = Bench([str(build(Path(name)))], (cpus[0], cpus[-1]))
        good = one_client(bench, options.rounds)
        good &= many_threads(bench, options.rounds)
        if options.huge:
            with more_huge_pages(2 * HUGE_FAULTS):
                good &= huge_pages(bench, options.rounds)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
