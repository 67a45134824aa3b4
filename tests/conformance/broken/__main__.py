"""The device with the fault that is named first, and the device's own options behind it."""

import sys

from tests.conformance.broken import FAULTS
from vhostuser.conformance.bench import Device
from vhostuser.tools import blk, net

if __name__ == "__main__":
    fault = FAULTS[sys.argv[1]]
    fault.patch()
    (net if fault.device is Device.NET else blk).main(sys.argv[2:])
