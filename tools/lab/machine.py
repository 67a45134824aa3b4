"""One QEMU process: its command line, its monitor, its end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from qemu.qmp import QMPClient, QMPError

from vhostuser.tools.lab.errors import LabError
from vhostuser.tools.lab.image import GuestImage
from vhostuser.tools.lab.journal import Journal
from vhostuser.tools.lab.process import Process
from vhostuser.tools.lab.trace import TraceLine, read_trace

T = TypeVar("T")

Event = Mapping[str, Any]
_Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]

# init_on_alloc=0: else the guest's kernel zeroes each page that it allocates, so that a virtual CPU always touches it
# before the back-end, which then never meets a missing page.
KERNEL_ARGUMENTS = "console=ttyS0 panic=-1 quiet init_on_alloc=0"


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What the guest sees, and the memory below it: the same at both ends of a migration."""

    #: MiB
    memory: int = 320
    #: Guest memory from 2 MiB pages of hugetlbfs, else from 4 KiB pages of a memfd.
    hugepages: bool = False
    cpus: int = 1
    #: Virtqueues of each disk.
    queues: int = 1
    #: Packed rings, else split ones.
    packed: bool = False
    #: Disks are devices from before virtio 1.
    legacy: bool = False
    #: Pairs of virtqueues of each network interface.
    pairs: int = 1
    #: Network interfaces leave checksums and segmentation to the other side, and take frames that did.
    offloads: bool = True
    #: QEMU connects again when a back-end is lost.
    reconnect: bool = False
    #: Places where devices may be plugged while the guest runs: buses port0, port1 and so on.
    ports: int = 0
    #: Memory modules that may be plugged while the guest runs.
    dimms: int = 0
    #: Devices sit behind an IOMMU: their addresses mean what the guest's page tables say, until it takes that back.
    iommu: bool = False

    @property
    def page_size(self) -> int:
        """Bytes: the unit in which a migration asks for guest memory."""
        return 2 << 20 if self.hugepages else 4096

    @property
    def loses_writes(self) -> bool:
        """Whether QEMU before 9.0 loses writes of a guest that runs under TCG while it migrates.

        From memory whose size is a multiple of 256 KiB it takes the dirty bits 64 at a time and leaves the virtual
        CPUs' TLBs as they are, so that the next write to those pages goes unseen (cured by "physmem: Fix migration
        dirty bitmap coherency with TCG memory access"). From any other it takes them page by page, and rightly.
        """
        return self.hugepages

    @property
    def _kibibytes(self) -> int:
        """The size of guest memory, not a multiple of 256 KiB where that can be helped (``loses_writes``)."""
        return self.memory * 1024 + (0 if self.hugepages else 8)

    @property
    def kernel_arguments(self) -> str:
        """The guest's kernel command line."""
        # strict: what was mapped for a request is taken back as the request ends, and not some time later.
        return KERNEL_ARGUMENTS + " intel_iommu=on iommu.strict=1" * self.iommu

    def arguments(
        self, disks: Sequence[Path], networks: Sequence[Path] = (), others: Sequence[tuple[str, Path]] = ()
    ) -> list[str]:
        """The part of QEMU's command line that describes it, with one device for each back-end's socket; others:
        (QEMU's name of the device, socket)."""
        backing = ",hugetlb=on,hugetlbsize=2M" if self.hugepages else ""
        growth = f",slots={self.dimms},maxmem=4G" if self.dimms else ""
        arguments = [
            *("-accel", "tcg", "-cpu", "max", "-m", f"{self._kibibytes}K{growth}", "-smp", f"{self.cpus}"),
            *("-object", f"memory-backend-memfd,id=memory,size={self._kibibytes}K,share=on{backing}"),
            *("-machine", "q35,memory-backend=memory"),
            *(("-device", "intel-iommu,device-iotlb=on") if self.iommu else ()),
        ]
        for number in range(self.ports):
            arguments += ["-device", f"pcie-root-port,id=port{number},chassis={number + 1}"]
        behind = ",disable-legacy=on,iommu_platform=on,ats=on" if self.iommu else ""
        again = ",reconnect=1" if self.reconnect else ""
        packed = ",packed=on" if self.packed else ""
        older = ",disable-modern=on,disable-legacy=off" if self.legacy else ""
        for number, socket in enumerate(disks):
            arguments += ["-chardev", f"socket,id=disk{number},path={socket}{again}"]
            arguments += [
                "-device",
                f"vhost-user-blk-pci,chardev=disk{number},num-queues={self.queues}{packed}{older}{behind}",
            ]
        for number, socket in enumerate(networks):
            name = f"net{number}"
            arguments += ["-chardev", f"socket,id={name}-socket,path={socket}{again}"]
            arguments += ["-netdev", f"vhost-user,id={name}-end,chardev={name}-socket,queues={self.pairs}"]
            # vectors=0: with MSI-X QEMU 7.2 dies under TCG, below msix_set_vector_notifiers.
            several = ",mq=on" if self.pairs > 1 else ""
            plain = (
                "" if self.offloads else ",csum=off,guest_csum=off,gso=off,guest_tso4=off,guest_tso6=off,guest_ecn=off"
            )
            arguments += [
                "-device",
                f"virtio-net-pci,id={name},netdev={name}-end,mac={mac(number)},vectors=0{several}{plain}{packed}{behind}",
            ]
        for number, (model, socket) in enumerate(others):
            arguments += ["-chardev", f"socket,id=other{number},path={socket}{again}"]
            arguments += ["-device", f"{model},chardev=other{number}{packed}"]
        return arguments


def mac(number: int) -> str:
    """The address of a machine's network interface; the same at both ends of a migration."""
    return f"52:54:00:00:00:{number:02x}"


