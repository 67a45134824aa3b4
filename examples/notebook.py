"""A file system with one file, `note`, which is kept in memory and moves with its guest.

    python examples/notebook.py --socket-path=/tmp/notebook.sock

Point QEMU's vhost-user-fs-pci at the socket (tag=notebook), then, in the guest: mount -t virtiofs notebook /mnt
docs/writing-a-device.md walks through it.
"""

import errno
import stat
import struct

from vhostuser.device import Device
from vhostuser.protocol import ProtocolFeature
from vhostuser.tools.service import serve_device
from vhostuser.virtqueue import Request

# Requests of FUSE: a header, then what belongs to the operation (Linux, include/uapi/linux/fuse.h; virtio 1.2, 5.11).
HEADER, ANSWER = struct.Struct("<IIQQ16x"), struct.Struct("<IiQ")  # size, operation, unique, node; size, error, unique
FORGET, BATCH_FORGET = 2, 42
ATTRIBUTES = struct.Struct("<QQQ24x12xII12xI4x")
READ_WRITE = struct.Struct("<8xQI20x")  # offset, size
ENTRY = struct.Struct("<QQII")
ROOT, NOTE = 1, 2
NODES = {b".": ROOT, b"..": ROOT, b"note": NOTE}
SIZE_IS_SET, DIRECT_IO = 1 << 3, 1
MOST = 65536
"""Bytes of the note, and of what one request carries."""


class Notebook(Device):
    """One ring for what must not wait, one for the rest."""

    virtio_id = 26
    queues = 2
    protocol_features = ProtocolFeature.DEVICE_STATE.mask
    state_limit = MOST

    def __init__(self, text: bytes = b"") -> None:
        self.text = text
        self.operations = {
            1: self.look_up,
            3: self.get_attributes,
            4: self.set_attributes,
            14: self.open,
            15: self.read,
            16: self.write,
            18: lambda node, body: b"",  # RELEASE
            26: self.begin,
            27: self.open,  # of a directory
            28: self.list,
            29: lambda node, body: b"",  # RELEASEDIR
            38: lambda node, body: b"",  # DESTROY
        }

    def config(self) -> bytes:
        return struct.pack("<36sI", b"notebook", self.queues - 1)

    async def handle(self, request: Request) -> None:
        _, operation, unique, node = HEADER.unpack(request.read(HEADER.size))
        if operation in (FORGET, BATCH_FORGET):
            return  # nobody waits for an answer
        answer, error = b"", 0
        try:
            answer = self.operations[operation](node, request.read(MOST + READ_WRITE.size, HEADER.size))
        except KeyError:
            error = errno.ENOSYS  # which the guest's kernel lives with, and asks no more
        except OSError as failure:
            error = failure.errno or errno.EIO
        except struct.error:
            error = errno.EINVAL
        request.write(ANSWER.pack(ANSWER.size + len(answer), -error, unique) + answer)

    # ---- what a guest would miss on another host

    def save_state(self) -> bytes:
        return self.text

    def load_state(self, state: bytes) -> None:
        self.text = state

    # ---- operations: of a node, with the bytes behind the header

    def begin(self, node: int, body: bytes) -> bytes:
        return struct.pack("<IIII4xI4xI28x4x", 7, 31, 0, 0, MOST, 0)

    def look_up(self, node: int, body: bytes) -> bytes:
        found = NODES.get(body.rstrip(b"\0"))
        if node != ROOT or found is None:
            raise OSError(errno.ENOENT, "no such file")
        return struct.pack("<QQQQII", found, 0, 0, 0, 0, 0) + self.attributes(found)

    def get_attributes(self, node: int, body: bytes) -> bytes:
        return bytes(16) + self.attributes(node)

    def set_attributes(self, node: int, body: bytes) -> bytes:
        valid, size = struct.unpack_from("<I12xQ", body)
        if valid & SIZE_IS_SET and node == NOTE:
            self.store(self.text[:size].ljust(min(size, MOST + 1), b"\0"))
        return self.get_attributes(node, body)

    def attributes(self, node: int) -> bytes:
        mode, links = (stat.S_IFDIR | 0o755, 2) if node == ROOT else (stat.S_IFREG | 0o644, 1)
        size = len(self.text) if node == NOTE else 0
        return ATTRIBUTES.pack(node, size, -(-size // 512), mode, links, 512)

    def open(self, node: int, body: bytes) -> bytes:
        return struct.pack("<QI4x", 0, DIRECT_IO)  # the guest keeps nothing of it, so nothing of it is old

    def read(self, node: int, body: bytes) -> bytes:
        offset, size = READ_WRITE.unpack_from(body)
        return self.text[offset : offset + size]

    def write(self, node: int, body: bytes) -> bytes:
        offset, size = READ_WRITE.unpack_from(body)
        data = body[READ_WRITE.size :][:size]
        before = self.text[:offset].ljust(min(offset, MOST + 1), b"\0")
        self.store(before + data + self.text[offset + len(data) :])
        return struct.pack("<I4x", len(data))

    def store(self, text: bytes) -> None:
        if len(text) > MOST:
            raise OSError(errno.ENOSPC, "the note is full")
        self.text = text

    def list(self, node: int, body: bytes) -> bytes:
        offset, size = READ_WRITE.unpack_from(body)
        entries = b""
        for place, (name, found) in enumerate(NODES.items(), 1):
            entry = ENTRY.pack(found, place, len(name), 0) + name.ljust(-(-len(name) // 8) * 8, b"\0")
            if place > offset and len(entries + entry) <= size:
                entries += entry
        return entries


if __name__ == "__main__":
    serve_device(Notebook)
