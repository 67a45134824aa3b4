"""Backend: serves a device on a socket, to one front-end after another or to several at once.

What belongs here: accepting and connecting, who may use postcopy, the state dump. What does not: a connection's life
(``connection``), making and locking socket files (``tools.service``).
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from vhostuser import measures
from vhostuser.connection import Connection
from vhostuser.device import Device
from vhostuser.metrics import Sample, as_json, kept, merged
from vhostuser.postcopy import Postcopy
from vhostuser.protocol import Wake, WakeAck, WakeStatus
from vhostuser.queuestats import QueueStats
from vhostuser.record import MemoryRecord
from vhostuser.uffd import NotPermitted, TouchPool, Userfaultfd
from vhostuser.wake_service import WakeService

log = logging.getLogger("vhostuser")

# How long to wait before a socket is tried again, in seconds: each time twice as long.
_FIRST_RETRY, _LONGEST_RETRY = 0.1, 5.0


class Backend:
    """Serves devices to front-ends. All methods belong to the control thread, the loop that runs ``serve``.

    ``device`` makes the device of a connection: a class or any callable without arguments. With ``connections=1`` (one
    front-end at a time, the others wait) it may also be a Device, which then serves one front-end after another.

    ``postcopy``: offer PAGEFAULT where userfaultfd is permitted. Never offered with several connections: who holds our
    userfaultfd can fill or freeze any page of this process, the memory of the other front-ends' guests among them.

    ``uffd_device``: a descriptor of /dev/userfaultfd, for a process that may not open it; the caller closes it.

    ``record``: where memory that is being migrated into is remembered, so that a back-end that is restarted in the
    middle does not touch its holes; normally beside the socket. None: not remembered.

    ``mem_slots``: the answer to GET_MAX_MEM_SLOTS; with 0 memory comes in whole tables only.

    ``changed`` is called when a front-end has come or gone.
    """

    def __init__(
        self,
        device: Device | Callable[[], Device],
        *,
        connections: int = 1,
        postcopy: bool = True,
        uffd_device: int = -1,
        record: Path | None = None,
        mem_slots: int = 509,
        changed: Callable[[Backend], None] = lambda _: None,
    ) -> None:
        if connections < 1:
            raise ValueError(f"connections must be 1 or more, not {connections}")
        if isinstance(device, Device) and connections > 1:
            raise ValueError("several connections need a device each: pass a class or a callable, not one Device")
        self._device = device
        self._most = connections
        self._mem_slots = mem_slots
        self._changed = changed
        self._record = MemoryRecord(record) if record is not None else None
        self._uffd_device = uffd_device
        self._pool = TouchPool()
        self._accepted = 0
        # Of connections that have ended. What is counted from nothing on is there from the start, as rates need it.
        queues = range(device.queues) if isinstance(device, Device) else ()
        self._gone = [sample for index in queues for sample in kept(measures.of_queue(index, QueueStats()))]
        self.connections: list[Connection] = []
        """The front-ends that are served now."""
        self._postcopy = postcopy and connections == 1 and self._permitted()
        self.wakes = WakeService(self._wake)
        """The wake channel: ``wakes.listen(sock)`` serves it beside ``listen``, ``connect`` or ``serve``."""

    def _permitted(self) -> bool:
        try:
            Userfaultfd.probe(self._uffd_device)
        except NotPermitted as error:
            log.warning("postcopy migration is not offered (PAGEFAULT): %s", error)
            return False
        return True

    async def listen(self, listener: socket.socket, *, once: bool = False) -> None:
        """Accepts front-ends on a bound and listening socket, which stays the caller's, for ever or ``once``."""
        listener.setblocking(False)
        loop = asyncio.get_running_loop()
        room = asyncio.Semaphore(self._most)
        async with asyncio.TaskGroup() as group:
            while True:
                await room.acquire()
                try:
                    sock, _ = await loop.sock_accept(listener)
                except OSError as error:
                    # The front-end has gone again, or our table of descriptors is full, which may pass.
                    log.error("%s: no front-end could be accepted: %s", _name_of(listener), error.strerror)
                    room.release()
                    await asyncio.sleep(_FIRST_RETRY)
                    continue
                serving = group.create_task(self.serve(sock, _name_of(listener)))
                serving.add_done_callback(lambda _: room.release())
                if once:
                    return

    async def connect(self, path: str, *, once: bool = False) -> None:
        """Connects to a front-end that listens, again and again with growing pauses, for ever or ``once`` served."""
        loop = asyncio.get_running_loop()
        pause = _FIRST_RETRY
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.setblocking(False)
            try:
                await loop.sock_connect(sock, path)
            except OSError as error:
                sock.close()
                level = logging.WARNING if pause == _FIRST_RETRY else logging.DEBUG
                log.log(level, "%s: nobody listens yet (%s), trying again", path, error.strerror or error)
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_RETRY)
                continue
            pause = _FIRST_RETRY
            await self.serve(sock, path)
            if once:
                return
            await asyncio.sleep(pause)  # or a front-end that hangs up at once would be dialled without end

    async def serve(self, sock: socket.socket, name: str = "") -> None:
        """Serves the front-end at the other end of a connected socket, which is closed at the end."""
        name = name or f"fd {sock.fileno()}"
        try:
            connection = self._connection(sock, name)
        except Exception as error:  # no descriptor left, or a device that cannot be made; the others are served on
            log.error("%s: a front-end cannot be served: %s", name, error)
            sock.close()
            return
        self.connections.append(connection)
        self._accepted += 1
        self._changed(self)
        log.info("%s: a front-end is here", connection.name)
        try:
            await connection.serve()
        finally:
            self.connections.remove(connection)
            self._gone = merged([*self._gone, *kept(self._of(connection))])
            self._changed(self)
            log.info("%s: the front-end has gone", connection.name)

    def _connection(self, sock: socket.socket, name: str) -> Connection:
        device = self._device if isinstance(self._device, Device) else self._device()
        half = Postcopy(self._pool, device_fd=self._uffd_device) if self._postcopy else None
        return Connection(sock, device, name=name, postcopy=half, record=self._record, mem_slots=self._mem_slots)

    def _wake(self, wake: Wake) -> WakeAck:
        # There is one connection at most where PAGEFAULT is offered.
        if self._postcopy and self.connections:
            return self.connections[0].wake(wake)
        return WakeAck(wake.id, 0, WakeStatus.NO_POSTCOPY)

    # ---- what others see

    def measure(self) -> list[Sample]:
        """Everything that is counted, the device's own numbers included, of all front-ends there have been."""
        of_connections = (sample for connection in self.connections for sample in self._of(connection))
        return merged([*self._own(), *self._gone, *of_connections])

    def _of(self, connection: Connection) -> Iterator[Sample]:
        yield from connection.measure()
        if connection.device is not self._device:
            yield from _measured(connection.device)

    def _own(self) -> Iterator[Sample]:
        yield measures.CONNECTIONS.sample(len(self.connections))
        yield measures.ACCEPTED.sample(self._accepted)
        yield measures.OFFERED.sample(int(self._postcopy))
        yield from measures.of_faults(self._pool.stats())
        yield from self.wakes.measure()
        if isinstance(self._device, Device):
            yield from _measured(self._device)

    def state(self) -> dict[str, object]:
        """The state of everything: JSON-able values; for SIGUSR1."""
        return {
            "postcopy_offered": self._postcopy,
            "connections": [connection.state() for connection in self.connections],
            "metrics": as_json(self.measure()),
        }


def _measured(device: Device) -> list[Sample]:
    try:
        return list(device.measure())
    except Exception as error:  # its author's mistake must neither end a connection nor hide what others measure
        log.error("the device cannot be measured: %s: %s", type(error).__name__, error)
        return []


def _name_of(listener: socket.socket) -> str:
    name = listener.getsockname()
    return name if isinstance(name, str) and name else f"fd {listener.fileno()}"
