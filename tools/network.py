"""The program behind ``vhostuser-net``: serves a network interface to a virtual machine.

What belongs here: the options of the interfaces and of their ends. What does not: those that every back-end program has
(``service``), what an end is (``vhostuser.devices.ends``).
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import re
import socket
from collections.abc import Callable, Sequence
from typing import Final, NoReturn

from vhostuser.devices.capture import SNAP_LEAST, SNAP_MOST, Capture
from vhostuser.devices.ends import AGEING, End, EndError, Hub, Sink, Source, Tap, loopback
from vhostuser.devices.net import MTU_LEAST, MTU_MOST, POLL_US, Net, NetSettings, local_mac
from vhostuser.devices.sockets import Datagram, Stream
from vhostuser.tools import service
from vhostuser.tools.endpoint import LONGEST_PATH, EndpointError, SocketFile
from vhostuser.tools.manager import MOST_FDS
from vhostuser.tools.service import Failure, Misuse, Parser, number

_MOST_PAIRS = 128
_OLDEST_STATION = 1_000_000  # seconds; IEEE 802.1D, table 7-5
_LONGEST_NAME = 15  # IFNAMSIZ, without its terminating zero


def serve(program: str, arguments: Sequence[str]) -> NoReturn:
    """Runs until a signal or the last front-end ends it; ends the process."""
    service.serve_ports(_parser(program), arguments, _interfaces, Net.attend)


def _parser(program: str) -> Parser:
    parser = Parser(program, "Serves a network interface to a virtual machine over vhost-user.")
    parser.add_argument(
        "--end",
        metavar="KIND[:WHAT]",
        type=_end,
        required=True,
        help="where frames go: tap:NAME, tap:fd=N[,N...], stream:PATH, stream:listen=PATH, "
        "dgram:local=PATH,remote=PATH, loopback, sink, source[:BYTES]; between several sockets: peer, switch[:AGEING]",
    )
    parser.add_argument(
        "--mac",
        metavar="ADDRESS",
        type=_mac,
        action="append",
        default=[],
        help="of several sockets in their order; default: random ones",
    )
    parser.add_argument("--mtu", metavar="BYTES", type=number(MTU_LEAST, MTU_MOST), default=1500, help="default 1500")
    parser.add_argument("--queue-pairs", metavar="N", type=number(1, _MOST_PAIRS), default=1, help="default 1")
    parser.add_argument(
        "--queue-size",
        metavar="N",
        type=number(2, 32768, power_of_two=True),
        default=1024,
        help="largest ring accepted, default 1024",
    )
    parser.add_argument("--speed", metavar="MBPS", type=number(1, 1 << 30), default=10_000, help="default 10000")
    parser.add_argument(
        "--poll-us", metavar="N", type=number(0, 10000), default=POLL_US, help="poll an idle ring so long"
    )
    parser.add_argument("--pcap", metavar="FILE", help="record the frames that pass, both ways, as pcapng")
    parser.add_argument(
        "--pcap-snaplen",
        metavar="BYTES",
        type=number(SNAP_LEAST, SNAP_MOST),
        default=SNAP_MOST,
        help="of each frame at most; default: all",
    )
    return parser


def _interfaces(options: argparse.Namespace, sockets: Sequence[str]) -> list[Net]:
    if len(options.mac) > len(sockets) or len(set(options.mac)) < len(options.mac):
        raise Misuse(f"--mac is for one interface each: {len(options.mac)} of them for {len(sockets)}, all different")
    try:
        ends = options.end(options, sockets)
        if options.pcap is not None:
            capture = Capture(options.pcap, sockets, snap=options.pcap_snaplen)
            ends = [capture.end(end, port) for port, end in enumerate(ends)]
    except (EndError, EndpointError) as error:
        raise Failure(str(error)) from None
    macs = itertools.chain(options.mac, iter(local_mac, None))
    return [Net(end, _settings(options, mac)) for end, mac in zip(ends, macs, strict=False)]


def _settings(options: argparse.Namespace, mac: bytes) -> NetSettings:
    return NetSettings(
        mac=mac, mtu=options.mtu, queue_size=options.queue_size, speed=options.speed, poll_us=options.poll_us
    )


# ---- values

MakeEnd = Callable[[argparse.Namespace], End]
"""Makes an end as the other options say. Raises EndError, EndpointError."""
MakeEnds = Callable[[argparse.Namespace, Sequence[str]], Sequence[End]]
"""The same for each of these sockets. Raises Misuse where their number is wrong."""


def _end(text: str) -> MakeEnds:
    kind, _, what = text.partition(":")
    if kind in _HUBS:
        return _HUBS[kind](what)
    if kind not in _KINDS:
        raise argparse.ArgumentTypeError(f"there is no kind of end {kind!r}, only {', '.join([*_KINDS, *_HUBS])}")
    return _alone(kind, _KINDS[kind](what))


def _alone(kind: str, make: MakeEnd) -> MakeEnds:
    def ends(options: argparse.Namespace, sockets: Sequence[str]) -> Sequence[End]:
        if len(sockets) != 1:
            raise Misuse(f"--end={kind} is for one socket, not for {len(sockets)}; between several: {', '.join(_HUBS)}")
        return [make(options)]

    return ends


def _peer(what: str) -> MakeEnds:
    def ends(options: argparse.Namespace, sockets: Sequence[str]) -> Sequence[End]:
        if len(sockets) != 2:
            raise Misuse(f"--end=peer joins two sockets, not {len(sockets)}: give --socket-path twice")
        return Hub(2, options.queue_pairs, names=sockets).ports

    if what:
        raise argparse.ArgumentTypeError(f"this kind of end takes nothing behind it, not {what!r}")
    return ends


def _switch(what: str) -> MakeEnds:
    ageing = number(0, _OLDEST_STATION)(what) if what else AGEING

    def ends(options: argparse.Namespace, sockets: Sequence[str]) -> Sequence[End]:
        return Hub(len(sockets), options.queue_pairs, learn=True, ageing=ageing, names=sockets).ports

    return ends


def _tap(what: str) -> MakeEnd:
    if what.startswith("fd="):
        fds = list(map(number(0, MOST_FDS), what.removeprefix("fd=").split(",")))
        if len(set(fds)) < len(fds) or len(fds) > _MOST_PAIRS:
            raise argparse.ArgumentTypeError(f"{what!r} is not fd=N[,N...] with a descriptor for each queue pair")
        return lambda options: _passed(fds, options.queue_pairs)
    if not re.fullmatch(r"[^/\s]+", what) or len(os.fsencode(what)) > _LONGEST_NAME:
        raise argparse.ArgumentTypeError(
            f"tap:NAME needs the name of an interface, at most {_LONGEST_NAME} bytes, not {what!r}"
        )
    return lambda options: Tap(what, options.queue_pairs)


def _passed(fds: list[int], pairs: int) -> Tap:
    if pairs not in (1, len(fds)):
        raise EndError(f"{pairs} queue pairs, but {len(fds)} descriptors of the tap")
    return Tap(fds=fds)


def _source(what: str) -> MakeEnd:
    size = int(what) if what.isdecimal() else 0 if what else 64
    if size not in Source.SIZES:
        raise argparse.ArgumentTypeError(f"source:BYTES, from {Source.SIZES[0]} to {Source.SIZES[-1]}, not {what!r}")
    return lambda options: Source(options.queue_pairs, size)


def _stream(what: str) -> MakeEnd:
    path = what.removeprefix("listen=")
    if not 0 < len(os.fsencode(path)) <= LONGEST_PATH:
        raise argparse.ArgumentTypeError(f"stream:[listen=]PATH, at most {LONGEST_PATH} bytes, not {what!r}")
    return lambda options: Stream(path, options.queue_pairs) if path == what else _Listening(path, options)


class _Listening(Stream):
    """Its socket file goes with it."""

    def __init__(self, path: str, options: argparse.Namespace) -> None:
        super().__init__(path, options.queue_pairs)
        self._file = SocketFile(path)
        self.listen(self._file.create(options.socket_mode, options.socket_group))

    async def attend(self, linked: Callable[[bool], None]) -> None:
        try:
            await super().attend(linked)
        finally:
            self._file.remove()


def _dgram(what: str) -> MakeEnd:
    paths = re.fullmatch(r"local=([^,]+),remote=([^,]+)", what)
    if not paths or max(len(os.fsencode(path)) for path in paths.groups()) > LONGEST_PATH:
        raise argparse.ArgumentTypeError(
            f"dgram:local=PATH,remote=PATH, each without commas and at most {LONGEST_PATH} bytes, not {what!r}"
        )
    return lambda options: _Datagram(paths[1], paths[2], options)


class _Datagram(Datagram):
    """Its socket file goes with it."""

    def __init__(self, local: str, remote: str, options: argparse.Namespace) -> None:
        self._file = SocketFile(local)
        sock = self._file.create(options.socket_mode, options.socket_group, socket.SOCK_DGRAM)
        try:
            super().__init__(sock, remote, options.queue_pairs)
        except EndError:
            self._file.remove()
            raise

    async def attend(self, linked: Callable[[bool], None]) -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            self._file.remove()


def _plain(make: Callable[[int], End]) -> Callable[[str], MakeEnd]:
    def parse(what: str) -> MakeEnd:
        if what:
            raise argparse.ArgumentTypeError(f"this kind of end takes nothing behind it, not {what!r}")
        return lambda options: make(options.queue_pairs)

    return parse


_KINDS: Final[dict[str, Callable[[str], MakeEnd]]] = {
    "tap": _tap,
    "stream": _stream,
    "dgram": _dgram,
    "loopback": _plain(loopback),
    "sink": _plain(Sink),
    "source": _source,
}
_HUBS: Final[dict[str, Callable[[str], MakeEnds]]] = {"peer": _peer, "switch": _switch}


def _mac(text: str) -> bytes:
    octets = text.split(":")
    try:
        mac = bytes(int(octet, 16) for octet in octets if len(octet) <= 2)
    except ValueError:
        mac = b""
    if len(octets) != 6 or len(mac) != 6 or mac[0] & 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an address of one station such as 52:54:00:12:34:56")
    return mac
