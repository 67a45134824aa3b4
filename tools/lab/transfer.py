"""Bytes over TCP between a guest and the host: how the bench knows that none was lost or changed.

What belongs here: both directions, told by checksums. The host's side runs as a process of its own, in a network
namespace: ``python -m vhostuser.tools.lab.transfer send|receive|stream ADDRESS PORT MEBIBYTES``.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
import signal
import socket
import sys
import time
from typing import Self

from vhostuser.tools.lab.guest import Guest
from vhostuser.tools.lab.namespace import Namespace
from vhostuser.tools.lab.process import Process

PORT = 5000

# A busybox nc that reaches the end of its input ends the connection: this one never does.
HOLD = "[ -p /tmp/hold ] || mkfifo /tmp/hold"


def guest_receives(address: str, port: int = PORT) -> str:
    """A command for the guest: connects to ``address``, tells the MD5 of what comes until the other side ends."""
    return f"{HOLD}; nc {address} {port} <>/tmp/hold | md5sum"


async def host_sends(guest: Guest, address: str, host: Namespace, mebibytes: int) -> bool:
    """Whether the guest gets what the host's side, at ``address``, sends to it."""
    sending = asyncio.ensure_future(_run(host, "send", address, mebibytes))
    while not await asyncio.to_thread(_listens, host):
        assert not sending.done(), sending.result()
    got = await guest.run(guest_receives(address), within=120)
    return got.split()[0] == await sending


async def guest_sends(guest: Guest, address: str, host: Namespace, mebibytes: int) -> bool:
    """Whether the host's side gets what the guest, at ``address``, sends to it."""
    made = await guest.run(f"head -c {mebibytes << 20} /dev/urandom >/tmp/data; md5sum </tmp/data")
    guest.start(f"nc -l -p {PORT} </tmp/data")
    return await _run(host, "receive", address, mebibytes) == made.split()[0]


class Stream:
    """One connection over which the host's side, at ``address``, sends to the guest for as long as it is wanted.

    An async context manager, entered when the host's side listens.
    """

    def __init__(self, guest: Guest, address: str, host: Namespace) -> None:
        self._guest = guest
        self._address = address
        self._host = host
        command = (sys.executable, "-P", "-m", __name__, "stream", address, str(PORT), "0")
        self._sender = Process("stream", host.command(*command))

    async def __aenter__(self) -> Self:
        await self._sender.__aenter__()
        while not await asyncio.to_thread(_listens, self._host):
            assert self._sender.running, self._sender.output.entries
        self._received = asyncio.ensure_future(self._guest.run(guest_receives(self._address), within=600))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._received.cancel()
        await self._sender.__aexit__()

    async def arrived(self) -> bool:
        """Ends it; whether the guest has got every byte that was sent."""
        assert await self._sender.stop(within=60) == 0, self._sender.output.entries
        return (await self._received).split()[0] == self._sender.output.entries[-1]


async def _run(host: Namespace, what: str, address: str, mebibytes: int) -> str:
    command = (sys.executable, "-P", "-m", __name__, what, address, str(PORT), str(mebibytes))
    return (await asyncio.to_thread(host.run, *command, within=120)).strip()


def _listens(host: Namespace) -> bool:
    return f":{PORT}" in host.run("ss", "-Hltn", f"sport = :{PORT}")


def _send(address: str, port: int, mebibytes: int) -> str:
    data = random.Random(port).randbytes(mebibytes << 20)
    with socket.create_server((address, port)) as server, server.accept()[0] as connection:
        connection.sendall(data)
    return hashlib.md5(data).hexdigest()


def _stream(address: str, port: int, _: int) -> str:
    """Until SIGTERM."""
    ended: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: ended.append(number))
    digest, source = hashlib.md5(), random.Random(port)
    with socket.create_server((address, port)) as server, server.accept()[0] as connection:
        while not ended:
            data = source.randbytes(1 << 16)
            connection.sendall(data)
            digest.update(data)
    return digest.hexdigest()


def _receive(address: str, port: int, mebibytes: int) -> str:
    digest, left = hashlib.md5(), mebibytes << 20
    while left == mebibytes << 20:
        # Refused, or ended by a proxy that took it: the other side does not listen yet.
        with (
            contextlib.suppress(ConnectionRefusedError, ConnectionResetError),
            socket.create_connection((address, port), timeout=60) as connection,
        ):
            connection.sendall(b"\n")  # passt of 2023 answers the guest's SYN with data only
            while left and (data := connection.recv(1 << 16)):
                digest.update(data)
                left -= len(data)
        time.sleep(0.05)
    return digest.hexdigest()


if __name__ == "__main__":
    side = {"send": _send, "receive": _receive, "stream": _stream}[sys.argv[1]]
    print(side(sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
