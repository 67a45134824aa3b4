"""What all back-end programs share: common options, signals, readiness, logs and the state dump.

What belongs here: the life of the process, by the back-end program conventions of the vhost-user specification. What
does not: sockets (``endpoint``), devices and their options (``blk``).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import grp
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from vhostuser.backend import Backend
from vhostuser.dataplane import new_event_loop
from vhostuser.device import Device
from vhostuser.tools.endpoint import Endpoint, EndpointError, SocketFile, inherited, listen
from vhostuser.tools.exporter import Address, Exporter, address
from vhostuser.tools.manager import METRICS, MOST_FDS, USERFAULTFD, WAKE, Manager

log = logging.getLogger("vhostuser")

D = TypeVar("D", bound=Device)
Beside = Callable[[], Coroutine[Any, Any, None]]

# How long a stop may take before the process leaves without it, in seconds. What was acknowledged is in the page cache
# by then, so nothing is lost; and a service manager kills after a few seconds.
_PATIENCE = 1.0
_LAST_GROUP = (1 << 32) - 2  # the one behind it means: leave it as it is
_LEVELS = {"error": logging.ERROR, "warn": logging.WARNING, "info": logging.INFO, "debug": logging.DEBUG}


class Failure(Exception):
    """The program cannot work: one line for stderr, exit status 1."""


# ---- options


class Parser(argparse.ArgumentParser):
    """A parser without abbreviations (they would become part of the interface), whose errors are one line, status 2."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def number(low: int, high: int, *, power_of_two: bool = False) -> Callable[[str], int]:
    """An argparse type: a whole number in a range."""
    kind = "a power of two" if power_of_two else "a number"

    def parse(text: str) -> int:
        value = int(text) if text.isdecimal() else low - 1
        if not low <= value <= high or (power_of_two and value & (value - 1)):
            raise argparse.ArgumentTypeError(f"{text!r} is not {kind} from {low} to {high}")
        return value

    return parse


def _mode(text: str) -> int:
    if not text or set(text) - set("01234567") or int(text, 8) > 0o777:
        raise argparse.ArgumentTypeError(f"{text!r} is not an octal mode such as 0660")
    return int(text, 8)


def _group(text: str) -> int:
    try:
        gid = int(text) if text.isdecimal() else grp.getgrnam(text).gr_gid
        if gid > _LAST_GROUP:
            raise KeyError(text)
        return gid
    except KeyError:
        raise argparse.ArgumentTypeError(f"there is no group {text!r}") from None


