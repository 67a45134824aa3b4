"""What all back-end programs share: common options, signals, readiness, logs and the state dump.

What belongs here: the life of the process, by the back-end program conventions of the vhost-user specification. What
does not: sockets (``endpoint``), devices and their options (``blk``).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
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
from vhostuser.metrics import Sample, labelled
from vhostuser.tools.capabilities import capabilities
from vhostuser.tools.endpoint import Endpoint, EndpointError, SocketFile, inherited, listen, name_of
from vhostuser.tools.exporter import Address, Exporter, address
from vhostuser.tools.manager import METRICS, MOST_FDS, USERFAULTFD, WAKE, Manager

log = logging.getLogger("vhostuser")

D = TypeVar("D", bound=Device)
Beside = Callable[[], Coroutine[Any, Any, None]]
OpenDevices = Callable[[argparse.Namespace, Sequence[str]], Sequence[D]]
"""Makes the devices of a program of its options and the names of its sockets: one for each. Raises Failure."""

# How long a stop may take before the process leaves without it, in seconds. What was acknowledged is in the page cache
# by then, so nothing is lost; and a service manager kills after a few seconds.
_PATIENCE = 1.0
_LAST_GROUP = (1 << 32) - 2  # the one behind it means: leave it as it is
_LEVELS = {"error": logging.ERROR, "warn": logging.WARNING, "info": logging.INFO, "debug": logging.DEBUG}


_SEVERAL = (
    "one process serves several front-ends, and each that held its userfaultfd could reach the memory of all: "
    "start a process for each guest that is to migrate by postcopy"
)


class Failure(Exception):
    """The program cannot work: one line for stderr, exit status 1."""

    status = 1


class Misuse(Failure):
    """The options do not go together: one line for stderr, exit status 2."""

    status = 2


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
    where.add_argument(
        "--socket-path",
        metavar="PATH",
        action="append",
        default=[],
        help="Unix socket to listen on; of a program with several ports once for each",
    )
    where.add_argument(
        "--fd",
        metavar="N",
        type=number(0, MOST_FDS),
        action="append",
        default=[],
        help="inherited socket, listening or connected",
    )
    parser.add_argument("--connect", action="store_true", help="connect to --socket-path, again and again")
    parser.add_argument("--once", action="store_true", help="exit when the first front-end (of each port) has gone")
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
    parser.add_argument("--print-capabilities", action="store_true", help="print the capabilities as JSON and exit")
    parser.add_argument("--mem-slots", metavar="N", type=number(0, 509), default=509, help="0: whole tables only")


def check_options(parser: Parser, options: argparse.Namespace, manager: Manager) -> None:
    """The rules between options; a usage error where one is broken."""
    if options.connect and not options.socket_path:
        parser.error("--connect needs --socket-path")
    metrics = options.metrics.path if options.metrics is not None else None
    paths = [*options.socket_path, *filter(None, (options.wake_socket, metrics))]
    if len(set(paths)) < len(paths) or len(set(options.fd)) < len(options.fd):
        parser.error("--socket-path, --wake-socket and --metrics are sockets of their own: choose different paths")
    sockets = socket_names(options, manager)
    if not sockets:
        parser.error("one of --socket-path and --fd is needed")
    if len(sockets) > 1 and (options.wake_socket or options.postcopy == "always"):
        parser.error(f"with {len(sockets)} sockets there is no postcopy, and no --wake-socket: {_SEVERAL}")
    if options.metrics is not None and not options.metrics.local and not options.metrics_remote:
        parser.error("--metrics on an address that other machines reach needs --metrics-remote")


def socket_names(options: argparse.Namespace, manager: Manager) -> list[str]:
    """What names each vhost-user socket in the log, before any of them is opened."""
    return options.socket_path or [name_of(fd) for fd in options.fd or manager.sockets()]


def open_endpoints(options: argparse.Namespace, manager: Manager) -> list[Endpoint]:
    """The endpoints that the options ask for, as many as ``socket_names``; all or none. Raises Failure."""
    endpoints: list[Endpoint] = []
    try:
        for path in options.socket_path:
            endpoints.append(_at(path, options))
        if not endpoints:
            endpoints.extend(map(inherited, options.fd or manager.sockets()))
    except EndpointError as error:
        for endpoint in endpoints:
            endpoint.close()
        raise Failure(str(error)) from None
    return endpoints


def _at(path: str, options: argparse.Namespace) -> Endpoint:
    if options.connect:
        return Endpoint(path, path)
    return listen(path, mode=options.socket_mode, group=options.socket_group)


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
    """PROGRAM: level: SOCKET: message. What belongs to one of several sockets names it itself; the rest is the
    program's."""

    def __init__(self, program: str, names: Sequence[str]) -> None:
        super().__init__()
        self._program = program
        self._names = tuple(f"{name}: " for name in names)

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if len(self._names) == 1 and not text.startswith(self._names):
            text = self._names[0] + text
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return f"{self._program}: {record.levelname.lower()}: {text}"


