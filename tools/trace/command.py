"""``vhostuser trace``: options, sockets, where the events are written.

What belongs here: the command. What does not: passing messages on (``relay``), how an event looks (``text``,
``jsonlines``).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

from vhostuser.dataplane import new_event_loop
from vhostuser.tools.endpoint import EndpointError, listen
from vhostuser.tools.service import Parser, number
from vhostuser.tools.trace import dissector, jsonlines, pcapng, text, timeline
from vhostuser.tools.trace.desk import Desk
from vhostuser.tools.trace.events import Event
from vhostuser.tools.trace.faults import Fault, FaultError, Kind, parse
from vhostuser.tools.trace.observer import Observer
from vhostuser.tools.trace.replay import TranscriptError, replay, steps
from vhostuser.tools.trace.tracer import Tracer

_EPILOG = """\
The front-end is started with the socket of --listen, the back-end with that of --connect. SIGUSR1 prints the state of
the rings and who waits for whom.

MESSAGE is a name of docs/messages.md, with .reply behind it for its answer, or any. The back-end's own requests begin
with BACKEND_. docs/trace.md explains the output.

exit status: 0 ended by a signal or --once, or a replay was answered as recorded; 1 it was not, or a socket or file
cannot be had; 2 wrong options
"""


def main(program: str, arguments: Sequence[str]) -> int:
    """The exit status; wrong options end the process with 2."""
    options = _parse(program, arguments)
    try:
        if options.dissector:
            print(dissector.script(), end="")
            return 0
        if options.draw:
            print(_picture(options.draw, options.connection), end="")
            return 0
        if options.replay:
            return asyncio.run(_replay(options))
        _run(options)
    except (EndpointError, TranscriptError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    return 0


def _parse(program: str, arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(program, "Passes everything on between a front-end and a back-end, and says what it sees.")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    side = parser.add_mutually_exclusive_group(required=True)
    side.add_argument("--listen", metavar="PATH", help="socket for front-ends")
    side.add_argument(
        "--replay", metavar="FILE", type=Path, help="say what the front-end of this transcript (--json) said, and exit"
    )
    side.add_argument("--draw", metavar="FILE", type=Path, help="print a picture (SVG) of this transcript, and exit")
    side.add_argument("--dissector", action="store_true", help="print a dissector for Wireshark, and exit")
    parser.add_argument("--connection", metavar="N", type=number(1, 1 << 31), default=1, help="of the transcript")
    parser.add_argument("--connect", metavar="PATH", help="socket of the back-end")
    parser.add_argument("--once", action="store_true", help="exit when the first front-end has gone")
    parser.add_argument("--json", metavar="FILE", help="write JSON lines; - is stdout, in the place of text")
    parser.add_argument(
        "--pcapng", metavar="FILE", help="write packets for Wireshark; - is stdout, in the place of text"
    )
    parser.add_argument("--quiet", action="store_true", help="no text")
    parser.add_argument(
        "--patience", metavar="SECONDS", type=_seconds, default=1.0, help="when a missing answer is told, default 1"
    )
    for kind, metavar, what in (
        (Kind.DELAY, "MS[@MESSAGE]", "hold each message back"),
        (Kind.DROP_FD, "MESSAGE", "take the descriptors away"),
        (Kind.CORRUPT, "MESSAGE", "invert the payload's first byte, or the flags of an empty message"),
        (Kind.KILL_AFTER, "MESSAGE|N", "hang up on both behind it, or behind the Nth message"),
    ):
        parser.add_argument(
            f"--{kind.value}", dest="faults", action="append", metavar=metavar, type=_fault(kind), help=what
        )
    options = parser.parse_args(arguments)
    if (options.listen or options.replay) and not options.connect:
        parser.error("--connect is missing: the socket of the back-end")
    if options.json == options.pcapng == "-":
        parser.error("--json and --pcapng cannot both be stdout")
    if options.listen and options.listen == options.connect:
        parser.error("--listen and --connect are the same socket: the back-end's is that of --connect")
    return options


def _fault(kind: Kind) -> Callable[[str], Fault]:
    def one(value: str) -> Fault:
        try:
            return parse(kind, value)
        except FaultError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return one


def _seconds(value: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{value!r} is not a number of seconds up to 3600")
    return seconds


# ---- the run


def _run(options: argparse.Namespace) -> None:
    _raise_fd_limit()
    with contextlib.ExitStack() as closing:
        began = time.monotonic_ns()
        desk = Desk(Observer(int(options.patience * 1e9)), _writers(options, closing), began)
        closing.callback(desk.close)
        endpoint = listen(options.listen)
        closing.callback(endpoint.close)
        tracer = Tracer(options.connect, desk.report, options.faults or (), began)
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(_until_stopped(tracer, tracer.listen(endpoint, once=options.once)))


def _picture(transcript: Path, connection: int) -> str:
    try:
        return timeline.svg(map(json.loads, transcript.read_text().splitlines()), connection)
    except (ValueError, KeyError, TypeError) as error:
        raise TranscriptError(f"{transcript} is none of 'vhostuser trace --json': {error}") from None


async def _replay(options: argparse.Namespace) -> int:
    script = steps(options.replay.read_text().splitlines(), options.connection)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(options.connect)
    count = 0
    async for different in replay(sock, script):
        count += 1
        print(f"{different.number} {different.name}: then {different.then}; now {different.now}")
    print(f"{len(script)} requests of the front-end, {count} answered otherwise than then")
    return int(count > 0)


def _raise_fd_limit() -> None:
    """Others' descriptors pass through our table."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def _until_stopped(tracer: Tracer, work: Coroutine[None, None, None]) -> None:
    loop = asyncio.get_running_loop()
    working = asyncio.ensure_future(work)
    for ending in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(ending, working.cancel)
    loop.add_signal_handler(signal.SIGUSR1, tracer.status)
    with contextlib.suppress(asyncio.CancelledError):
        await working


def _writers(options: argparse.Namespace, closing: contextlib.ExitStack) -> list[Callable[[Event], None]]:
    """Where events go: text to stdout, JSON lines and packets beside it or in its place."""
    writers: list[Callable[[Event], None]] = []
    if not options.quiet and "-" not in (options.json, options.pcapng):
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        writers.append(_lines(sys.stdout, partial(text.lines, colour=colour)))
    if options.json:
        writers.append(_lines(_output(options.json, "w", sys.stdout, closing), jsonlines.line))
    if options.pcapng:
        out = _output(options.pcapng, "wb", sys.stdout.buffer, closing)
        writers.append(pcapng.writer(partial(_write, out), time.time_ns()))
    return writers


def _output(name: str, mode: str, stdout: Any, closing: contextlib.ExitStack) -> Any:
    return stdout if name == "-" else closing.enter_context(Path(name).open(mode))


def _lines(out: TextIO, line: Callable[[Event], str]) -> Callable[[Event], None]:
    return lambda event: _write(out, line(event) + "\n")


def _write(out: TextIO | BinaryIO, data: str | bytes) -> None:
    """Somebody who no longer reads ends the writing, not the connection."""
    with contextlib.suppress(BrokenPipeError):
        cast(Any, out).write(data)
        out.flush()
