"""The service manager that started this process, if one did: what it passes on, and what it is told.

What belongs here: systemd's conventions as sd_listen_fds(3), sd_notify(3) and sd_watchdog_enabled(3) say them, without
its library. What does not: what the descriptors are used for (``service``, ``endpoint``).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import MutableMapping
from typing import Final

log = logging.getLogger("vhostuser")

MOST_FDS: Final = 1 << 20
"""The kernel's own ceiling, fs.nr_open."""

_FIRST_FD: Final = 3
# How long a manager that reads nothing may hold up the start or the stop, in seconds.
_PATIENCE: Final = 1.0

METRICS: Final = "metrics"
WAKE: Final = "wake"
USERFAULTFD: Final = "userfaultfd"
_ROLES: Final = frozenset({METRICS, WAKE, USERFAULTFD})


class Manager:
    """Takes what the environment says and removes it there: a child of ours must not take it for its own."""

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        ours = {name: environ.pop(name, "") for name in _VARIABLES}
        self._fds = _passed(ours)
        self._path = ours["NOTIFY_SOCKET"]
        self.watchdog = _watchdog(ours)
        """How often it wants to hear that we are alive, in seconds; 0: it does not."""

    # ---- what it passes

    def take(self, role: str) -> int | None:
        """A descriptor by its name (FileDescriptorName=), ours from here; None if there is none."""
        for fd, name in self._fds.items():
            if name == role:
                del self._fds[fd]
                return fd
        return None

    def sockets(self) -> list[int]:
        """Those whose names say nothing to us: the vhost-user socket."""
        return [fd for fd, name in self._fds.items() if name not in _ROLES]

    # ---- what it is told

    def tell(self, *assignments: str, wait: bool = False) -> None:
        """Such as READY=1. Not important enough to fail for, nor to wait for unless ``wait``, and then not long."""
        if self._path[:1] not in ("/", "@"):
            return
        address = "\0" + self._path[1:] if self._path[0] == "@" else self._path
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(_PATIENCE if wait else 0)
            try:
                sock.sendto("\n".join(assignments).encode(), address)
            except OSError as error:
                log.debug("NOTIFY_SOCKET %s: %s", self._path, error)

    async def keep_alive(self) -> None:
        """Says that the control thread gets on, twice as often as it is asked for, for ever."""
        while True:
            self.tell("WATCHDOG=1")
            await asyncio.sleep(self.watchdog / 2)


_VARIABLES: Final = (
    *("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"),
    *("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC"),
)


def _number(text: str) -> int:
    return int(text) if text.isdecimal() and text.isascii() and len(text) < 20 else 0


def _passed(variables: MutableMapping[str, str]) -> dict[int, str]:
    """Names by descriptor, if they are for this very process."""
    count = _number(variables["LISTEN_FDS"])
    if variables["LISTEN_PID"] != str(os.getpid()) or count > MOST_FDS:
        return {}
    names = variables["LISTEN_FDNAMES"].split(":") if variables["LISTEN_FDNAMES"] else []
    fds = range(_FIRST_FD, _FIRST_FD + count)
    for fd in fds:
        with contextlib.suppress(OSError):  # one that is not there is told when it is used
            os.set_inheritable(fd, False)
    return dict(zip(fds, (*names, *("",) * count), strict=False))


def _watchdog(variables: MutableMapping[str, str]) -> float:
    if variables["WATCHDOG_PID"] not in ("", str(os.getpid())):
        return 0.0
    return _number(variables["WATCHDOG_USEC"]) / 1e6
