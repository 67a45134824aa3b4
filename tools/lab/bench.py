"""One test's directory, disks, processes and guest, released together whatever happens."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from vhostuser.tools.lab.backend import (
    STATE_PREFIX,
    BackendProcess,
    CommandLine,
    Port,
    program,
    vhostuser_blk,
    vhostuser_net,
)
from vhostuser.tools.lab.guest import Guest
from vhostuser.tools.lab.hugepages import hugepages
from vhostuser.tools.lab.image import GuestImage
from vhostuser.tools.lab.machine import Event, Hardware, Machine, event_time
from vhostuser.tools.lab.migration import UNLIMITED, Migration
from vhostuser.tools.lab.namespace import Namespace
from vhostuser.tools.lab.process import Process
from vhostuser.tools.lab.trace import EVENTS

MIB = 1 << 20


class Bench:
    """An async context manager. What it made ends with it; ``report()`` says what everybody's last words were.

    The directory is a new one with a short name, since a Unix socket's path has at most 107 bytes; it is removed,
    unless VHOSTUSER_KEEP is set in the environment or ``keep`` given.
    """

    def __init__(self, image: GuestImage, *, keep: bool = False) -> None:
        self.image = image
        self.guest = Guest()
        self.directory = Path(tempfile.mkdtemp(prefix="vhu-"))
        self._keep = keep or bool(os.environ.get("VHOSTUSER_KEEP"))
        self._stack = contextlib.AsyncExitStack()
        self._processes: list[Process] = []
        self._machines: list[Machine] = []
        self._names: Counter[str] = Counter()

    async def __aenter__(self) -> Bench:
        if not self._keep:
            self._stack.callback(shutil.rmtree, self.directory, ignore_errors=True)
        await self._stack.enter_async_context(self.guest)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def disk(self, mebibytes: int, seed: int = 1) -> Path:
        """A new disk image full of bytes that only ``seed`` decides."""
        path = self.directory / f"{self._unique('disk')}.img"
        path.write_bytes(random.Random(seed).randbytes(mebibytes * MIB))
        return path

    async def backend(
        self,
        image: Path,
        options: Sequence[str] = (),
        *,
        command: CommandLine = vhostuser_blk,
        socket: Path | None = None,
    ) -> BackendProcess:
        """A new back-end that serves ``image``, on a new socket or on ``socket``."""
        name = self._unique("backend")
        socket = socket or self.directory / f"{name}.sock"
        backend = BackendProcess(name, command(socket, image, options), socket)
        self._processes.append(backend)
        await self._stack.enter_async_context(backend)
        return backend

    async def network(
        self, *options: str, namespace: Namespace | None = None, socket: Path | None = None
    ) -> BackendProcess:
        """A new back-end for a network interface, in a network namespace of the host if one is given."""
        name = self._unique("network")
        socket = socket or self.directory / f"{name}.sock"
        command = vhostuser_net(socket, options)
        backend = BackendProcess(name, namespace.command(*command) if namespace else command, socket, network=True)
        self._processes.append(backend)
        await self._stack.enter_async_context(backend)
        return backend

    async def device(self, path: Path, model: str, *options: str) -> BackendProcess:
        """A new back-end for the device that QEMU calls ``model``, served by the Python program at ``path``."""
        name = self._unique(path.stem)
        socket = self.directory / f"{name}.sock"
        backend = BackendProcess(name, program(path, socket, options), socket, model=model)
        self._processes.append(backend)
        await self._stack.enter_async_context(backend)
        return backend

    def namespace(self, address: str) -> Namespace:
        """A new network namespace, whose interfaces that are made in it later may get ``address`` (with its prefix)."""
        return self._stack.enter_context(Namespace(f"vhu-{os.getpid()}-{self._unique('ns')}", address))

    async def machine(self, hardware: Hardware, *backends: BackendProcess | Port) -> Machine:
        """A machine with one device for each of ``backends``, which boots the guest; returns before that has booted."""
        return await self._start(hardware, backends, incoming=False)

    async def destination(self, hardware: Hardware, *backends: BackendProcess | Port) -> Machine:
        """A machine that waits for the guest to migrate to it."""
        return await self._start(hardware, backends, incoming=True)

    def migration(
        self,
        source: Machine,
        destination: Machine,
        *,
        postcopy: bool = False,
        capabilities: Sequence[str] = (),
        bandwidth: int = UNLIMITED,
    ) -> Migration:
        """The migration of this bench's guest from ``source`` to ``destination``, not yet started."""
        return Migration(
            source,
            destination,
            self.guest,
            self.directory,
            postcopy=postcopy,
            capabilities=capabilities,
            bandwidth=bandwidth,
        )

    def report(self) -> str:
        """The end of each log and the monitors' events, to be read after a failure."""
        parts = [_tail(process.name, process.output.entries) for process in self._processes]
        for machine in self._machines:
            parts.append(_tail(f"{machine.name}'s events", [_brief(event) for event in machine.events.entries]))
            if machine.console.exists():
                parts.append(_tail(f"{machine.name}'s console", machine.console.read_text("latin-1").splitlines()))
        return "\n".join(parts)

    async def _start(self, hardware: Hardware, backends: Sequence[BackendProcess | Port], incoming: bool) -> Machine:
        if hardware.hugepages:
            self._stack.enter_context(hugepages(hardware.memory // 2))
        machine = Machine(
            self._unique("qemu"),
            self.directory,
            self.image,
            hardware,
            [backend.socket for backend in backends if not backend.network and not backend.model],
            [backend.socket for backend in backends if backend.network],
            [(backend.model, backend.socket) for backend in backends if backend.model],
            incoming=incoming,
            trace_events=EVENTS,
        )
        self._processes.append(machine.process)
        await self._stack.enter_async_context(machine)
        self._machines.append(machine)
        self.guest.follow(machine)
        return machine

    def _unique(self, kind: str) -> str:
        number = self._names[kind]
        self._names[kind] += 1
        return f"{kind}{number}"


def _brief(event: Event) -> str:
    return f"{event_time(event):.6f} {event['event']} {event.get('data', '')}".rstrip()


def _tail(title: str, lines: Sequence[str], count: int = 25) -> str:
    told = [line[:300] for line in lines if not line.startswith(STATE_PREFIX)]
    return "\n".join([f"--- {title} ({len(told)} lines)", *told[-count:]])
