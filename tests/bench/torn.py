"""Does anybody ever see half a page? A million pages are read while they are placed, in each way.

    python tests/bench/torn.py [--pages=1000000]

Two processes with four threads each (for MOVE: four threads of this process) read all of a memory while a fault server
fills it and serves their faults; each small page holds its own number 512 times over. Status 1 if one was read that did
not.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.faultserver.conftest import MIB, PAGE, Bed, good
from vhostuser.faultserver import Placement
from vhostuser.uffd import Mode

WAYS = (Placement.COPY, Placement.CONTINUE, Placement.MOVE)


def read_while_placed(bed: Bed, placement: Placement, *, size: int, processes: int) -> int:
    """How many pages were read, all of them whole. With no processes, threads of ours read."""
    memory: Any = bed.memory((0, size)) if processes else bed.private((0, size))
    mode = Mode.MISSING | Mode.MINOR if placement is Placement.CONTINUE else Mode.MISSING
    server = bed.server(memory, placement=placement)
    readers: list[Any] = [bed.client(server, memory, mode=mode)[0] for _ in range(processes)]
    readers = readers or [bed.threads(memory)]
    for reader in readers:
        reader.read(*([(at, MIB) for at in range(start, size, 4 * MIB)] for start in range(0, 4 * MIB, MIB)))
    server.prefetch()
    assert all(good(reader.answers(4)) for reader in readers), "a page was read that was not whole"
    assert server.wait(60)
    return len(readers) * size // PAGE


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--pages", type=int, default=1_000_000, help="to read in each way; default 1000000")
    options = parser.parse_args()
    for placement in WAYS:
        start, read, processes = time.perf_counter(), 0, 2 * (placement is not Placement.MOVE)
        while read < options.pages:
            bed = Bed()
            try:
                read += read_while_placed(bed, placement, size=512 * MIB, processes=processes)
            except AssertionError as error:
                print(f"{placement.name}: {error}")
                return 1
            finally:
                bed.close()
        print(f"{placement.name}: {read} pages were read, all of them whole ({time.perf_counter() - start:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
