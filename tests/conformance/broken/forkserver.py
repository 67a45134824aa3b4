"""Starts broken disks cheaply: the project is imported once, and every start is a fork.

What belongs here: processes and their ends. What does not: what is patched in them (the themes' modules).

The server reads orders from a socket at its standard input. With each comes one end of a socket pair, on which it
answers twice: with the process's id, and with its exit status when it has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from tests.conformance.broken import FAULTS
from vhostuser.conformance.bench import Device
from vhostuser.tools import blk, disk, net, network  # noqa: F401  (disk, network: what a start would have to import)

_PR_SET_PDEATHSIG = 1
_ORDER = 1 << 16


class Child:
    """A process that the server has forked: as much of an asyncio.subprocess.Process as is needed."""

    def __init__(self, told: socket.socket) -> None:
        self.pid = int(told.recv(16))
        self.returncode: int | None = None
        self._told = told
        self._ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(told, self._read)

    def _read(self) -> None:
        asyncio.get_running_loop().remove_reader(self._told)
        self.returncode = int(self._told.recv(16) or -signal.SIGKILL)
        self._told.close()
        self._ended.set()

    async def wait(self) -> int:
        """Its exit status, negative for a signal."""
        await self._ended.wait()
        assert self.returncode is not None
        return self.returncode


class ForkServer:
    """The server's process; ends with ``close``, or with us, and its children with it."""

    def __init__(self) -> None:
        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen([sys.executable, "-m", __name__], stdin=theirs)

    def start(self, words: Sequence[str], output: Path) -> Child:
        """Forks a disk. words: a fault's name and the disk's options."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            order = json.dumps([str(output), *words]).encode()
            socket.send_fds(self._orders, [order], [theirs.fileno()])
        return Child(ours)

    def close(self) -> None:
        self._orders.close()
        self._process.wait()


# ---- the server


def serve(orders: socket.socket) -> None:
    """Until nobody is left to give orders."""
    gc.freeze()
    with selectors.DefaultSelector() as selector:
        selector.register(orders, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is not orders:
                    selector.unregister(key.fileobj)
                    _tell_end(key.fd, *key.data)
                elif not _obey(orders, selector):
                    return


def _obey(orders: socket.socket, selector: selectors.BaseSelector) -> bool:
    """Forks what the next order asks for; False if there is none."""
    order, fds, _, _ = socket.recv_fds(orders, _ORDER, 1)
    if not order:
        return False
    tell = socket.socket(fileno=fds[0])
    pid = os.fork()
    if not pid:
        _become(*json.loads(order))
    # In both, for the process group is killed as soon as its number is known.
    with contextlib.suppress(ProcessLookupError):
        os.setpgid(pid, pid)
    selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, tell))
    tell.send(str(pid).encode())
    return True


def _tell_end(pidfd: int, pid: int, tell: socket.socket) -> None:
    _, status = os.waitpid(pid, 0)
    with tell, contextlib.suppress(OSError):
        tell.send(str(os.waitstatus_to_exitcode(status)).encode())
    os.close(pidfd)


def _become(output: str, name: str, *options: str) -> NoReturn:
    """The disk, as if it had been started by itself."""
    try:
        os.setpgid(0, 0)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        _take_descriptors(output)
        sys.argv = [name, *options]
        FAULTS[name].patch()
        (net if FAULTS[name].device is Device.NET else blk).main(options)
    except SystemExit as end:
        print(end, file=sys.stderr)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stderr.flush()
        os._exit(1)


def _take_descriptors(output: str) -> None:
    """Nothing of the server's, and the three of any program."""
    os.closerange(3, 1 << 16)
    os.close(0)
    os.open(os.devnull, os.O_RDONLY)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(file, number)
    os.close(file)


if __name__ == "__main__":
    serve(socket.socket(fileno=os.dup(0)))
