"""What ``--print-capabilities`` says of a device that is a class and has no program of its own.

What belongs here: the names that QEMU's schema (vhost-user.json, VHostUserBackendType) has for kinds of devices. What
does not: what ``vhostuser-blk`` and ``vhostuser-net`` say, which have more to tell.
"""

from __future__ import annotations

import json

_TYPES = {
    1: "net",
    2: "block",
    3: "console",
    4: "rng",
    5: "balloon",
    7: "rpmsg",
    8: "scsi",
    9: "9p",
    11: "rproc-serial",
    12: "caif",
    16: "gpu",
    18: "input",
    19: "vsock",
    20: "crypto",
    26: "fs",
}


def capabilities(virtio_id: int) -> str:
    """A line of JSON. Kinds that the schema has no name for are told by their number, as ``virtio-63``."""
    return json.dumps({"type": _TYPES.get(virtio_id, f"virtio-{virtio_id}")})
