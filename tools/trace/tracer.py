"""All connections of one trace: a back-end is connected to anew for each front-end that comes.

What belongs here: accepting, connecting, who is at the other end. What does not: what happens between the two
(``relay``), options (``command``).
"""

from __future__ import annotations

import asyncio
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from vhostuser.tools.endpoint import Endpoint
from vhostuser.tools.trace.events import Inquiry, Report
from vhostuser.tools.trace.faults import Fault, Faults
from vhostuser.tools.trace.relay import Session


class Tracer:
    """backend: path of its socket. report: see ``events``. began: when, in nanoseconds, the trace did."""

    def __init__(self, backend: str, report: Report, faults: Sequence[Fault] = (), began: int = 0) -> None:
        self._backend = backend
        self._report = report
        self._faults = faults
        self._began = began
        self._count = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def listen(self, endpoint: Endpoint, *, once: bool) -> None:
        """Takes front-ends; returns when the first has gone, with ``once``."""
        assert endpoint.sock is not None
        endpoint.sock.setblocking(False)
        try:
            while True:
                frontend, _ = await asyncio.get_running_loop().sock_accept(endpoint.sock)
                attended = self._accept(frontend)
                if once:
                    await attended
                    return
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def status(self) -> None:
        """Has it written down where every connection stands."""
        inquiry = Inquiry(time.monotonic_ns() - self._began)
        self._report(lambda: inquiry)

    def _accept(self, frontend: socket.socket) -> asyncio.Task[None]:
        self._count += 1
        session = Session(self._count, self._report, Faults(self._faults), began=self._began)
        task = asyncio.ensure_future(self._attend(session, frontend))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _attend(self, session: Session, frontend: socket.socket) -> None:
        backend = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        with frontend, backend:
            try:
                await asyncio.get_running_loop().sock_connect(backend, self._backend)
            except OSError as error:
                session.notice(f"{self._backend}: {error.strerror}: start the back-end first")
                return
            session.notice(f"{_peer('front-end', frontend)}, {_peer('back-end', backend)}")
            await session.run(frontend, backend)


def _peer(what: str, sock: socket.socket) -> str:
    """Who is at the other end of a socket."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    pid = int.from_bytes(credentials[:4], sys.byteorder)
    try:
        name = Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        name = "unknown"
    return f"{what} {name} ({pid})"