def _log_to_stderr(program: str, names: Sequence[str], level: str) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_Format(program, names))
    logging.basicConfig(handlers=[handler], level=_LEVELS[level])


# ---- the process


def serve(
    parser: Parser,
    arguments: Sequence[str],
    open_device: Callable[[argparse.Namespace], D],
    beside: Callable[[D], Coroutine[Any, Any, None]] | None = None,
) -> NoReturn:
    """A whole back-end program of one device: reads its options, serves until a signal or the last front-end ends it,
    then exits.

    ``parser`` has the device's own options; ``open_device`` makes the device of them, and raises Failure when it cannot
    work. ``beside`` runs on the control thread while front-ends are served.

    Status 0 after a clean end, signals included; 1 after a failure and 2 for wrong options, with one line on stderr.
    """

    def alone(options: argparse.Namespace, sockets: Sequence[str]) -> Sequence[D]:
        if len(sockets) > 1:
            of_options = options.socket_path or options.fd  # else a service manager's (LISTEN_FDS)
            raise (Misuse if of_options else Failure)(f"there are {len(sockets)} sockets, and one device for them")
        return [open_device(options)]

    serve_ports(parser, arguments, alone, beside)


def serve_ports(
    parser: Parser,
    arguments: Sequence[str],
    open_devices: OpenDevices[D],
    beside: Callable[[D], Coroutine[Any, Any, None]] | None = None,
) -> NoReturn:
    """The same with a device for each of several sockets. Postcopy is then not offered."""
    add_options(parser)
    options = parser.parse_args(arguments)
    manager = Manager(os.environ)
    check_options(parser, options, manager)
    status = 0
    try:
        devices = open_devices(options, socket_names(options, manager))
        loop = new_event_loop()
        asyncio.set_event_loop(loop)
        helpers = [partial(beside, device) for device in devices] if beside else []
        loop.run_until_complete(_Service(parser.prog, options, manager).serve(devices, *helpers))
    except Failure as failure:
        print(f"{parser.prog}: {failure}", file=sys.stderr)
        status = failure.status
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # a thread that waits for a page of a lost guest would hold up any other exit


