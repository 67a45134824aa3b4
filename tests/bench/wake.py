"""What waking by message costs, beside waking by ioctl on the back-end's userfaultfd.

    python tests/bench/wake.py [--rounds=5]

Two processes share a file. The back-end touches one missing page after the other on a thread, while its control loop
serves the wake channel. The front-end reads the fault, places the page by its own userfaultfd and wakes the back-end,
by turns in either way. Both ways use the same Python, so that the difference is the channel's. Then pages are
placed in batches, for which nobody waits: what the front-end pays for telling a back-end of each.

Only the ratios mean anything elsewhere.
"""

from __future__ import annotations

import argparse
import array
import asyncio
import os
import select
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from vhostuser.dataplane import new_event_loop  # noqa: E402
from vhostuser.memory import GuestMemory, Region  # noqa: E402
from vhostuser.postcopy import Postcopy  # noqa: E402
from vhostuser.protocol import MemoryRegion, Wake, WakeAck  # noqa: E402
from vhostuser.uffd import TouchPool, Userfaultfd  # noqa: E402
from vhostuser.wake import BlockingWakeChannel  # noqa: E402
from vhostuser.wake_service import WakeService  # noqa: E402

PAGE = 4096
FAULTS = 2000
BATCH, BATCHES = 64, 256
SIZE = (FAULTS + BATCH * BATCHES) * PAGE
DESCRIPTION = MemoryRegion(0, SIZE, 1 << 46, 0)

WakePages = Callable[[list[int], int], None]


# ---- the back-end


def back_end(file: int, greeting: int, channel: int) -> None:
    """Sends its userfaultfd and base, and when it has touched all its pages the time that one took."""
    half = Postcopy(TouchPool())
    region = Region.map(file, DESCRIPTION)
    uffd = half.advise()
    half.listen()
    half.register([region])
    memory = GuestMemory([region])
    sock = socket.socket(fileno=greeting)
    fds = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [uffd]).tobytes())]
    sock.sendmsg([struct.pack("=Q", region.base)], fds)
    service = WakeService(lambda wake: acknowledge(half, memory, wake))
    threading.Thread(target=touch, args=(memory, sock), daemon=True).start()
    loop = new_event_loop()
    asyncio.set_event_loop(loop)
    loop.run_until_complete(service.serve(socket.socket(fileno=channel)))
    os._exit(0)


def acknowledge(half: Postcopy, memory: GuestMemory, wake: Wake) -> WakeAck:
    return WakeAck(wake.id, half.wake(memory, wake.ranges))


def touch(memory: GuestMemory, sock: socket.socket) -> None:
    """In one call, so that the thread stays in C, as a real device's do, and does not wait for the interpreter."""
    before = time.perf_counter_ns()
    memory.read(0, FAULTS * PAGE)
    sock.sendall(struct.pack("=Q", (time.perf_counter_ns() - before) // FAULTS))


# ---- the front-end


class Figures(NamedTuple):
    """Microseconds: of a fault, on average, and per page of a batch that is placed and told."""

    fault: float
    batch: float
    merged: float


class FrontEnd:
    """The back-end runs while this does."""

    def __init__(self) -> None:
        self.file = os.memfd_create("guest", os.MFD_CLOEXEC)
        os.truncate(self.file, SIZE)
        self.region = Region.map(self.file, DESCRIPTION)
        self.ours = Userfaultfd.open()
        self.ours.register(self.region.base, self.region.length)
        self.sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours, side = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.process = subprocess.Popen(
            [sys.executable, __file__, *map(str, (self.file, theirs.fileno(), side.fileno()))],
            pass_fds=[self.file, theirs.fileno(), side.fileno()],
        )
        theirs.close()
        side.close()
        self.channel = BlockingWakeChannel(ours)
        self.channel.hello()
        data, (uffd,), _, _ = socket.recv_fds(self.sock, 8, 1)
        (self.base,) = struct.unpack("=Q", data)
        self.theirs = Userfaultfd(uffd)

    def by_ioctl(self, pages: list[int], count: int) -> None:
        """Wakes who waits for ``count`` pages from each of these on."""
        for page in pages:
            self.theirs.wake(self.base + page * PAGE, count * PAGE)

    def by_message(self, pages: list[int], count: int) -> None:
        self.channel.wake([(page * PAGE, count * PAGE) for page in pages])

    def place(self, page: int, count: int) -> None:
        self.ours.copy(self.region.base + page * PAGE, b"\5" * (count * PAGE), wake=False)

    def serve(self, wake: WakePages) -> float:
        """Until the back-end has touched all its pages; microseconds of a fault."""
        poll = select.poll()
        poll.register(self.theirs.fileno(), select.POLLIN)
        poll.register(self.sock, select.POLLIN)
        while self.sock.fileno() not in dict(poll.poll()):
            for fault in self.theirs.read():
                page = (fault.address - self.base) // PAGE
                self.place(page, 1)
                wake([page], 1)
        return int(struct.unpack("=Q", self.sock.recv(8))[0]) / 1000

    def background(self, wake: WakePages, *, merged: bool) -> float:
        """Microseconds of a page; ``merged``: a batch is one range."""
        half = BATCHES // 2
        start = time.perf_counter_ns()
        for batch in range(half) if merged else range(half, BATCHES):
            first = FAULTS + batch * BATCH
            self.place(first, BATCH)
            if merged:
                wake([first], BATCH)
            else:
                wake(list(range(first, first + BATCH)), 1)
        return (time.perf_counter_ns() - start) / 1000 / (half * BATCH)

    def close(self) -> None:
        self.channel.close()
        self.process.wait(10)
        self.theirs.close()
        self.ours.close()
        self.sock.close()
        os.close(self.file)


def run(way: str) -> Figures:
    front_end = FrontEnd()
    wake: WakePages = getattr(front_end, way)
    figures = Figures(
        front_end.serve(wake), front_end.background(wake, merged=False), front_end.background(wake, merged=True)
    )
    front_end.close()
    return figures


def median(runs: list[Figures]) -> Figures:
    """Each column's own."""
    return Figures(*map(statistics.median, zip(*runs, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    rounds = parser.parse_args().rounds
    runs = [(run("by_ioctl"), run("by_message")) for _ in range(rounds)]
    ioctl, message = (median(list(column)) for column in zip(*runs, strict=True))
    labels = ("fault to wake", f"placed by {BATCH}, each page told", f"placed by {BATCH}, told as one range")
    for label, one, other in zip(labels, ioctl, message, strict=True):
        print(f"{label:34} ioctl {one:6.2f} us   message {other:6.2f} us   message / ioctl {other / one:5.2f}")


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1].isdecimal():
        back_end(*map(int, sys.argv[1:4]))
    main()