def event_time(event: Event) -> float:
    """When QEMU says that the event was, in seconds since the epoch."""
    stamp = event["timestamp"]
    return float(stamp["seconds"] + stamp["microseconds"] / 1e6)


class Machine:
    """A QEMU process: an async context manager, entered when its monitor answers.

    ``directory`` is the caller's; the sockets and logs in it begin with ``name``. With ``incoming`` it waits for a
    migration. ``trace_events`` are switched on and read by ``trace()``.
    """

    agent_reader: asyncio.StreamReader
    agent_writer: asyncio.StreamWriter

    def __init__(
        self,
        name: str,
        directory: Path,
        image: GuestImage,
        hardware: Hardware,
        disks: Sequence[Path],
        networks: Sequence[Path] = (),
        others: Sequence[tuple[str, Path]] = (),
        *,
        incoming: bool = False,
        trace_events: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.incoming = incoming
        self.hardware = hardware
        self.events: Journal[Event] = Journal(f"{name}'s monitor")
        self._path: Callable[[str], Path] = lambda kind: directory / f"{name}.{kind}"
        self._qmp = QMPClient(name)
        arguments = [*self._common(image), *hardware.arguments(disks, networks, others)]
        for event in trace_events:
            arguments += ["-trace", event]
        if incoming:
            arguments += ["-incoming", "defer"]
        self.process = Process(name, ["qemu-system-x86_64", *arguments])
        self._stack = contextlib.AsyncExitStack()

    def _common(self, image: GuestImage) -> list[str]:
        return [
            *("-name", self.name, "-nodefaults", "-display", "none"),
            *("-msg", "timestamp=on", "-D", str(self._path("trace"))),
            *("-kernel", str(image.kernel), "-initrd", str(image.initramfs), "-append", self.hardware.kernel_arguments),
            *("-chardev", f"file,id=console,path={self._path('console')}", "-serial", "chardev:console"),
            *("-chardev", f"socket,id=agent,path={self._path('agent')}", "-serial", "chardev:agent"),
            *("-qmp", f"unix:{self._path('qmp')}"),
        ]

    @property
    def pid(self) -> int:
        """QEMU's process id."""
        return self.process.pid

    @property
    def console(self) -> Path:
        """The file that the guest's kernel writes its console to."""
        return self._path("console")

    async def __aenter__(self) -> Machine:
        async with contextlib.AsyncExitStack() as stack:
            # Both sockets are ours and QEMU connects: nothing has to be tried again until it listens.
            await self._qmp.start_server(str(self._path("qmp")))
            stack.push_async_callback(self._disconnect)
            agent = await self._listen_for_agent(stack)
            await stack.enter_async_context(self.process)
            await self._unless_ended(self._qmp.accept())
            self.agent_reader, self.agent_writer = await self._unless_ended(agent.get())
            stack.callback(self.agent_writer.close)
            reader = asyncio.create_task(self._read_events())
            stack.callback(reader.cancel)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.process.kill()
        await self.process.ended()
        await self._stack.aclose()

    async def execute(self, command: str, within: float = 30, *, oob: bool = False, **arguments: Any) -> Any:
        """The answer of QEMU's monitor to a command; underscores in argument names stand for hyphens.

        oob: out of band, by the monitor's own thread. A virtual CPU that waits for a page while it holds the big lock
        stops QEMU's main thread, which alone answers everything else.
        """
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        try:
            async with asyncio.timeout(within):
                return await self._qmp.execute(command, named, oob=oob)
        except TimeoutError:
            raise LabError(f"{self.name} does not answer {command} within {within:g} s") from None
        except QMPError as error:
            raise LabError(f"{self.name} answers {command}: {error}") from error

    async def event(self, name: str, within: float = 60, *, start: int = 0, **data: Any) -> Event:
        """The first event of that name, from index ``start`` of ``events`` on, whose data contain ``data``."""
        return await self.events.find(
            lambda event: event["event"] == name and data.items() <= event.get("data", {}).items(),
            f"event {name} {data or ''}".rstrip(),
            start=start,
            within=within,
        )

    def trace(self) -> list[TraceLine]:
        """What its trace events have told up to now."""
        return read_trace(self._path("trace"))

    async def quit(self) -> None:
        """Let QEMU shut itself down, its devices first."""
        await self.process.stop()

    async def _listen_for_agent(self, stack: contextlib.AsyncExitStack) -> asyncio.Queue[_Streams]:
        """Listen for QEMU's end of the guest's second serial port, which the queue will hold."""
        accepted: asyncio.Queue[_Streams] = asyncio.Queue()
        server = await asyncio.start_unix_server(
            lambda reader, writer: accepted.put_nowait((reader, writer)), self._path("agent")
        )
        stack.callback(server.close)
        return accepted

    async def _unless_ended(self, wanted: Coroutine[Any, Any, T], within: float = 30) -> T:
        """What ``wanted`` returns, or ``LabError`` with QEMU's words if it ends first or takes longer."""
        task = asyncio.create_task(wanted)
        ended = asyncio.create_task(self.process.ended(within))
        try:
            await asyncio.wait((task, ended), return_when=asyncio.FIRST_COMPLETED)
            if task.done() and task.exception() is None:
                return task.result()
        finally:
            task.cancel()
            ended.cancel()
            await asyncio.gather(task, ended, return_exceptions=True)
        raise LabError(f"{self.name} did not start: {' | '.join(self.process.output.entries) or 'it says nothing'}")

    async def _read_events(self) -> None:
        async for event in self._qmp.events:
            self.events.append(event)

    async def _disconnect(self) -> None:
        # The monitor's connection may end by our word, by QEMU's or by its death: all are well here.
        with contextlib.suppress(QMPError, EOFError, OSError):
            await self._qmp.disconnect()
        self.events.close()
