"""What a device IOTLB costs a ring whose translations are all known.

    python -m tests.bench.iommu [ROUNDS]

Chains of three buffers are popped and pushed, in turn with the same ring without an IOTLB, in one process.
"""

from __future__ import annotations

import sys
import time
from statistics import median

from vhostuser._native import ffi, lib
from vhostuser.driverqueue import DriverQueue
from vhostuser.frontend import SharedMemory
from vhostuser.iotlb import DeviceIotlb
from vhostuser.memory import GuestMemory
from vhostuser.virtqueue import DeviceQueue, RingSetup

SIZE, BATCH, TURNS, MIB = 256, 64, 200, 1 << 20


def opened(memory: GuestMemory, at: int, iotlb: DeviceIotlb | None) -> tuple[DriverQueue, DeviceQueue]:
    """Both sides of a ring. Behind the IOTLB addresses are what they are without it, so that the driver is the same."""
    driver = DriverQueue(memory, at, SIZE)
    setup = RingSetup(SIZE, driver.desc, driver.avail, driver.used, guest_addresses=iotlb is None)
    return driver, setup.open(memory, iotlb=iotlb)


def turn(driver: DriverQueue, queue: DeviceQueue) -> float:
    """Nanoseconds that the device's side takes for a chain."""
    chains, spent = ffi.new("vu_chain *[]", BATCH), 0
    for number in range(TURNS):
        base = MIB + number % 32 * 64 * 1024
        chain = ([(base, 16)], [(base + 4096, 4096), (base + 32, 1)])
        driver.offer_many([chain] * BATCH)
        driver.publish()
        began = time.perf_counter_ns()
        count = lib.vu_queue_pop(queue.native, chains, BATCH)
        lib.vu_queue_push(queue.native, chains, ffi.NULL, count)
        spent += time.perf_counter_ns() - began
        assert count == BATCH and len(driver.take_many()) == BATCH
    return spent / (TURNS * BATCH)


def main() -> None:
    """Prints both, and their ratio."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    shared, iotlb = SharedMemory((0, 4 * MIB)), DeviceIotlb(1)
    # Page by page to the other end of memory and back, so that no two pages are one translation; rings stay whole.
    user = shared.map.guest_to_user(0)
    iotlb.update(shared.map, 0, MIB, user, 3)
    for page in range(MIB, 4 * MIB, 4096):
        iotlb.update(shared.map, page, 4096, user + MIB + (page - MIB) * 7 % (3 * MIB), 3)
    plain, behind = opened(shared.map, 0, None), opened(shared.map, MIB // 2, iotlb)
    turns = [(turn(*plain), turn(*behind)) for _ in range(rounds)]
    without, through = (median(each) for each in zip(*turns, strict=True))
    print(f"a chain of three buffers: {without:.0f} ns, through {len(iotlb)} translations {through:.0f} ns", end=", ")
    print(f"ratio {through / without:.2f}")


if __name__ == "__main__":
    main()