def serve_device(make: Callable[[], Device], arguments: Sequence[str] | None = None) -> NoReturn:
    """A whole back-end program for a device without options of its own: ``serve_device(MyDevice)``.

    ``arguments`` are those of the command line by default; see ``serve`` for how it ends. ``make`` is called once, also
    where only the capabilities are asked for, which the device's ``virtio_id`` tells.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--print-capabilities" in arguments:  # whatever else there is
        print(capabilities(make().virtio_id), flush=True)
        sys.exit(0)
    program = Path(sys.argv[0]).name
    parser = Parser(
        program, (make.__doc__ or "Serves a device to a virtual machine over vhost-user.").partition("\n")[0]
    )
    serve(parser, arguments, lambda _: make())


@dataclasses.dataclass(frozen=True, slots=True)
class _Port:
    """A device and where its front-ends come from."""

    endpoint: Endpoint
    device: Device
    backend: Backend

    def state(self) -> dict[str, object]:
        return {"device": self.device.state(), **self.backend.state()}


class _Service:
    """The process while it serves; lives on the control thread."""

    def __init__(self, program: str, options: argparse.Namespace, manager: Manager) -> None:
        self._program = program
        self._options = options
        self._manager = manager
        self._stop = asyncio.Event()
        self._ports: list[_Port] = []

    async def serve(self, devices: Sequence[Device], *beside: Beside) -> None:
        """One endpoint for each device, in their order."""
        loop = asyncio.get_running_loop()
        for end in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(end, self._stop.set)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        endpoints = open_endpoints(self._options, self._manager)
        try:
            _log_to_stderr(self._program, [endpoint.name for endpoint in endpoints], self._options.log_level)
            with (
                wake_listener(self._options, self._manager) as wakes,
                metrics_listener(self._options, self._manager) as metrics,
            ):
                self._open_ports(endpoints, devices)
                loop.add_signal_handler(signal.SIGUSR1, self._dump)
                self._manager.tell("READY=1", self._status(), wait=True)
                await self._attend((*beside, *self._helpers(wakes, metrics)))
        finally:
            for endpoint in endpoints:
                endpoint.close()

    def _open_ports(self, endpoints: Sequence[Endpoint], devices: Sequence[Device]) -> None:
        postcopy = self._postcopy(devices)
        passed = self._manager.take(USERFAULTFD)
        for endpoint, device in zip(endpoints, devices, strict=True):
            backend = Backend(
                device,
                postcopy=postcopy,
                uffd_device=self._options.uffd_fd if passed is None else passed,
                record=Path(f"{endpoint.path}.postcopy") if endpoint.path else None,
                mem_slots=self._options.mem_slots,
                changed=lambda _: self._manager.tell(self._status()),
            )
            self._ports.append(_Port(endpoint, device, backend))

    def _postcopy(self, devices: Sequence[Device]) -> bool:
        """Whether it may be offered; one line of the log says why not."""
        wanted = self._options.postcopy
        if wanted == "off":
            return False
        obstacle = devices[0].postcopy_obstacle if wanted == "auto" else ""
        if len(devices) > 1:
            log.warning("postcopy is not offered: %s", _SEVERAL)
        elif obstacle:
            log.warning("postcopy is not offered: %s; --postcopy=always offers it all the same", obstacle)
        return len(devices) == 1 and not obstacle

    def _helpers(self, wakes: socket.socket | None, metrics: socket.socket | None) -> Iterator[Beside]:
        if wakes is not None:
            yield partial(self._ports[0].backend.wakes.listen, wakes)
        if metrics is not None:
            log.info("metrics at %s", _described(metrics))
            yield partial(Exporter(self._measure).listen, metrics)
        if self._manager.watchdog:
            yield self._manager.keep_alive

    async def _attend(self, beside: Sequence[Beside]) -> None:
        """Until the last front-end has gone, or the stop, which does not wait longer than the patience."""
        attending = asyncio.ensure_future(self._attend_ports())
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
        for port in self._ports:
            port.endpoint.close()
        attending.cancel()
        await asyncio.wait((attending,), timeout=_PATIENCE)

    async def _attend_ports(self) -> None:
        """Returns when no other front-end will come to any port."""
        once = self._options.once
        await asyncio.gather(*(port.endpoint.attend(port.backend, once=once) for port in self._ports))

    # ---- what others see

    def _measure(self) -> Iterator[Sample]:
        """With several ports each sample says whose it is."""
        for port in self._ports:
            samples = port.backend.measure()
            yield from samples if len(self._ports) == 1 else labelled(samples, "socket", port.endpoint.name)

    def _dump(self) -> None:
        """Of one port its state, of several that of each by the name of its socket."""
        states = {port.endpoint.name: port.state() for port in self._ports}
        shown = {"ports": states} if len(states) > 1 else self._ports[0].state()
        print("vhostuser-state:", json.dumps(shown, default=str), file=sys.stderr, flush=True)

    def _status(self) -> str:
        """For people who ask the service manager."""
        count = sum(len(port.backend.connections) for port in self._ports)
        return "STATUS=" + ("Waiting for a front-end" if not count else f"Serving {count} front-end{'s' * (count > 1)}")


async def _help(helper: Beside) -> None:
    """Runs what goes on beside the front-ends; whatever ends it is told, and ends nothing else."""
    try:
        await helper()
    except Exception as error:
        log.error("what ran beside the front-ends has ended: %s", error, exc_info=error)


def _described(listener: socket.socket) -> str:
    name = listener.getsockname()
    if isinstance(name, tuple):
        host, port = name[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/metrics"
    return f"unix:{name if isinstance(name, str) else repr(name)}, /metrics"
