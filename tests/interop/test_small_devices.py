"""The examples' devices in a guest of Linux, by its own drivers; one boot for as many as this QEMU has.

QEMU 7.2 makes a keyboard of a back-end's under KVM only, where Debian's kernel does not come up on every machine; later
ones do under TCG. It carries no device's state, and neither it nor 10.0 has a front-end for a console, or for a device
of any kind (10.0 has one, which cannot be plugged in unless its source is changed): the echo and the notebook's state
are tried by our own front-end, in examples/test_devices.py.
"""

import base64
import functools
import re
import struct
import subprocess
from pathlib import Path

import pytest

from vhostuser.tools.lab.bench import Bench
from vhostuser.tools.lab.machine import Hardware

pytestmark = [pytest.mark.interop, pytest.mark.timeout(120)]

EXAMPLES = Path(__file__).parents[2] / "examples"
EVENT = struct.Struct("<qqHHi")  # struct input_event of a 64-bit kernel
KEY = 1


@functools.cache
def qemu_version() -> int:
    said = subprocess.check_output(["qemu-system-x86_64", "--version"], text=True)
    found = re.search(r"version (\d+)", said)
    assert found, said
    return int(found[1])


async def test_random_numbers_and_a_note(bench: Bench) -> None:
    """/dev/hwrng gives what nobody could foresee; what is written into the note is read, also by whoever mounts it
    again and after a reboot."""
    rng = await bench.device(EXAMPLES / "rng.py", "vhost-user-rng-pci")
    notebook = await bench.device(EXAMPLES / "notebook.py", "vhost-user-fs-pci,tag=notebook")
    await bench.machine(Hardware(), rng, notebook)
    await bench.guest.booted()
    assert await bench.guest.run("cat /sys/class/misc/hw_random/rng_current") == "virtio_rng.0"
    drawn = [await bench.guest.run("head -c 100000 /dev/hwrng | md5sum") for _ in range(2)]
    assert drawn[0] != drawn[1]
    assert len((await bench.guest.run("head -c 100000 /dev/hwrng | gzip -9 | wc -c")).strip()) == 6, "nothing repeats"
    mount = "mkdir -p /mnt && mount -t virtiofs notebook /mnt"
    await bench.guest.run(mount)
    assert await bench.guest.run("cd /mnt; ls -a; echo hello >note; echo world >>note; cat note; wc -c <note") == (
        ".\n..\nnote\nhello\nworld\n12"
    )
    assert await bench.guest.run("dd if=/dev/zero of=/mnt/note bs=1k count=100 2>&1 | grep -o 'No space.*'") == (
        "No space left on device"
    )
    await bench.guest.run("echo kept >/mnt/note; umount /mnt")
    await bench.guest.reboot()
    assert await bench.guest.run(f"{mount}; cat /mnt/note") == "kept"
    assert not [line for line in notebook.output.entries if "failed" in line]


# Opens the keyboard's events before there are any, lights its lamp and takes as many as are to come.
TYPE = """\
cd /sys/bus/virtio/drivers/virtio_input/virtio*/input/input*
exec 3</dev/input/$(basename event*)
echo 1 >/sys/class/leds/$(basename $PWD)::scrolllock/brightness
head -c {size} <&3 | base64 -w 0
"""


async def test_a_keyboard(bench: Bench) -> None:
    """Its lamp is lit, and it types its text: each key goes down and up."""
    if qemu_version() < 9:
        pytest.skip("QEMU before 9.0 has vhost-user-input under KVM only")
    backend = await bench.device(EXAMPLES / "keyboard.py", "vhost-user-input-pci")
    await bench.machine(Hardware(), backend)
    await bench.guest.booted()
    assert await bench.guest.run("cat /sys/bus/virtio/drivers/virtio_input/virtio*/input/input*/name") == "typist"
    # The lamp is an event too; behind each of the keyboard's there is one that ends the report.
    size = EVENT.size * (1 + 2 * 2 * len("hello\n"))
    events = EVENT.iter_unpack(base64.b64decode(await bench.guest.run(TYPE.format(size=size))))
    keys = [(code, value) for *_, kind, code, value in events if kind == KEY]
    codes = [35, 18, 38, 38, 24, 28]  # h, e, l, l, o and the key that ends a line (input-event-codes.h)
    assert keys == [(code, down) for code in codes for down in (1, 0)]
    assert (await backend.state())["device"] == {"typed": 4 * len(codes), "lamps": [2]}
