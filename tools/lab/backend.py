"""A vhost-user back-end as a child process: its command line, its socket, its counters, its mappings."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vhostuser.tools.lab.errors import LabError
from vhostuser.tools.lab.process import Process

STATE_PREFIX = "vhostuser-state: "

#: Makes a back-end's command line from the socket to listen on, the disk image and options of its own.
CommandLine = Callable[[Path, Path, Sequence[str]], list[str]]


def vhostuser_blk(socket: Path, image: Path, options: Sequence[str] = ()) -> list[str]:
    """The command line of this project's back-end, run by this interpreter."""
    command = [sys.executable, "-P", "-m", "vhostuser.tools.blk"]
    return [*command, f"--socket-path={socket}", f"--blk-file={image}", *options]


def vhostuser_net(socket: Path, options: Sequence[str]) -> list[str]:
    """The command line of this project's network back-end, run by this interpreter; its end is among the options."""
    return [sys.executable, "-P", "-m", "vhostuser.tools.net", f"--socket-path={socket}", *options]


def program(path: Path, socket: Path, options: Sequence[str]) -> list[str]:
    """The command line of a device in a file of its own, run by this interpreter."""
    return [sys.executable, "-P", str(path), f"--socket-path={socket}", *options]


def storage_daemon(socket: Path, image: Path, options: Sequence[str] = ()) -> list[str]:
    """The command line of QEMU's own back-end; ``options`` are added to its export's."""
    export = f"vhost-user-blk,id=e,node-name=f,addr.type=unix,addr.path={socket},writable=on"
    return [
        "qemu-storage-daemon",
        f"--blockdev=driver=file,node-name=f,filename={image},discard=unmap",
        f"--export={','.join([export, *options])}",
    ]


def tracer(backend: Path, transcript: Path) -> CommandLine:
    """The command line of a tracer before the back-end on that socket; it serves no image itself."""

    def command(socket: Path, image: Path, options: Sequence[str] = ()) -> list[str]:
        tool = [sys.executable, "-P", "-m", "vhostuser.tools.main", "trace", "--quiet", f"--json={transcript}"]
        return [*tool, f"--listen={socket}", f"--connect={backend}", *options]

    return command


@dataclass(frozen=True)
class Port:
    """One socket of a back-end for network interfaces that has several."""

    socket: Path
    network: bool = True
    model: str = ""


class BackendProcess(Process):
    """A back-end that listens on ``socket``: an async context manager, entered when it listens.

    network: it serves a network interface. model: it serves another device, that QEMU calls so. Else a disk.
    """

    def __init__(
        self, name: str, command: Sequence[str], socket: Path, *, network: bool = False, model: str = ""
    ) -> None:
        super().__init__(name, command)
        self.socket = socket
        self.network = network
        self.model = model

    async def __aenter__(self) -> BackendProcess:
        await super().__aenter__()
        try:
            async with asyncio.timeout(20):
                while not _listening(self.pid, self.socket):
                    if not self.running:
                        raise LabError(f"{self.name} ended at its start: {' | '.join(self.output.entries)}")
                    await asyncio.sleep(0.01)
        except BaseException as error:
            await self.__aexit__()
            if isinstance(error, TimeoutError):
                raise LabError(f"{self.name} does not listen on {self.socket} after 20 s") from None
            raise
        return self

    async def state(self, within: float = 10) -> dict[str, Any]:
        """Its counters, as it prints them when it is sent SIGUSR1 (this project's back-end only)."""
        start = len(self.output.entries)
        self.send(signal.SIGUSR1)
        line = await self.output.find(lambda entry: entry.startswith(STATE_PREFIX), "state", start=start, within=within)
        state: dict[str, Any] = json.loads(line.removeprefix(STATE_PREFIX))
        return state


def _listening(pid: int, socket: Path) -> bool:
    """Whether somebody listens on ``socket``, found without a connection, which a back-end would serve.

    The kernel lists sockets by network namespace: ``pid`` is a process that is in the right one.
    """
    accepting = 0x10000  # __SO_ACCEPTCON in the kernel's net/unix
    for line in _lines(Path(f"/proc/{pid}/net/unix"))[1:]:
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and fields[7] == str(socket) and int(fields[3], 16) & accepting:
            return True
    return False


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:  # the process has just ended
        return []
