"""The command line of ``vhostuser postcopy``.

What belongs here: options, their defaults, what they exclude. What does not: what they bring about (``run``).
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

from vhostuser.tools.service import Parser, number

MIB = 1 << 20
PAGE_SIZES = {"4k": 4096, "2M": 2 * MIB}
MOST_CLIENTS = 32


class Flow(StrEnum):
    """How memory is shared."""

    TABLE = "table"
    REGIONS = "regions"


class Wake(StrEnum):
    """Who is woken when a page has been placed."""

    BROADCAST = "broadcast"
    DEMAND = "demand"
    BATCH = "batch"
    CHANNEL = "channel"


class Order(StrEnum):
    """In which order pages come that nobody has asked for."""

    SEQUENTIAL = "sequential"
    RANDOM = "random"
    NONE = "none"


class Placement(StrEnum):
    """How a page is put into place."""

    COPY = "copy"
    CONTINUE = "continue"


@dataclass(frozen=True)
class Options:
    """What was asked for. Sizes are bytes, times seconds."""

    command: str | None
    """What to start, None for back-ends that run already."""
    sockets: tuple[Path, ...]
    disks: tuple[Path, ...]
    clients: int
    memory: int
    regions: int
    one_file: bool
    """Whether they lie in one file, at different offsets."""
    page_size: int
    flows: tuple[Flow, ...]
    wakes: tuple[Wake, ...]
    order: Order
    placement: Placement
    bandwidth: int
    """Bytes a second of the source, 0: no limit."""
    latency: float
    streams: int
    """Lines of that bandwidth and latency, side by side."""
    withhold: int
    """Per cent of the pages that requests refer to which come only when somebody waits for them."""
    zeros: int
    """Per cent of the same pages that are all zeros at the source."""
    requests: int
    duration: float
    depth: int
    indirect: bool
    """Whether descriptors lie in tables of their own."""
    seed: int
    patience: float
    json: bool
    plot: Path | None
    quiet: bool


_BLK = f"{shlex.quote(sys.executable)} -m vhostuser.tools.blk"
OWN = f"{_BLK} --socket-path={{socket}} --blk-file={{disk}} --log-level=warn"
"""Our own back-end."""
_OWN_WAKE = f"{OWN} --wake-socket={{wake}}"

_EPILOG = """\
The back-end's disk is written to. What the verdicts mean: docs/postcopy-lab.md. Exit status: 0 every check passed,
1 a check failed or the back-end could not be tried, 2 wrong options.
"""


def parse(program: str, arguments: Sequence[str]) -> Options:
    """Ends the process with status 2 and one line if the options are wrong."""
    parser = Parser(
        program, "Plays source and destination of a postcopy migration for vhost-user-blk back-ends, and judges them."
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    _add_backend(parser)
    _add_memory(parser)
    _add_source(parser)
    _add_pages(parser)
    _add_load(parser)
    _add_output(parser)
    return _options(parser, parser.parse_args(arguments))


def _add_backend(parser: Parser) -> None:
    group = parser.add_argument_group("the back-end")
    which = group.add_mutually_exclusive_group()
    which.add_argument(
        "--start",
        metavar="COMMAND",
        help="start this, with {socket}, {disk}, {wake} and {number} filled in; default: our own vhostuser-blk",
    )
    which.add_argument(
        "--socket-path", metavar="PATH", type=Path, action="append", default=[], help="one that runs; once for each"
    )
    group.add_argument(
        "--disk",
        metavar="FILE",
        type=Path,
        action="append",
        default=[],
        help="the raw image that it serves, if it does not take {disk}; it is OVERWRITTEN; once for each",
    )
    group.add_argument(
        "--clients", metavar="N", type=number(1, MOST_CLIENTS), help="back-ends that share the memory, default 1"
    )


def _add_memory(parser: Parser) -> None:
    group = parser.add_argument_group("guest memory")
    group.add_argument("--memory", metavar="MIB", type=number(1, 1 << 20), default=64, help="default 64")
    group.add_argument("--regions", metavar="N", type=number(1, 8), default=2, help="default 2")
    group.add_argument("--one-file", action="store_true", help="all regions in one file, at offsets, as QEMU has them")
    group.add_argument("--page-size", choices=PAGE_SIZES, default="4k", help="default 4k; 2M: from hugetlbfs")
    group.add_argument(
        "--flow",
        type=_several(Flow, both=True),
        default=(Flow.REGIONS,),
        metavar="FLOW",
        help="table: SET_MEM_TABLE, regions: ADD_MEM_REG (default), both: one run of each",
    )


def _add_pages(parser: Parser) -> None:
    group = parser.add_argument_group("the migration")
    group.add_argument(
        "--wake",
        type=_several(Wake),
        default=(Wake.BATCH,),
        metavar="POLICY",
        help="broadcast, demand, batch (default) or channel; several with commas: one run of each, and a comparison",
    )
    group.add_argument(
        "--placement", type=Placement, choices=tuple(Placement), default=Placement.COPY, help="default copy"
    )
    group.add_argument(
        "--order",
        type=Order,
        choices=tuple(Order),
        default=Order.SEQUENTIAL,
        help="of what nobody asked for, default sequential",
    )
    group.add_argument(
        "--withhold",
        metavar="PERCENT",
        type=number(0, 100),
        default=25,
        help="of the pages that requests refer to: they come only when waited for, default 25",
    )


def _add_source(parser: Parser) -> None:
    group = parser.add_argument_group("the source")
    group.add_argument(
        "--bandwidth", metavar="MIB", type=number(0, 1 << 20), default=0, help="a second, default no limit"
    )
    group.add_argument(
        "--latency", metavar="US", type=number(0, 10_000_000), default=0, help="of each page asked for, default 0"
    )
    group.add_argument(
        "--streams", metavar="N", type=number(1, 16), default=1, help="such lines side by side, default 1"
    )
    group.add_argument(
        "--zeros",
        metavar="PERCENT",
        type=number(0, 100),
        default=0,
        help="of its pages with data: all zeros, placed by UFFDIO_ZEROPAGE; default 0",
    )


def _add_load(parser: Parser) -> None:
    group = parser.add_argument_group("the load")
    group.add_argument(
        "--requests", metavar="N", type=number(1, 1 << 24), default=0, help="for each back-end; default: all that fit"
    )
    group.add_argument(
        "--duration", metavar="SECONDS", type=_seconds, default=0.0, help="make requests again for so long"
    )
    group.add_argument("--depth", metavar="N", type=number(1, 16), default=8, help="requests in flight, default 8")
    group.add_argument(
        "--indirect", action="store_true", help="descriptors in indirect tables, which may be missing too"
    )
    group.add_argument(
        "--seed", metavar="N", type=number(0, 1 << 32), default=1, help="of everything random, default 1"
    )
    group.add_argument(
        "--patience",
        metavar="SECONDS",
        type=_seconds,
        default=5.0,
        help="for every answer and every request, default 5",
    )


def _add_output(parser: Parser) -> None:
    group = parser.add_argument_group("the result")
    group.add_argument("--json", action="store_true", help="as JSON on stdout, instead of tables")
    group.add_argument("--plot", metavar="FILE", type=_picture, help="draw a timeline and a histogram: .svg or .png")
    group.add_argument("--quiet", action="store_true", help="no progress on stderr")


def _options(parser: Parser, given: argparse.Namespace) -> Options:
    clients = given.clients or max(1, len(given.socket_path))
    command = None if given.socket_path else given.start or (_OWN_WAKE if Wake.CHANNEL in given.wake else OWN)
    _check(parser, given, clients, command)
    return Options(
        command=command,
        sockets=tuple(given.socket_path),
        disks=tuple(given.disk),
        clients=clients,
        memory=given.memory * MIB,
        regions=given.regions,
        one_file=given.one_file,
        page_size=PAGE_SIZES[given.page_size],
        flows=given.flow,
        wakes=given.wake,
        order=given.order,
        placement=given.placement,
        bandwidth=given.bandwidth * MIB,
        latency=given.latency / 1e6,
        streams=given.streams,
        withhold=given.withhold,
        zeros=given.zeros,
        requests=given.requests,
        duration=given.duration,
        depth=given.depth,
        indirect=given.indirect,
        seed=given.seed,
        patience=given.patience,
        json=given.json,
        plot=given.plot,
        quiet=given.quiet,
    )


def _check(parser: Parser, given: argparse.Namespace, clients: int, command: str | None) -> None:
    if given.socket_path and len(given.socket_path) != clients:
        parser.error(
            f"--clients={clients} needs --socket-path {clients} times, it is given {len(given.socket_path)} times"
        )
    if command is not None and "{socket}" not in command:
        parser.error("--start: the command has no {socket}, which stands for the socket it must listen on")
    _check_disks(parser, given.disk, clients, command)
    if Wake.CHANNEL in given.wake:
        _check_channel(parser, given.placement, command)
    try:
        shlex.split(command or "")
    except ValueError as error:
        parser.error(f"--start: {error}")


def _check_channel(parser: Parser, placement: Placement, command: str | None) -> None:
    if command is None or "{wake}" not in command:
        parser.error("--wake=channel: --start a command with {wake}, which stands for the socket of its wake channel")
    if placement is Placement.CONTINUE:
        # Each back-end's page is mapped through its userfaultfd, which wakes it: whatever it did on the channel would
        # go unseen, and a broken one pass.
        parser.error(
            "--wake=channel: with --placement=continue nobody is woken by the channel, so that nothing of it would be "
            "tried; leave one of them out"
        )


def _check_disks(parser: Parser, disks: Sequence[Path], clients: int, command: str | None) -> None:
    if command is not None and "{disk}" in command:
        if disks:
            parser.error("--disk: the command has {disk}, which is an image of ours")
        return
    if len(disks) != clients:
        source = "--socket-path" if command is None else "--start: a command without {disk}"
        parser.error(f"{source} needs --disk for each back-end: the raw image that it serves (it is overwritten)")
    for disk in disks:
        if not disk.exists():
            parser.error(f"--disk: {disk}: no such file")


# ---- types

E = TypeVar("E", bound=StrEnum)


def _several(kind: type[E], *, both: bool = False) -> Callable[[str], tuple[E, ...]]:
    """One or more of an enum, with commas between; ``both``: a word for all of them."""

    def read(text: str) -> tuple[E, ...]:
        if both and text == "both":
            return tuple(kind)
        try:
            return tuple(kind(word) for word in text.split(","))
        except ValueError:
            words = [*kind, *(["both"] if both else [])]
            raise argparse.ArgumentTypeError(f"{text!r} is not of {', '.join(words)}") from None

    return read


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time in seconds above 0")
    return value


def _picture(text: str) -> Path:
    path = Path(text)
    if path.suffix not in (".svg", ".png"):
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .svg or .png")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path.parent}: no such directory")
    return path
