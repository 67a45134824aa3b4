"""What a descriptor is, asked of the kernel. The descriptor is left as it was."""

from __future__ import annotations

import fcntl
import os
import socket

from vhostuser.tools.trace.events import Descriptor

_SEALS = {
    fcntl.F_SEAL_SEAL: "seal",
    fcntl.F_SEAL_SHRINK: "shrink",
    fcntl.F_SEAL_GROW: "grow",
    fcntl.F_SEAL_WRITE: "write",
    0x10: "future_write",
}
_PAGE = os.sysconf("SC_PAGESIZE")
_TYPES = {socket.SOCK_STREAM: "stream", socket.SOCK_DGRAM: "datagram", socket.SOCK_SEQPACKET: "seqpacket"}


def describe(fd: int) -> Descriptor:
    """Kind, size and detail; never raises, nor blocks."""
    try:
        return _describe(fd)
    except OSError as error:
        return Descriptor("unknown", detail=error.strerror or "")


def _describe(fd: int) -> Descriptor:
    link = os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115 - a Path takes longer than all else here, and a reply waits
    if link.startswith("/memfd:"):
        return Descriptor("memfd", os.fstat(fd).st_size, " ".join(filter(None, (_pages(fd), _seals(fd)))))
    kind, _, rest = link.partition(":")
    if kind == "anon_inode":
        return Descriptor(rest.strip("[]"))
    if kind == "socket":
        return Descriptor("socket", detail=_socket(fd))
    if not link.startswith("/"):
        return Descriptor(kind)
    return Descriptor("file", os.fstat(fd).st_size, link)


def _seals(fd: int) -> str:
    seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    return "sealed " + ",".join(name for bit, name in _SEALS.items() if seals & bit) if seals else ""


def _pages(fd: int) -> str:
    size = os.fstatvfs(fd).f_bsize
    return f"pages of {size >> 10} KiB" if size != _PAGE else ""


def _socket(fd: int) -> str:
    with socket.socket(fileno=os.dup(fd)) as sock:
        return f"{sock.family.name.removeprefix('AF_').lower()} {_TYPES.get(sock.type, 'other')}"


def is_unix_stream(fd: int) -> bool:
    """Can it be a vhost-user channel?"""
    return describe(fd) == Descriptor("socket", detail="unix stream")
