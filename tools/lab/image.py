"""What the guest boots from: Debian's cloud kernel and an initramfs of a static busybox, a few modules and an agent.

Everything is made on the spot and kept in a cache directory. What the guest is told to do once it runs
belongs to ``guest``, how QEMU is started to ``machine``.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import os
import shutil
import stat
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from vhostuser.tools.lab.errors import LabError

BUSYBOX = Path("/bin/busybox")

# In the order of their dependencies: Debian's package has no modules.dep, depmod writes it when it is installed.
MODULES = (
    *("virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci"),
    "virtio_blk",
    *("failover", "net_failover", "virtio_net"),
    *("llc", "stp", "garp", "mrp", "8021q"),
    *("virtio-rng", "virtio_input", "evdev", "fuse", "virtiofs"),
)

INIT = """\
#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs -o size=90% tmpfs /tmp
for module in {modules}; do insmod /modules/$module.ko; done
# Words behind "--" on the kernel's command line are run in the place of the agent.
[ $# -gt 0 ] && exec "$@"
exec /agent
"""

# The guest's half of the command channel; the host's half, with the rules that both follow, is guest.Guest.
# Commands run side by side; one loop sends the replies, so that no two are mixed. The newline before "ready" ends what
# a guest that was killed may have left of a line.
AGENT = """\
#!/bin/sh
stty -F /dev/ttyS1 raw -echo
exec 3<>/dev/ttyS1
mkdir /run
mkfifo /run/finished
while read -r id; do cat "/run/$id"; rm "/run/$id"; done <>/run/finished >&3 3<&- &
echo "
ready $(cat /proc/sys/kernel/random/boot_id)" >&3
last=0
while true; do
    IFS=' ' read -r id command end <&3 || continue
    [ "$end" = . ] || continue
    [ "$id" -gt "$last" ] || continue
    last=$id
    (
        output=$(echo "$command" | base64 -d | sh 2>&1 3<&-)
        status=$?
        echo "$id $status $(printf %s "$output" | base64 -w 0)." >"/run/$id"
        echo "$id" >/run/finished
    ) &
done
"""


@dataclass(frozen=True)
class GuestImage:
    """Kernel and initramfs, as QEMU's ``-kernel`` and ``-initrd`` take them."""

    kernel: Path
    initramfs: Path


def cache_directory() -> Path:
    """``$VHOSTUSER_CACHE``, else ``vhostuser`` below the user's cache directory."""
    if chosen := os.environ.get("VHOSTUSER_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vhostuser"


def guest_image(cache: Path | None = None) -> GuestImage:
    """The guest's kernel and initramfs from ``cache``, made first if need be (a download of 27 MB, some seconds).

    Raises ``LabError`` if a command or a file that it takes is missing.
    """
    cache = cache or cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    root = _kernel_package(cache)
    content = _initramfs(root)
    # Named after its content, so that a changed agent or busybox makes another one and a running guest keeps its own.
    initramfs = cache / f"initramfs-{hashlib.sha256(content).hexdigest()[:16]}.gz"
    if not initramfs.exists():
        _write_atomically(initramfs, gzip.compress(content, 1, mtime=0))
    return GuestImage(_only(root, "boot/vmlinuz-*"), initramfs)


def _kernel_package(cache: Path) -> Path:
    """The unpacked kernel package in the cache: whichever is there, else the one that apt offers."""
    if present := sorted(cache.glob("linux-image-*")):
        return present[-1]
    name = _dependency(_output("apt-cache", "depends", "linux-image-cloud-amd64"))
    with tempfile.TemporaryDirectory(dir=cache, prefix="download-") as scratch:
        _output("apt-get", "download", name, cwd=scratch)
        _output("dpkg", "-x", str(_only(Path(scratch), "*.deb")), f"{scratch}/root")
        Path(scratch, "root").rename(cache / name)
    return cache / name


def _dependency(listing: str) -> str:
    for line in listing.splitlines():
        kind, _, name = line.strip().partition(" ")
        if kind == "Depends:" and name.startswith("linux-image-"):
            return name
    raise LabError("apt knows no linux-image-cloud-amd64, which has the guest's kernel: run apt-get update")


def _output(*command: str, cwd: str | None = None) -> str:
    if not shutil.which(command[0]):
        raise LabError(f"{command[0]} is missing: the guest's kernel is fetched with Debian's package tools")
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if result.returncode:
        raise LabError(f"{' '.join(command)} failed: {result.stderr.strip()}")
    return result.stdout


def _only(directory: Path, pattern: str) -> Path:
    found = sorted(directory.glob(pattern))
    if len(found) != 1:
        raise LabError(f"{directory} holds {len(found)} files like {pattern}, expected one: remove it and try again")
    return found[0]


def _write_atomically(path: Path, content: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    Path(file.name).rename(path)


def _initramfs(root: Path) -> bytes:
    if not BUSYBOX.exists():
        raise LabError(f"{BUSYBOX} is missing: apt-get install busybox-static")
    archive = _Archive()
    for name in ("bin", "dev", "modules", "proc", "sys", "tmp"):
        archive.add(name, stat.S_IFDIR | 0o755)
    archive.add("bin/busybox", stat.S_IFREG | 0o755, BUSYBOX.read_bytes())
    for applet in _applets():
        archive.add(f"bin/{applet}", stat.S_IFLNK | 0o777, b"busybox")
    for module in MODULES:
        archive.add(f"modules/{module}.ko", stat.S_IFREG | 0o644, _module(root, module))
    archive.add("init", stat.S_IFREG | 0o755, INIT.format(modules=" ".join(MODULES)).encode())
    archive.add("agent", stat.S_IFREG | 0o755, AGENT.encode())
    return archive.finish()


def _applets() -> list[str]:
    return [name for name in _output(str(BUSYBOX), "--list").split() if name != "busybox"]


def _module(root: Path, name: str) -> bytes:
    path = _only(root, f"**/{name}.ko*")
    content = path.read_bytes()
    return lzma.decompress(content) if path.suffix == ".xz" else content


class _Archive:
    """A cpio archive in the ``newc`` format, which the kernel unpacks into its root file system.

    (Documentation/driver-api/early-userspace/buffer-format.rst in the kernel.)
    """

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._inode = 0

    def add(self, name: str, mode: int, content: bytes = b"") -> None:
        """One file, directory or symbolic link (whose content is its target), owned by root."""
        self._inode += 1
        encoded = name.encode() + b"\0"
        fields = (self._inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(encoded), 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields)
        self._parts += [_padded(header + encoded), _padded(content)]

    def finish(self) -> bytes:
        """The whole archive."""
        self.add("TRAILER!!!", 0)
        return b"".join(self._parts)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)
