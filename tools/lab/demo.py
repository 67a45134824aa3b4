"""tools/demo: a real guest on vhostuser-blk, migrated live to a second QEMU and a second back-end.

What belongs here: the order of events and what is shown of them. What is done and measured is the rest of the lab.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vhostuser.measures import AHEAD, BLOCKED
from vhostuser.metrics import value_in
from vhostuser.tools.lab.backend import BackendProcess, tracer
from vhostuser.tools.lab.bench import Bench
from vhostuser.tools.lab.errors import LabError
from vhostuser.tools.lab.image import guest_image
from vhostuser.tools.lab.machine import Hardware
from vhostuser.tools.lab.migration import Migration
from vhostuser.tools.lab.observation import Observation, observe_postcopy
from vhostuser.tools.lab.workload import Disk, fill_md5, fill_memory

DISK = 64  # MiB
BANDWIDTH = 60_000_000  # bytes per second of precopy, so that the guest does something meanwhile
# Postcopy is kept slow until so much has been seen of it.
FAULTS = 5
REQUESTS = 200


class Progress:
    """Lines with the time since the start."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def __call__(self, text: str) -> None:
        print(f"[{time.monotonic() - self._start:5.1f} s] {text}", flush=True)


@dataclass
class Outcome:
    """What the table shows."""

    seconds: float
    seen: Observation | None
    metrics: dict[str, Any]
    memory_right: bool
    disk_right: bool

    @property
    def good(self) -> bool:
        return self.memory_right and self.disk_right and not (self.seen and self.seen.wrong_bases)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools/demo", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--precopy", action="store_true", help="migrate by precopy: the back-end keeps the dirty log")
    parser.add_argument("--hugepages", action="store_true", help="guest memory from 2 MiB pages")
    parser.add_argument(
        "--memory", metavar="MIB", type=int, default=320, help="of the guest, default 320, at least 256"
    )
    parser.add_argument(
        "--trace", metavar="DIRECTORY", type=Path, help="put a tracer before each back-end; keep its transcript"
    )
    parser.add_argument("--keep", action="store_true", help="keep the logs and images")
    options = parser.parse_args(arguments)
    if options.memory < 256:
        parser.error(f"--memory {options.memory}: the guest needs 256 MiB or more")
    return options


async def demonstrate(bench: Bench, options: argparse.Namespace, say: Progress) -> Outcome:
    """Boots, verifies, migrates."""
    hardware = Hardware(memory=options.memory, hugepages=options.hugepages)
    image = bench.disk(DISK)
    disk = Disk(bench.guest, image)
    source = await bench.machine(
        hardware, await _seen(bench, await bench.backend(image), image, options.trace, "source")
    )
    say(f"a guest with {options.memory} MiB boots on vhostuser-blk")
    await bench.guest.booted()
    if await disk.guest_md5(0, DISK) != disk.md5(0, DISK):
        raise LabError("the guest does not read what is on the disk")
    say(f"the guest has read all {DISK} MiB of its disk; the checksum is the image's")
    fill = await fill_memory(bench.guest, options.memory * 3 // 10)
    backend = await bench.backend(image)
    destination = await bench.destination(hardware, await _seen(bench, backend, image, options.trace, "destination"))
    say("a second QEMU with a back-end of its own waits for the guest")
    migration = bench.migration(
        source,
        destination,
        postcopy=not options.precopy,
        bandwidth=BANDWIDTH,
    )
    begin = time.monotonic()
    async with disk.read_throughout():
        seen = await _migrate(bench, disk, migration, options.precopy, say, backend)
    seconds = time.monotonic() - begin
    state = await backend.state()
    memory_right = await fill_md5(bench.guest) == fill
    await bench.guest.run("sync; echo 3 >/proc/sys/vm/drop_caches")
    disk_right = await disk.guest_md5(0, DISK) == disk.md5(0, DISK)
    say("the guest has checked its memory and its disk at the destination")
    return Outcome(seconds, seen, state["metrics"], memory_right, disk_right)


async def _seen(
    bench: Bench, backend: BackendProcess, image: Path, directory: Path | None, name: str
) -> BackendProcess:
    """What QEMU connects to: the back-end, or a tracer before it."""
    if directory is None:
        return backend
    return await bench.backend(image, command=tracer(backend.socket, directory / f"{name}.json"))


async def _migrate(
    bench: Bench, disk: Disk, migration: Migration, precopy: bool, say: Progress, backend: Any
) -> Observation | None:
    if precopy:
        async with disk.write_throughout():
            await migration.start()
            say("precopy has begun; the guest reads and writes its disk, the back-end marks what it writes to memory")
            await migration.release()
            await migration.completed()
        say("the guest runs at the destination")
        return None
    await disk.hold_dirty(8)
    await migration.start()
    say("the migration has begun; the guest reads its disk without a pause")
    await migration.switch()
    say("postcopy: the guest runs at the destination, most of its memory is still at the source")
    flushed = bench.guest.run("sync", within=120)
    seen, _ = await asyncio.gather(observe_postcopy(migration, backend, faults=FAULTS, requests=REQUESTS), flushed)
    say("the last page has arrived")
    return seen


def rows(outcome: Outcome) -> list[tuple[str, str]]:
    """The table."""
    table = [("migration", f"{outcome.seconds:.1f} s")]
    if (seen := outcome.seen) is not None:
        (waits,) = outcome.metrics[BLOCKED.name]
        ahead = value_in(outcome.metrics, AHEAD)
        blocked = waits["sum"] / max(waits["count"], 1) * 1000
        table += [
            ("of it in postcopy", f"{seen.span.seconds:.1f} s"),
            ("faults of the back-end that QEMU served then", str(seen.faults)),
            ("disk requests completed then", str(seen.requests)),
            ("waits for a page", f"{waits['count']}, {ahead} of them side by side ahead of the request"),
            ("time blocked per wait", f"{blocked:.2f} ms on average"),
            *(("", f"{count:5} of up to {float(limit) * 1000:g} ms") for limit, count in waits["buckets"].items()),
            ("the back-end's addresses in QEMU", "all right" if not seen.wrong_bases else f"WRONG: {seen.wrong_bases}"),
        ]
    equal = {True: "equal", False: "DIFFERENT"}
    table += [("checksum of the guest's memory", equal[outcome.memory_right])]
    table += [("checksum of the disk", equal[outcome.disk_right])]
    return table


async def demo(options: argparse.Namespace) -> int:
    """Exit status: 0 if everything is right."""
    say = Progress()
    if options.trace:
        options.trace.mkdir(parents=True, exist_ok=True)
    say("making the guest's kernel and initramfs")
    image = guest_image()
    async with Bench(image, keep=options.keep) as bench:
        try:
            outcome = await demonstrate(bench, options, say)
        except LabError:
            print(bench.report(), file=sys.stderr)
            raise
        print()
        for name, value in rows(outcome):
            print(f"  {name:<46} {value}")
        if options.trace:
            print(f"\n  transcripts: {options.trace}")
        if options.keep:
            print(f"\n  logs and images: {bench.directory}")
    return 0 if outcome.good else 1


def main() -> int:
    """The program."""
    options = parse(sys.argv[1:])
    try:
        return asyncio.run(demo(options))
    except LabError as error:
        print(f"tools/demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