def add_options(parser: Parser) -> None:
    """The options that every back-end program has."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--socket-path", metavar="PATH", help="Unix socket to listen on")
    where.add_argument("--fd", metavar="N", type=number(0, MOST_FDS), help="inherited socket, listening or connected")
    parser.add_argument("--connect", action="store_true", help="connect to --socket-path, again and again")
    parser.add_argument("--once", action="store_true", help="exit when the first front-end has gone")
    parser.add_argument("--socket-group", metavar="GROUP", type=_group, help="group of the socket file")
    parser.add_argument("--socket-mode", metavar="MODE", type=_mode, default=0o600, help="octal, default 0600")
    parser.add_argument("--log-level", choices=_LEVELS, default="info", help="default info")
    parser.add_argument(
        "--postcopy",
        choices=("auto", "always", "off"),
        default="auto",
        help="auto: offered where permitted and known to work",
    )
    parser.add_argument(
        "--uffd-fd", metavar="N", type=number(0, MOST_FDS), default=-1, help="inherited /dev/userfaultfd"
    )
    parser.add_argument("--wake-socket", metavar="PATH", help="Unix socket for the wake channel of postcopy")
    parser.add_argument("--metrics", metavar="WHERE", type=address, help="serve metrics: unix:PATH or HOST:PORT")
    parser.add_argument("--metrics-remote", action="store_true", help="let other machines read them, too")
    parser.add_argument("--mem-slots", metavar="N", type=number(0, 509), default=509, help="0: whole tables only")


def check_options(parser: Parser, options: argparse.Namespace, manager: Manager) -> None:
    """The rules between options; a usage error where one is broken."""
    if options.connect and options.socket_path is None:
        parser.error("--connect needs --socket-path")
    metrics = options.metrics.path if options.metrics is not None else None
    paths = [path for path in (options.socket_path, options.wake_socket, metrics) if path]
    if len(set(paths)) < len(paths):
        parser.error("--socket-path, --wake-socket and --metrics are sockets of their own: choose different paths")
    if options.socket_path is None and options.fd is None and not manager.sockets():
        parser.error("one of --socket-path and --fd is needed")
    if options.metrics is not None and not options.metrics.local and not options.metrics_remote:
        parser.error("--metrics on an address that other machines reach needs --metrics-remote")


def open_endpoint(options: argparse.Namespace, manager: Manager) -> Endpoint:
    """The endpoint that the options ask for. Raises Failure."""
    try:
        if options.fd is not None:
            return inherited(options.fd)
        if options.socket_path is None:
            (fd, *more) = manager.sockets()
            if more:
                raise Failure(f"the service manager passed {1 + len(more)} sockets (LISTEN_FDS), one is expected")
            return inherited(fd)
        if options.connect:
            return Endpoint(options.socket_path, options.socket_path)
        return listen(options.socket_path, mode=options.socket_mode, group=options.socket_group)
    except EndpointError as error:
        raise Failure(str(error)) from None


# ---- sockets beside the main one


def wake_listener(options: argparse.Namespace, manager: Manager) -> AbstractContextManager[socket.socket | None]:
    """The socket of the wake channel, if there is to be one. Raises Failure, also when entered."""
    return _beside(manager.take(WAKE), options.wake_socket, socket.SOCK_SEQPACKET, options)


def metrics_listener(options: argparse.Namespace, manager: Manager) -> AbstractContextManager[socket.socket | None]:
    """The socket at which metrics are asked for, if there is to be one. Raises Failure, also when entered."""
    passed, where = manager.take(METRICS), options.metrics
    if passed is None and isinstance(where, Address) and not where.path:
        try:
            return where.listen()
        except OSError as error:
            raise Failure(f"--metrics at {where.host} port {where.port}: {error.strerror}") from None
    return _beside(passed, where.path if where else None, socket.SOCK_STREAM, options)


def _beside(
    passed: int | None, path: str | None, kind: int, options: argparse.Namespace
) -> AbstractContextManager[socket.socket | None]:
    """A listening socket: the one passed, or a new one at ``path`` with the main socket's permissions, or none."""
    if passed is not None:
        return _listening(passed, kind)
    return _made(path, kind, options) if path else contextlib.nullcontext()


def _listening(fd: int, kind: int) -> socket.socket:
    try:
        sock = socket.socket(fileno=fd)
        usable = sock.type == kind and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError:
        usable = False
    if not usable:
        raise Failure(f"fd {fd}: not a listening socket of the kind that its name says (LISTEN_FDNAMES)")
    return sock


@contextlib.contextmanager
def _made(path: str, kind: int, options: argparse.Namespace) -> Iterator[socket.socket]:
    file = SocketFile(path)
    try:
        listener = file.create(options.socket_mode, options.socket_group, kind)
    except EndpointError as error:
        raise Failure(str(error)) from None
    try:
        yield listener
    finally:
        file.remove()


# ---- logs


class _Format(logging.Formatter):
    """PROGRAM: level: SOCKET: message. Connections name their socket themselves; nothing else knows it."""

    def __init__(self, program: str, name: str) -> None:
        super().__init__()
        self._program, self._name = program, name

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if not text.startswith(self._name):
            text = f"{self._name}: {text}"
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return f"{self._program}: {record.levelname.lower()}: {text}"


def _log_to_stderr(program: str, name: str, level: str) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_Format(program, name))
    logging.basicConfig(handlers=[handler], level=_LEVELS[level])


# ---- the process


def serve(
    parser: Parser,
    arguments: Sequence[str],
    open_device: Callable[[argparse.Namespace], D],
    beside: Callable[[D], Coroutine[Any, Any, None]] | None = None,
) -> NoReturn:
    """A whole back-end program: reads its options, serves until a signal or the last front-end ends it, then exits.

    ``parser`` has the device's own options; ``open_device`` makes the device of them, and raises Failure when it cannot
    work. ``beside`` runs on the control thread while front-ends are served.

    Status 0 after a clean end, signals included; 1 after a failure and 2 for wrong options, with one line on stderr.
    """
    add_options(parser)
    options = parser.parse_args(arguments)
    manager = Manager(os.environ)
    check_options(parser, options, manager)
    status = 0
    try:
        device = open_device(options)
        loop = new_event_loop()
        asyncio.set_event_loop(loop)
        loop.run_until_complete(
            _Service(parser.prog, options, device, manager).serve(*([partial(beside, device)] if beside else []))
        )
    except Failure as failure:
        print(f"{parser.prog}: {failure}", file=sys.stderr)
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # a thread that waits for a page of a lost guest would hold up any other exit


