"""``vhostuser guest``: a small Linux to try a device with, as files for QEMU's -kernel and -initrd.

What belongs here: options and files. What does not: what the guest consists of (``lab.image``).
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from vhostuser.tools.lab.errors import LabError
from vhostuser.tools.lab.image import guest_image
from vhostuser.tools.service import Parser


def main(program: str, arguments: Sequence[str]) -> int:
    """0, or 1 with a line on stderr; wrong options end the process with 2."""
    parser = Parser(program, "Makes a small Linux guest: DIRECTORY/kernel and DIRECTORY/initramfs.")
    parser.epilog = "It runs what stands behind -- on the kernel's command line. docs/tutorial.md boots it."
    parser.add_argument("directory", type=Path, metavar="DIRECTORY", help="made if it does not exist")
    directory = parser.parse_args(arguments).directory
    try:
        image = guest_image()
        directory.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(image.kernel, directory / "kernel")
        shutil.copyfile(image.initramfs, directory / "initramfs")
    except (LabError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    return 0
