"""Requests about the dirty log: where it is, and who hears that it has changed.

What belongs here: SET_LOG_BASE and SET_LOG_FD. What does not: marking, which is done in C as rings go on, and LOG_ALL,
which is a feature (``connection``).

Control thread only. A request waits until no ring runs on what it changes.
"""

from __future__ import annotations

from vhostuser.arguments import fds_of
from vhostuser.lifecycle import Lifecycle
from vhostuser.memory import DirtyLog
from vhostuser.protocol import Log, Request, RequestRefused
from vhostuser.ring import usable_event


class LogRequests:
    """Fulfils them on ``life``. Raises RequestRefused."""

    def __init__(self, life: Lifecycle) -> None:
        self._life = life

    async def set_log_base(self, request: Request) -> None:
        if not isinstance(request.payload, Log):
            raise RequestRefused("a dirty log without a descriptor cannot be written: negotiate LOG_SHMFD")
        area = request.payload
        dirty_log = DirtyLog.map(fds_of(request)[0], area.size, area.offset)
        async with self._life.halted():
            self._life.set_log(dirty_log, self._life.log_event)

    async def set_log_fd(self, request: Request) -> None:
        usable_event(fds_of(request)[0], "log", pipe=False)
        async with self._life.halted():
            self._life.set_log(self._life.dirty_log, fds_of(request).take())
