"""``vhostuser conform``: tries whether a back-end or a front-end keeps to the specification.

What belongs here: options, what is printed where, the exit status. What does not: cases and verdicts
(``vhostuser.conformance``).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from vhostuser.conformance import backend_cases, frontend_cases, report
from vhostuser.conformance.bench import BackendBench, Device, Settings
from vhostuser.conformance.caller import command
from vhostuser.conformance.offer import offer_of
from vhostuser.conformance.report import Report
from vhostuser.conformance.stage import FrontendBench
from vhostuser.conformance.stage import Settings as FrontendSettings
from vhostuser.conformance.suite import Bench, Case, Result, Unreachable, Verdict, judge_all, select
from vhostuser.conformance.waivers import WaiverError, Waivers
from vhostuser.tools.service import Parser, number

_EPILOG = """\
exit status: 0 it conforms, 1 it does not, 2 wrong options, 3 there is nothing to try

How to read a verdict, how to waive one, how to use this in CI: docs/conformance.md
"""

_UNREACHABLE = 3


def main(program: str, arguments: Sequence[str]) -> int:
    """The exit status; wrong options end the process with 2."""
    side = SIDES["frontend" if "frontend" in arguments[:1] else "backend"]
    options = _parse(program, arguments, side)
    cases = select(side.cases, options.cases, options.section)
    if options.list:
        print(report.listing(cases))
        return 0
    try:
        outcome = asyncio.run(_run(options, side, cases))
    except Unreachable as error:
        print(f"{program}: {error}", file=sys.stderr)
        return _UNREACHABLE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    _write(options, outcome)
    return 0 if outcome.conforms else 1


# ---- the two sides


class _Bench(Bench[Any], Protocol):
    """A bench with a beginning and an end."""

    async def look(self) -> object: ...

    async def close(self) -> None: ...


class Side(NamedTuple):
    """What is tried. add: its options. check: what argparse does not; calls ``parser.error``."""

    about: str
    cases: Sequence[Case[Any]]
    add: Callable[[Parser], None]
    check: Callable[[Parser, argparse.Namespace], None]
    bench: Callable[[argparse.Namespace], _Bench]


def _add_backend(parser: Parser) -> None:
    parser.add_argument("--socket-path", metavar="PATH", type=Path, help="the back-end that listens here")
    parser.add_argument(
        "--start", metavar="COMMAND",
        help="start the back-end anew for every case; {socket} is its socket, {image} a disk image of 64 MiB,"
        " {directory} a directory, all of them its own. A disk is written to",
    )  # fmt: skip
    parser.add_argument("--keep", action="store_true", help="start it anew only after a case that did not pass")
    parser.add_argument(
        "--device", type=Device, choices=list(Device), default=Device.BLK, metavar="blk|net|generic",
        help="what the back-end is, default blk; generic: only what needs no requests",
    )  # fmt: skip
    parser.add_argument(
        "--ring", type=number(0, 254), metavar="N",
        help="with --device=generic: this ring returns every request that it is given, whatever is in it, so that"
        " cases about rings are tried too",
    )  # fmt: skip
    parser.add_argument(
        "--frames-return", action="store_true",
        help="a network device's frames come back as they were sent; without this option one is sent to see",
    )  # fmt: skip
    parser.add_argument(
        "--quiet-time", type=_seconds, default=0.05, metavar="SECONDS",
        help="how long to look on where nothing may happen, default 0.05",
    )  # fmt: skip


def _check_start(parser: Parser, options: argparse.Namespace) -> None:
    if not options.list and bool(options.start) == bool(options.socket_path):
        parser.error("give either --start or --socket-path")
    if options.start and "{socket}" not in options.start:
        parser.error("--start: the command has no {socket}; put it where its option wants the path")
    try:
        shlex.split(options.start or "")
    except ValueError as error:
        parser.error(f"--start: {error}")


def _check_backend(parser: Parser, options: argparse.Namespace) -> None:
    _check_start(parser, options)
    if options.ring is not None and options.device is not Device.GENERIC:
        parser.error(f"--ring is for --device=generic: which ring of a {options.device.value} device is tried is known")


def _backend_bench(options: argparse.Namespace) -> BackendBench:
    path, start = options.socket_path, options.start or ""
    patience, quiet, loops = options.timeout, options.quiet_time, options.frames_return
    return BackendBench(Settings(path, start, options.keep, options.device, patience, quiet, loops, options.ring))


def _add_frontend(parser: Parser) -> None:
    parser.add_argument(
        "--socket-path", metavar="PATH", type=Path,
        help="listen here for a front-end that runs already, and connects again and again",
    )  # fmt: skip
    parser.add_argument(
        "--start", metavar="COMMAND",
        help="start the front-end anew for every play; {socket} is the socket of its back-end, {directory} a"
        " directory, both of them its own",
    )  # fmt: skip
    parser.add_argument("--server", action="store_true", help="the front-end listens on the socket, and we connect")
    parser.add_argument(
        "--device", type=Device, choices=list(Device), default=Device.BLK, metavar="blk|net|generic",
        help="what kind of device it is offered, default blk",
    )  # fmt: skip
    parser.add_argument(
        "--quiet-time", type=_seconds, default=0.2, metavar="SECONDS",
        help="a front-end that says nothing for so long has set up all that it will, default 0.2",
    )  # fmt: skip


def _frontend_bench(options: argparse.Namespace) -> FrontendBench:
    launch = command(options.start) if options.start else None
    return FrontendBench(
        FrontendSettings(
            offer_of(options.device), options.socket_path, launch, options.server, options.timeout, options.quiet_time
        )
    )


# ---- options


def _parse(program: str, arguments: Sequence[str], side: Side) -> argparse.Namespace:
    parser = Parser(program, f"Tries whether a vhost-user {side.about} keeps to the specification. No VM is needed.")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.add_argument("side", choices=SIDES, help="what is tried; each has its own options")
    parser.add_argument(
        "cases", nargs="*", default=[], metavar="ID", help="only these: an id, its beginning, or a pattern"
    )
    side.add(parser)
    _add_judgement(parser)
    options = parser.parse_intermixed_args(arguments)
    if SIDES[options.side] is not side:
        parser.error(f"{options.side} comes before its options: {program} {options.side} ...")
    side.check(parser, options)
    _check_targets(parser, options)
    if not select(side.cases, options.cases, options.section):
        parser.error("no case has such an id and section; --list shows them all")
    options.waive = _waivers(parser, options.waive)
    return options


def _add_judgement(parser: Parser) -> None:
    parser.add_argument("--jobs", type=number(1, 64), metavar="N", help="cases at a time, default 1, with --start 2")
    parser.add_argument(
        "--timeout", type=_seconds, default=3.0, metavar="SECONDS", help="patience for each answer, default 3"
    )
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


def _check_targets(parser: Parser, options: argparse.Namespace) -> None:
    """What cannot be written is told before the minutes that a run takes, and not after them."""
    for name, target in (("--json", options.json), ("--junit", options.junit)):
        if target in (None, "-"):
            continue
        path = Path(target)
        if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
            parser.error(f"{name}: {target} cannot be written")


# ---- the run


async def _run(options: argparse.Namespace, side: Side, cases: Sequence[Case[Any]]) -> Report:
    bench = side.bench(options)
    await bench.look()
    try:
        return await _judge(options, bench, cases)
    finally:
        await bench.close()


async def _judge(options: argparse.Namespace, bench: _Bench, cases: Sequence[Case[Any]]) -> Report:
    jobs = options.jobs or (2 if options.start else 1)
    progress = _Progress(options, len(cases))
    found: dict[str, Result[Any]] = {}
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

    def show(self, result: Result[Any]) -> None:
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


SIDES = {
    "backend": Side("back-end", backend_cases.CASES, _add_backend, _check_backend, _backend_bench),
    "frontend": Side("front-end", frontend_cases.CASES, _add_frontend, _check_start, _frontend_bench),
}
