"""``vhostuser inflight``: which requests an in-flight region names, and what is wrong with it.

What belongs here: reading the file and printing. What does not: layouts and rules (``protocol.inflight``).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from vhostuser.protocol import QueueRegionPacked, QueueRegionSplit, inflight_parts
from vhostuser.tools.service import Failure, Parser, number


def main(program: str, arguments: Sequence[str]) -> int:
    """The exit status: 1 for a region that breaks a rule or cannot be read; wrong options end the process with 2."""
    options = _parser(program).parse_args(arguments)
    try:
        parts = _parts(options)
    except Failure as failure:
        raise SystemExit(f"{program}: {failure}") from None
    broken = False
    for index, part in enumerate(parts):
        print(f"ring {index}: {_summary(part)}")
        for violation in part.violations(options.queue_size):
            print(f"ring {index}: wrong: {violation}")
            broken = True
    return int(broken)


def _parser(program: str) -> Parser:
    parser = Parser(program, "Says which requests an in-flight region names as taken, and what is wrong with it.")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "The region is only read. Of a running process it is /proc/PID/fd/N, where /proc/PID/fd has a link to\n"
        "memfd:inflight. exit status: 0, 1 if a rule is broken, 2 for wrong options"
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="the file that GET_INFLIGHT_FD brought")
    parser.add_argument("--queues", metavar="N", type=number(1, 0xFFFF), default=1, help="rings (default: 1)")
    parser.add_argument(
        "--queue-size", metavar="M", type=number(1, 32768), help="entries of each ring (default: as the region says)"
    )
    parser.add_argument("--packed", action="store_true", help="the rings are packed ones")
    parser.add_argument("--offset", metavar="BYTES", type=number(0, 1 << 62), default=0, help="where it begins in FILE")
    return parser


def _parts(options: argparse.Namespace) -> list[QueueRegionSplit | QueueRegionPacked]:
    kind: type[QueueRegionSplit | QueueRegionPacked] = QueueRegionPacked if options.packed else QueueRegionSplit
    try:
        with options.file.open("rb") as file:
            file.seek(options.offset)
            return [kind.parse(part) for part in inflight_parts(file.read(), options.queues)]
    except (OSError, ValueError) as error:
        raise Failure(f"{options.file}: {error}") from None


def _summary(part: QueueRegionSplit | QueueRegionPacked) -> str:
    if not part.version:
        return "nobody has used it"
    return f"{part.desc_num} entries, used_idx {part.used_idx}, in flight: {' '.join(_names(part)) or 'nothing'}"


def _names(part: QueueRegionSplit | QueueRegionPacked) -> Iterator[str]:
    """The chains in flight as the driver names them."""
    for head in part.heads:
        if isinstance(part, QueueRegionSplit):
            yield str(head)
        else:
            yield str(part.id_of(head)) if part.states[head].last < len(part.states) else "?"
