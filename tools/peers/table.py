"""Who is tried, one row each: the program, the package that it is from, how it is started.

What belongs here: facts about programs. What does not: starting them (``run``), what they do wrong
(tests/conformance/*.waivers, one file for each name below).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Peer:
    """A back-end or a front-end (``side``).

    name: also that of its waivers. package: of Debian, "" for this project's own. release: of Debian, from which it is
    unpacked if it is not the one that is installed. command: as ``vhostuser conform --start`` takes it, the program
    first. device: its kind. keep: starting takes so long that a process goes on after a pass. options: of ``vhostuser
    conform``, beside the usual ones.
    """

    name: str
    title: str
    package: str
    command: str
    device: str
    release: str = ""
    keep: bool = False
    jobs: int = 2
    remark: str = ""
    side: str = "backend"
    options: tuple[str, ...] = ("--timeout=1.5",)


_STORAGE = (
    "qemu-storage-daemon --blockdev driver=file,node-name=f,filename={image}"
    " --export vhost-user-blk,id=e,node-name=f,addr.type=unix,addr.path={socket},writable=on,num-queues=2"
)
_NET_VHOST = (
    "dpdk-testpmd --lcores 0@0,1@0 --no-pci --no-huge -m 64 --no-shconf --log-level=lib.eal:error"
    " --vdev net_vhost0,iface={socket},queues=1,postcopy-support=1"
    " -- --forward-mode=io --auto-start --nb-cores=1 --total-num-mbufs=2048 --disable-link-check --stats-period=600"
)
_QEMU = (
    "qemu-system-x86_64 -accel tcg -machine pc,memory-backend=m -m 64 -nodefaults -display none"
    " -object memory-backend-memfd,id=m,size=64M,share=on -chardev socket,id=c,path={socket},reconnect=1"
    " -device vhost-user-blk-pci,chardev=c,num-queues=1"
)
_VIRTIO_USER = (
    "dpdk-testpmd --lcores 0@0,1@0 --no-pci --no-huge -m 256 --no-shconf --no-telemetry"
    " --vdev net_virtio_user0,path={socket},queues=1,queue_size=256"
    " -- --forward-mode=rxonly --auto-start --stats-period=1000 --nb-cores=1 --total-num-mbufs=2048"
)
_LOOP = ("--timeout=1.5", "--frames-return")
_SLOW = ("--timeout=4", "--quiet-time=0.5")

PEERS: Final = (
    Peer(
        "vhostuser-blk", "vhostuser-blk", "",
        "vhostuser-blk --socket-path={socket} --blk-file={image} --num-queues=2 --log-level=error", "blk", keep=True,
    ),
    Peer(
        "vhostuser-net", "vhostuser-net", "",
        "vhostuser-net --socket-path={socket} --end=loopback --log-level=error", "net", keep=True, options=_LOOP,
    ),
    Peer(
        "ramdisk", "examples/ramdisk.py", "",
        "python examples/ramdisk.py --socket-path={socket} --log-level=error", "blk", keep=True,
        remark="A Python device on the same runtime.",
    ),
    Peer(
        "qemu-storage-daemon", "QEMU's storage daemon", "qemu-system-common", _STORAGE, "blk",
        remark="Its export is built on libvhost-user.",
    ),
    Peer(
        "qemu-storage-daemon-10", "QEMU's storage daemon", "qemu-utils", _STORAGE, "blk", release="trixie",
        remark="Its export is built on libvhost-user.",
    ),
    Peer(
        "dpdk-net-vhost", "DPDK's net_vhost", "dpdk-dev", _NET_VHOST, "net", keep=True, jobs=2, options=_LOOP,
        remark="In `dpdk-testpmd`, which sends back what it receives from the suite's driver.",
    ),
    Peer(
        "qemu-virtiofsd", "QEMU's virtiofsd (C)", "qemu-system-common",
        "/usr/lib/qemu/virtiofsd --socket-path={socket} -o source={directory} -o sandbox=chroot", "generic",
        remark="Built on libvhost-user. QEMU has given it up for the one in Rust. Its requests are not tried.",
    ),
    Peer(
        "qemu-gpu", "QEMU's vhost-user-gpu", "qemu-system-gui", "/usr/lib/qemu/vhost-user-gpu --socket-path={socket}",
        "generic", remark="Built on libvhost-user. It starts without a GPU; its requests are not tried.",
    ),
    Peer(
        "virtiofsd", "virtiofsd (Rust)", "virtiofsd",
        "/usr/libexec/virtiofsd --socket-path={socket} --shared-dir={directory} --sandbox=none", "generic",
        release="trixie", remark="Built on rust-vmm's `vhost` and `vhost-user-backend`. Its requests are not tried.",
    ),
    Peer(
        "passt", "passt", "passt", "passt --vhost-user --foreground --runas 0 --socket {socket}", "generic",
        release="trixie", remark="With an implementation of its own. Its requests are not tried.",
    ),
    Peer(
        "qemu-frontend", "QEMU as a front-end", "qemu-system-x86", _QEMU, "blk", jobs=3, side="frontend",
        options=_SLOW, remark="Without a guest: its firmware sets a ring up and asks for the first sector.",
    ),
    Peer(
        "virtio-user", "DPDK's virtio_user", "dpdk-dev", _VIRTIO_USER, "net", jobs=3, side="frontend", options=_SLOW,
        remark="In `dpdk-testpmd`, which receives.",
    ),
)  # fmt: skip
