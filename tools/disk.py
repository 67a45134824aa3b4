"""The program behind ``vhostuser-blk``: serves a disk image to a virtual machine.

What belongs here: the options of the disk. What does not: those that every back-end program has (``service``).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from vhostuser.devices.blk import POLL_US, Blk, BlkSettings
from vhostuser.devices.image import Image, ImageError
from vhostuser.tools import service
from vhostuser.tools.service import Failure, Parser, number


def serve(program: str, arguments: Sequence[str]) -> NoReturn:
    """Runs until a signal or the last front-end ends it; ends the process."""
    service.serve(_parser(program), arguments, _disk, beside=Blk.watch)


def _parser(program: str) -> Parser:
    parser = Parser(program, "Serves a disk image to a virtual machine over vhost-user.")
    parser.add_argument("--blk-file", metavar="PATH", required=True, help="raw image file or block device")
    parser.add_argument("--read-only", action="store_true", help="refuse writes")
    parser.add_argument("--num-queues", metavar="N", type=number(1, 256), default=1, help="default 1")
    parser.add_argument(
        "--queue-size",
        metavar="N",
        type=number(2, 32768, power_of_two=True),
        default=1024,
        help="largest ring accepted, default 1024",
    )
    parser.add_argument("--serial", metavar="TEXT", type=_serial, default="", help="at most 20 ASCII characters")
    parser.add_argument(
        "--cache",
        choices=("writeback", "writethrough", "direct"),
        default="writeback",
        help="writethrough: acknowledge what is on the medium; direct: O_DIRECT; default writeback",
    )
    parser.add_argument(
        "--block-size", metavar="BYTES", type=number(512, 32768, power_of_two=True), default=512, help="default 512"
    )
    parser.add_argument(
        "--poll-us", metavar="N", type=number(0, 10000), default=POLL_US, help="poll an idle ring so long"
    )
    return parser


def _serial(text: str) -> str:
    if not text.isascii() or len(text) > 20:
        raise argparse.ArgumentTypeError(f"{text!r} is not at most 20 ASCII characters")
    return text


def _disk(options: argparse.Namespace) -> Blk:
    try:
        image = Image(
            options.blk_file,
            read_only=options.read_only,
            direct=options.cache == "direct",
            block_size=options.block_size,
        )
    except ImageError as error:
        raise Failure(str(error)) from None
    settings = BlkSettings(
        queues=options.num_queues,
        queue_size=options.queue_size,
        serial=options.serial,
        writeback=options.cache != "writethrough",
        poll_us=options.poll_us,
    )
    return Blk(image, settings)
