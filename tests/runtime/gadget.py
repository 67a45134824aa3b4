"""A device with every hook, which does nothing by itself (tests do it from outside, or by requests); its front-end."""

import os
import socket
from typing import NamedTuple

from tests.runtime.echo import Echo
from vhostuser.frontend import BackendServices
from vhostuser.hooks import CryptoSessions, GpuSocket, HostNotifiers, NotifierArea
from vhostuser.protocol import ProtocolFeature, RequestRefused
from vhostuser.shared_memory import SharedMemoryRegions
from vhostuser.shared_objects import SharedObjects
from vhostuser.testing.pair import Pair
from vhostuser.testing.peer import ScriptedPeer
from vhostuser.virtqueue import Request

PAGE = 4096


class Gadget(SharedMemoryRegions, SharedObjects, HostNotifiers, CryptoSessions, GpuSocket, Echo):
    """``pages``: a memfd of the notify pages of its rings, one each. ``file``: what a request has mapped."""

    protocol_features = ProtocolFeature.GPA_ADDRESSES.mask

    def __init__(self) -> None:
        super().__init__()
        self.shmem_sizes = {0: 16 * PAGE, 3: 4 * PAGE}
        self.pages = memfd(2 * PAGE)
        self.file = memfd(8 * PAGE, b"file")
        self.sessions: dict[int, tuple[int, bytes]] = {}
        self.display: socket.socket | None = None

    def close(self) -> None:
        os.close(self.pages)
        os.close(self.file)
        if self.display is not None:
            self.display.close()

    def host_notifier(self, index: int) -> NotifierArea | None:
        return NotifierArea(self.pages, index * PAGE, PAGE)

    def create_crypto_session(self, op_code: int, parameters: bytes) -> int:
        if op_code == 99:
            raise RequestRefused("no such cipher")
        session_id = len(self.sessions) + 7
        self.sessions[session_id] = (op_code, parameters)
        return session_id

    def close_crypto_session(self, session_id: int) -> None:
        del self.sessions[session_id]

    def gpu_socket(self, sock: socket.socket) -> None:
        if self.display is not None:
            self.display.close()
        self.display = sock

    async def handle(self, request: Request) -> None:
        """On the data thread: "map" maps the file at the start of region 0, everything else is echoed."""
        if request.read() != b"map":
            return await super().handle(request)
        try:
            await self.shmem.map(0, 0, PAGE, self.file)
        except RequestRefused:
            request.write(b"no ")
        else:
            request.write(b"yes")
        return None


def memfd(size: int, data: bytes = b"") -> int:
    fd = os.memfd_create("gadget", os.MFD_CLOEXEC)
    os.truncate(fd, size)
    os.pwrite(fd, data, 0)
    return fd


class Gadgets(NamedTuple):
    """Both ends, and what the front-end does for the device."""

    pair: Pair
    device: Gadget
    services: BackendServices


async def channel_of(pair: Pair) -> ScriptedPeer:
    """Gives the back-end a channel; our end of it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs:
        await pair.frontend.set_backend_req_fd(theirs.fileno())
    return ScriptedPeer(ours)
