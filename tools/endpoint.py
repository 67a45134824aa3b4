"""Where a program's front-ends come from: a socket file, an inherited descriptor, or a path to connect to.

What belongs here: making, claiming and removing socket files, telling inherited sockets apart. What does not: options
and signals (``service``), what is said on the socket (``vhostuser.backend``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import os
import socket
import stat
from pathlib import Path

from vhostuser.backend import Backend

_BACKLOG = 8
# sun_path, without its terminating zero.
LONGEST_PATH = 107


class EndpointError(Exception):
    """The endpoint cannot be had: one line that says why and what helps."""


@dataclasses.dataclass(slots=True)
class Endpoint:
    """A listening socket, a connected one, or a path to connect to (then ``sock`` is None)."""

    name: str
    """What names it in the log."""
    path: str = ""
    """Of the socket file, where there is one."""
    sock: socket.socket | None = None
    listening: bool = False
    file: SocketFile | None = None

    async def attend(self, backend: Backend, *, once: bool) -> None:
        """Serves front-ends; returns when no other will come."""
        if self.sock is None:
            await backend.connect(self.path, once=once)
        elif self.listening:
            await backend.listen(self.sock, once=once)
        else:
            await backend.serve(self.sock, self.name)

    def close(self) -> None:
        """Removes the socket file, so that nobody connects to a program that ends. The sockets end with the process."""
        if self.file is not None:
            self.file.remove()


def name_of(fd: int) -> str:
    """What names an inherited socket, whatever it turns out to be: its path if it listens on one."""
    try:
        with socket.socket(fileno=os.dup(fd)) as sock:
            bound = sock.getsockname()
            listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError:
        bound = listens = None
    return bound if listens and bound and isinstance(bound, str) else _number(fd)  # an abstract one is bytes


def _number(fd: int) -> str:
    return f"fd {fd}"


def inherited(fd: int) -> Endpoint:
    """A socket that was given to us, of whichever kind: programs disagree on which one ``--fd`` means.

    Raises EndpointError.
    """
    name = name_of(fd)
    try:
        sock = socket.socket(fileno=fd)
        os.set_inheritable(fd, False)
        if (sock.family, sock.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
            raise EndpointError(f"{name}: not a Unix stream socket")
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return Endpoint(name, "" if name == _number(fd) else name, sock, listening=True)
        sock.getpeername()
    except OSError as error:
        known = {errno.ENOTSOCK: "not a socket", errno.ENOTCONN: "a socket that is neither listening nor connected"}
        raise EndpointError(f"{name}: {known.get(error.errno or 0, error.strerror)}") from None
    return Endpoint(name, sock=sock)


def listen(path: str, *, mode: int = 0o600, group: int | None = None) -> Endpoint:
    """Listens on a socket file. A dead socket there is replaced; a live one, or another kind of file, never.

    Raises EndpointError.
    """
    file = SocketFile(path)
    return Endpoint(path, path, file.create(mode, group), listening=True, file=file)


class SocketFile:
    """Owns the socket file at ``path``, and a lock beside it (PATH.lock): two of us never take it at once."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._lock_path = Path(f"{path}.lock")
        self._lock = -1
        self._identity = (0, 0)

    def create(self, mode: int, group: int | None, kind: int = socket.SOCK_STREAM) -> socket.socket:
        """The socket, which is the caller's: it listens, if its kind can. Raises EndpointError."""
        if len(os.fsencode(self._path)) > LONGEST_PATH:
            raise EndpointError(f"{self._path}: too long for a socket, at most {LONGEST_PATH} bytes")
        try:
            self._claim()
            self._clear(kind)
            return self._bind(mode, group, kind)
        except (OSError, EndpointError) as error:
            self._release()
            reason = f"{self._path}: {error.strerror}" if isinstance(error, OSError) else str(error)
            raise EndpointError(reason) from None

    def _claim(self) -> None:
        """Takes the lock. Who had it may have removed the file meanwhile: then ours is not what others will see."""
        while self._lock < 0:
            fd = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _identity(os.fstat(fd)) == _identity(self._lock_path.stat()):
                    self._lock = fd
            except BlockingIOError:
                raise EndpointError(f"{self._path}: another process serves it (it holds {self._lock_path})") from None
            except FileNotFoundError:
                pass
            finally:
                if self._lock < 0:
                    os.close(fd)

    def _clear(self, kind: int) -> None:
        """Removes a socket that nobody listens on."""
        try:
            mode = self._path.lstat().st_mode
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(mode):
            raise EndpointError(f"{self._path}: exists and is not a socket; remove it or choose another path")
        with socket.socket(socket.AF_UNIX, kind) as probe:
            probe.setblocking(False)
            if probe.connect_ex(bytes(self._path)) != errno.ECONNREFUSED:
                raise EndpointError(f"{self._path}: another process listens on it")
        self._path.unlink()

    def _bind(self, mode: int, group: int | None, kind: int) -> socket.socket:
        """Nobody but us can connect before group and mode are what was asked for."""
        sock = socket.socket(socket.AF_UNIX, kind)
        before = os.umask(0o177)
        try:
            sock.bind(bytes(self._path))
        finally:
            os.umask(before)
        self._identity = _identity(self._path.lstat())
        try:
            if group is not None:
                os.chown(self._path, -1, group)
            self._path.chmod(mode)
            if kind != socket.SOCK_DGRAM:
                sock.listen(_BACKLOG)
        except OSError:
            sock.close()
            self.remove()
            raise
        return sock

    def remove(self) -> None:
        """Removes the socket file if it is still ours, and the lock."""
        with contextlib.suppress(OSError):
            if _identity(self._path.lstat()) == self._identity:
                self._path.unlink()
        self._release()

    def _release(self) -> None:
        if self._lock < 0:
            return
        with contextlib.suppress(OSError):
            self._lock_path.unlink()
        os.close(self._lock)
        self._lock = -1


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