def serve_device(make: Callable[[], Device], arguments: Sequence[str] | None = None) -> NoReturn:
    """A whole back-end program for a device without options of its own: ``serve_device(MyDevice)``.

    ``arguments`` are those of the command line by default; see ``serve`` for how it ends.
    """
    program = Path(sys.argv[0]).name
    parser = Parser(
        program, (make.__doc__ or "Serves a device to a virtual machine over vhost-user.").partition("\n")[0]
    )
    serve(parser, sys.argv[1:] if arguments is None else arguments, lambda _: make())


class _Service:
    """The process while it serves; lives on the control thread."""

    def __init__(self, program: str, options: argparse.Namespace, device: Device, manager: Manager) -> None:
        self._program = program
        self._options = options
        self._device = device
        self._manager = manager
        self._stop = asyncio.Event()

    async def serve(self, *beside: Beside) -> None:
        loop = asyncio.get_running_loop()
        for end in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(end, self._stop.set)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        endpoint = open_endpoint(self._options, self._manager)
        try:
            _log_to_stderr(self._program, endpoint.name, self._options.log_level)
            with (
                wake_listener(self._options, self._manager) as wakes,
                metrics_listener(self._options, self._manager) as metrics,
            ):
                backend = self._backend(endpoint)
                loop.add_signal_handler(signal.SIGUSR1, self._dump, backend)
                self._manager.tell("READY=1", _status(backend), wait=True)
                await self._attend(endpoint, backend, (*beside, *self._helpers(backend, wakes, metrics)))
        finally:
            endpoint.close()

    def _backend(self, endpoint: Endpoint) -> Backend:
        options = self._options
        obstacle = self._device.postcopy_obstacle if options.postcopy == "auto" else ""
        if obstacle:
            log.warning("postcopy is not offered: %s; --postcopy=always offers it all the same", obstacle)
        passed = self._manager.take(USERFAULTFD)
        return Backend(
            self._device,
            postcopy=options.postcopy != "off" and not obstacle,
            uffd_device=options.uffd_fd if passed is None else passed,
            record=Path(f"{endpoint.path}.postcopy") if endpoint.path else None,
            mem_slots=options.mem_slots,
            changed=lambda backend: self._manager.tell(_status(backend)),
        )

    def _helpers(
        self, backend: Backend, wakes: socket.socket | None, metrics: socket.socket | None
    ) -> Iterator[Beside]:
        if wakes is not None:
            yield partial(backend.wakes.listen, wakes)
        if metrics is not None:
            log.info("metrics at %s", _described(metrics))
            yield partial(Exporter(backend.measure).listen, metrics)
        if self._manager.watchdog:
            yield self._manager.keep_alive

    async def _attend(self, endpoint: Endpoint, backend: Backend, beside: Sequence[Beside]) -> None:
        """Until the last front-end has gone, or the stop, which does not wait longer than the patience."""
        attending = asyncio.ensure_future(endpoint.attend(backend, once=self._options.once))
        stopped = asyncio.ensure_future(self._stop.wait())
        helpers = [asyncio.ensure_future(_help(helper)) for helper in beside]
        await asyncio.wait((attending, stopped), return_when=asyncio.FIRST_COMPLETED)
        for helper in helpers:
            helper.cancel()
        self._manager.tell("STOPPING=1", wait=True)
        if helpers:
            await asyncio.wait(helpers, timeout=_PATIENCE)
        if attending.done():
            attending.result()
            return
        endpoint.close()
        attending.cancel()
        await asyncio.wait((attending,), timeout=_PATIENCE)

    def _dump(self, backend: Backend) -> None:
        state = {"device": self._device.state(), **backend.state()}
        print("vhostuser-state:", json.dumps(state, default=str), file=sys.stderr, flush=True)


async def _help(helper: Beside) -> None:
    """Runs what goes on beside the front-ends; whatever ends it is told, and ends nothing else."""
    try:
        await helper()
    except Exception as error:
        log.error("what ran beside the front-ends has ended: %s", error, exc_info=error)


def _status(backend: Backend) -> str:
    """For people who ask the service manager."""
    count = len(backend.connections)
    return "STATUS=" + ("Waiting for a front-end" if not count else f"Serving {count} front-end{'s' * (count > 1)}")


def _described(listener: socket.socket) -> str:
    name = listener.getsockname()
    if isinstance(name, tuple):
        host, port = name[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/metrics"
    return f"unix:{name if isinstance(name, str) else repr(name)}, /metrics"
