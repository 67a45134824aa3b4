"""What ``vhostuser trace`` adds to a message: a question and its answer, with the tracer in between and without.

    python tests/bench/trace.py [--rounds=5] [--count=1000]

vhostuser-blk answers; GET_FEATURES is the shortest exchange there is, a memory table of one region the longest one with
a descriptor. Direct and traced take turns. Both its writers are at work, into /dev/null. An exchange is two messages,
so half of what it takes longer is counted. The best round counts: whatever else the machine does only makes it longer.
Status 1 above the project's promise.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from vhostuser.protocol import (  # noqa: E402
    NEED_REPLY,
    U64,
    VERSION,
    FrontendRequest,
    MemoryRegion,
    MemoryTable,
    ProtocolFeature,
    VirtioFeature,
    encode,
)

F = FrontendRequest
PROMISE = 100.0  # microseconds a message
REGION = 1 << 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=1000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, servers(Path(name)) as (direct, traced):
        added = [
            compare("GET_FEATURES", direct, traced, features, options.rounds, options.count),
            compare("SET_MEM_TABLE", direct, traced, table, options.rounds, options.count // 4),
        ]
    return int(max(added) > PROMISE)


@contextmanager
def servers(directory: Path) -> Iterator[tuple[Path, Path]]:
    """Sockets of a back-end and of a tracer before it."""
    image, backend, tracer = directory / "image", directory / "backend", directory / "tracer"
    with image.open("wb") as file:
        file.truncate(1 << 20)
    blk = [sys.executable, "-m", "vhostuser.tools.blk", f"--socket-path={backend}", f"--blk-file={image}"]
    trace = [sys.executable, "-m", "vhostuser.tools.main", "trace", f"--listen={tracer}", f"--connect={backend}"]
    running: list[subprocess.Popen[bytes]] = []
    try:
        for command, path in ((blk, backend), ([*trace, "--json=/dev/null"], tracer)):
            quiet = subprocess.DEVNULL
            running.append(subprocess.Popen(command, stdout=quiet, stderr=quiet))
            appeared(path)
        yield backend, tracer
    finally:
        for process in reversed(running):
            process.terminate()
            process.wait()


def appeared(path: Path, patience: float = 10.0) -> None:
    deadline = time.monotonic() + patience
    while not path.exists():
        if time.monotonic() > deadline:
            raise SystemExit(f"{path}: nobody listens after {patience:g} s")
        time.sleep(0.01)


Exchange = Callable[[socket.socket], None]


def features(sock: socket.socket) -> None:
    sock.sendall(encode(F.GET_FEATURES, VERSION))
    assert len(sock.recv(20)) == 20


def table(sock: socket.socket) -> None:
    message = encode(F.SET_MEM_TABLE, VERSION | NEED_REPLY, MemoryTable((MemoryRegion(0, REGION, 1 << 32, 0),)))
    socket.send_fds(sock, [message], [MEMORY])
    assert len(sock.recv(20)) == 20


MEMORY = os.memfd_create("memory")
os.ftruncate(MEMORY, REGION)


def negotiate(sock: socket.socket) -> None:
    features(sock)
    sock.sendall(encode(F.GET_PROTOCOL_FEATURES, VERSION))
    sock.recv(20)
    sock.sendall(encode(F.SET_PROTOCOL_FEATURES, VERSION, U64(ProtocolFeature.REPLY_ACK.mask)))
    wanted = VirtioFeature.PROTOCOL_FEATURES.mask | VirtioFeature.VERSION_1.mask
    sock.sendall(encode(F.SET_FEATURES, VERSION | NEED_REPLY, U64(wanted)))
    assert sock.recv(20)[12:] == bytes(8)


def compare(name: str, direct: Path, traced: Path, exchange: Exchange, rounds: int, count: int) -> float:
    """Prints and returns microseconds that the tracer adds to a message."""
    # A back-end serves one front-end at a time, so they take turns as connections.
    pairs = [(measure(direct, exchange, count), measure(traced, exchange, count)) for _ in range(rounds)]
    without, within = (min(times) for times in zip(*pairs, strict=True))
    added = (within - without) / 2
    print(
        f"{name}: {without:.0f} us direct, {within:.0f} us traced, ratio {within / without:.1f},"
        f" added to a message: {added:.0f} us (promised: below {PROMISE:.0f})"
    )
    return added


def measure(path: Path, exchange: Exchange, count: int) -> float:
    """Microseconds that the median exchange takes."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(str(path))
        negotiate(sock)
        times: Sequence[float] = [timed(sock, exchange) for _ in range(count)]
    return statistics.median(times)


def timed(sock: socket.socket, exchange: Exchange) -> float:
    began = time.perf_counter_ns()
    exchange(sock)
    return (time.perf_counter_ns() - began) / 1000


if __name__ == "__main__":
    raise SystemExit(main())
