"""What waking by message costs, beside waking by ioctl on the back-end's userfaultfd.

    python tests/bench/wake.py [--rounds=5]

Two processes share a file. In the back-end threads touch missing pages, one after the other, while its control loop
serves the wake channel; the front-end is a fault server, which wakes in one or the other way, by turns. Then it brings
pages for which nobody waits, and tells of each (WakePolicy.BROADCAST, as QEMU does).

Only the ratios mean anything elsewhere.
"""

from __future__ import annotations

import argparse
import array
import asyncio
import os
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from vhostuser.dataplane import new_event_loop  # noqa: E402
from vhostuser.faultserver import FaultServer, FilePiece, MappedFile, WakePolicy  # noqa: E402
from vhostuser.frontend import ClientRegion, SharedMemory  # noqa: E402
from vhostuser.memory import GuestMemory, Region  # noqa: E402
from vhostuser.postcopy import Postcopy  # noqa: E402
from vhostuser.protocol import MemoryRegion, Wake, WakeAck  # noqa: E402
from vhostuser.threads import spawn  # noqa: E402
from vhostuser.uffd import TouchPool  # noqa: E402
from vhostuser.wake import BlockingWakeChannel  # noqa: E402
from vhostuser.wake_service import WakeService  # noqa: E402

PAGE = 4096
FAULTS = 4000
THREADS = 16
TOUCHED, TOLD = FAULTS * PAGE, 16000 * PAGE
SIZE = 2 * TOUCHED + TOLD


class Figures(NamedTuple):
    """Microseconds: of a fault, on average, of one thread and of many together; of a page that nobody waits for."""

    one: float
    many: float
    told: float


LABELS = Figures._make(
    ("fault, 1 thread", f"fault, {THREADS} threads together", "page in the background, told of each")
)


# ---- the back-end


def back_end(file: int, greeting: int, channel: int) -> None:
    """Sends its userfaultfd and base; then, twice, the nanoseconds that its touches have taken."""
    half = Postcopy(TouchPool())
    region = Region.map(file, MemoryRegion(0, SIZE, 1 << 46, 0))
    uffd = half.advise()
    half.listen()
    half.register([region])
    memory = GuestMemory([region])
    sock = socket.socket(fileno=greeting)
    fds = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [uffd]).tobytes())]
    sock.sendmsg([struct.pack("=Q", region.base)], fds)
    service = WakeService(lambda wake: acknowledge(half, memory, wake))
    spawn(lambda: touch_all(memory, sock), "touch")
    loop = new_event_loop()
    asyncio.set_event_loop(loop)
    loop.run_until_complete(service.serve(socket.socket(fileno=channel)))
    os._exit(0)


def acknowledge(half: Postcopy, memory: GuestMemory, wake: Wake) -> WakeAck:
    return WakeAck(wake.id, half.wake(memory, wake.ranges))


def touch_all(memory: GuestMemory, sock: socket.socket) -> None:
    """A thread's part is one call, so that it stays in C, as a real device's does, and waits for no interpreter."""
    for threads, start in ((1, 0), (THREADS, TOUCHED)):
        sock.recv(1)
        before = time.perf_counter_ns()
        part = TOUCHED // threads
        started = [
            threading.Thread(target=memory.read, args=(start + number * part, part), daemon=True)
            for number in range(threads)
        ]
        for thread in started:
            thread.start()
        for thread in started:
            thread.join()
        sock.sendall(struct.pack("=Q", time.perf_counter_ns() - before))


# ---- the front-end


class BackEnd(NamedTuple):
    """As the front-end sees it."""

    sock: socket.socket
    channel: BlockingWakeChannel
    uffd: int
    region: ClientRegion


@contextmanager
def running(file: int) -> Iterator[BackEnd]:
    sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours, side = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    fds = [file, theirs.fileno(), side.fileno()]
    process = subprocess.Popen([sys.executable, __file__, *map(str, fds)], pass_fds=fds)
    theirs.close()
    side.close()
    channel = BlockingWakeChannel(ours)
    channel.hello()
    data, (uffd,), _, _ = socket.recv_fds(sock, 8, 1)
    yield BackEnd(sock, channel, uffd, ClientRegion(0, *struct.unpack("=Q", data), SIZE, PAGE))
    channel.close()
    process.wait(10)
    sock.close()
    os.close(uffd)


def run(*, by_message: bool) -> Figures:
    """One run of everything, in one way."""
    with ExitStack() as stack:
        memory = SharedMemory((0, SIZE))
        stack.callback(memory.close)
        source = MappedFile(FilePiece(0, SIZE, source_file()))
        stack.callback(source.close)
        server = FaultServer(memory, source, wake=WakePolicy.BROADCAST, batch=1)
        stack.callback(server.close)
        other = stack.enter_context(running(memory.fds[0]))
        channel = other.channel.fileno() if by_message else -1
        client = server.add_client("back-end", other.uffd, [other.region], channel=channel)
        one, many = touched(other), touched(other)
        before = time.perf_counter_ns()
        server.prefetch([(2 * TOUCHED, TOLD)])
        server.wait()
        told = (time.perf_counter_ns() - before) / 1000 / (TOLD // PAGE)
        server.remove_client(client)
    return Figures(one, many, told)


def source_file() -> int:
    """A file whose pages are all there."""
    fd = os.memfd_create("source", os.MFD_CLOEXEC)
    os.write(fd, b"\5" * SIZE)
    return fd


def touched(other: BackEnd) -> float:
    other.sock.send(b"x")
    return int(struct.unpack("=Q", other.sock.recv(8))[0]) / 1000 / FAULTS


def median(runs: list[Figures]) -> Figures:
    """Each column's own."""
    return Figures(*map(statistics.median, zip(*runs, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    rounds = parser.parse_args().rounds
    runs = [(run(by_message=False), run(by_message=True)) for _ in range(rounds)]
    ioctl, message = (median(list(column)) for column in zip(*runs, strict=True))
    for label, one, other in zip(LABELS, ioctl, message, strict=True):
        print(f"{label:36} ioctl {one:6.2f} us   message {other:6.2f} us   message / ioctl {other / one:5.2f}")


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1].isdecimal():
        back_end(*map(int, sys.argv[1:4]))
    main()
