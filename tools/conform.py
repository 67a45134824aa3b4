"""``vhostuser conform``: tries whether a back-end keeps to the specification.

What belongs here: options, what is printed where, the exit status. What does not: cases and verdicts
(``vhostuser.conformance``).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from vhostuser.conformance import report
from vhostuser.conformance.backend_cases import CASES
from vhostuser.conformance.bench import BackendBench, Device, Settings
from vhostuser.conformance.peer import Peer
from vhostuser.conformance.report import Report
from vhostuser.conformance.suite import Case, Result, Unreachable, Verdict, judge_all, select
from vhostuser.conformance.waivers import WaiverError, Waivers
from vhostuser.tools.service import Parser, number

_EPILOG = """\
exit status: 0 the back-end conforms, 1 it does not, 2 wrong options, 3 there is no back-end to try

A disk is written to. How to read a verdict, how to waive one, how to use this in CI: docs/conformance.md
"""

_UNREACHABLE = 3


def main(program: str, arguments: Sequence[str]) -> int:
    """The exit status; wrong options end the process with 2."""
    options = _parse(program, arguments)
    cases = select(CASES, options.cases, options.section)
    if options.list:
        print(report.listing(cases))
        return 0
    try:
        outcome = asyncio.run(_run(options, cases))
    except Unreachable as error:
        print(f"{program}: {error}", file=sys.stderr)
        return _UNREACHABLE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    _write(options, outcome)
    return 0 if outcome.conforms else 1


# ---- options


def _parse(program: str, arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(program, "Tries whether a vhost-user back-end keeps to the specification. No VM is needed.")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.add_argument("side", choices=("backend",), help="what is tried")
    parser.add_argument("cases", nargs="*", metavar="ID", help="only these: an id, its beginning, or a pattern")
    _add_subject(parser)
    _add_judgement(parser)
    options = parser.parse_intermixed_args(arguments)
    if not options.list and bool(options.start) == bool(options.socket_path):
        parser.error("give either --start or --socket-path")
    if options.start and "{socket}" not in options.start:
        parser.error("--start: the command has no {socket}; put it where the back-end's option wants the path")
    if not select(CASES, options.cases, options.section):
        parser.error("no case has such an id and section; --list shows them all")
    options.waive = _waivers(parser, options.waive)
    return options


def _add_subject(parser: Parser) -> None:
    parser.add_argument("--socket-path", metavar="PATH", type=Path, help="the back-end that listens here")
    parser.add_argument(
        "--start", metavar="COMMAND",
        help="start the back-end anew for every case; {socket} is its socket, {image} a disk image of 64 MiB,"
        " {directory} a directory, all of them its own",
    )  # fmt: skip
    parser.add_argument("--keep", action="store_true", help="start it anew only after a case that did not pass")
    parser.add_argument(
        "--device", type=Device, choices=list(Device), default=Device.BLK, metavar="blk|net|generic",
        help="what the back-end is, default blk; generic: only what needs no requests",
    )  # fmt: skip
    parser.add_argument("--jobs", type=number(1, 64), metavar="N", help="cases at a time, default 1, with --start 2")
    parser.add_argument(
        "--timeout", type=_seconds, default=3.0, metavar="SECONDS", help="patience for each answer, default 3"
    )
    parser.add_argument(
        "--quiet-time", type=_seconds, default=0.05, metavar="SECONDS",
        help="how long to look on where nothing may happen, default 0.05",
    )  # fmt: skip


def _add_judgement(parser: Parser) -> None:
    parser.add_argument("--section", action="append", default=[], metavar="TEXT", help="only rules of such sections")
    parser.add_argument("--list", action="store_true", help="show the cases and exit")
    parser.add_argument("--strict", action="store_true", help="recommendations count as rules")
    parser.add_argument("--waive", type=Path, metavar="FILE", help="known deviations: lines of 'ID: reason'")
    parser.add_argument("--json", metavar="FILE", help="write results as JSON; - is stdout")
    parser.add_argument("--junit", metavar="FILE", help="write results as JUnit XML; - is stdout")
    parser.add_argument("--verbose", action="store_true", help="show cases that pass or are skipped too")
    parser.add_argument("--quiet", action="store_true", help="show the summary alone")


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds up to 600")
    return value


def _waivers(parser: Parser, path: Path | None) -> Waivers:
    if path is None:
        return Waivers()
    try:
        return Waivers.parse(path.read_text())
    except OSError as error:
        parser.error(f"--waive: {path}: {error.strerror}")
    except (WaiverError, UnicodeDecodeError) as error:
        parser.error(f"--waive: {path}: {error}")


# ---- the run


async def _run(options: argparse.Namespace, cases: list[Case[Peer]]) -> Report:
    bench = BackendBench(
        Settings(
            options.socket_path, options.start or "", options.keep, options.device, options.timeout, options.quiet_time
        )
    )
    await bench.look()
    try:
        return await _judge(options, bench, cases)
    finally:
        await bench.close()


async def _judge(options: argparse.Namespace, bench: BackendBench, cases: list[Case[Peer]]) -> Report:
    jobs = options.jobs or (2 if options.start else 1)
    progress = _Progress(options, len(cases))
    found: dict[str, Result[Peer]] = {}
    async for result in judge_all(cases, bench, jobs=jobs, patience=10 * options.timeout):
        found[result.case.id] = options.waive.apply(result)
        progress.show(found[result.case.id])
    progress.end()
    results = [found[case.id] for case in cases]
    subject = options.start or str(options.socket_path)
    return Report(subject, results, options.strict, options.waive.idle(results))


class _Progress:
    """What is shown while cases run, on stderr: lines of results, on a terminal a counter below them."""

    def __init__(self, options: argparse.Namespace, total: int) -> None:
        self._strict, self._verbose, self._quiet = options.strict, options.verbose, options.quiet
        self._total = total
        self._done = 0
        self._terminal = sys.stderr.isatty()
        self._colour = self._terminal and "NO_COLOR" not in os.environ

    def show(self, result: Result[Peer]) -> None:
        self._done += 1
        if self._quiet:
            return
        self.end()
        if self._verbose or result.verdict in (Verdict.FAIL, Verdict.ERROR):
            print(report.line(result, strict=self._strict, colour=self._colour), file=sys.stderr)
        if self._terminal:
            print(f"[{self._done}/{self._total}] {result.case.id}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Clears the counter."""
        if self._terminal and not self._quiet:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _write(options: argparse.Namespace, outcome: Report) -> None:
    for target, make in ((options.json, report.as_json), (options.junit, report.as_junit)):
        if target == "-":
            print(make(outcome))
        elif target:
            Path(target).write_text(make(outcome))
    if "-" not in (options.json, options.junit):
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        print(report.summary(outcome, colour=colour))
