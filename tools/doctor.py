"""``vhostuser doctor``: what this machine allows, and how to be allowed more.

What belongs here: looking at the machine (``look``), judging what was seen (``judge``, pure), printing it. What does
not: how a userfaultfd is opened (``vhostuser.uffd``).
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import fcntl
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Final

from vhostuser.tools.service import Parser
from vhostuser.uffd import FEATURE_NAMES, NEEDED_FOR_POSTCOPY, Attempt, attempts

_QEMU: Final = "qemu-system-"
_KVM_GET_API_VERSION: Final = 0xAE00
_TUNGETFEATURES: Final = 0x800454CF
_IO_URING_SETUP: Final = 425
_CAP_NET_ADMIN: Final = 12
# A memory region, a ring's three eventfds, sockets: 509 slots and 256 queues come to more than the usual 1024.
_MANY_FILES: Final = 4096
_LONGEST_QEMU_TAKES: Final = 20.0


def main(program: str, arguments: Sequence[str]) -> int:
    """The exit status; wrong options end the process with 2."""
    parser = Parser(program, "Says what this machine allows: postcopy, huge pages, io_uring, KVM and the rest.")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "Looks as the user who asks: run it as the one who will run the back-end. exit status: 0, or 2"
    parser.add_argument("--json", action="store_true", help="write one JSON object per line")
    options = parser.parse_args(arguments)
    for finding in judge(look()):
        print(json.dumps(finding.as_dict()) if options.json else finding.lines(colour=_colour()))
    return 0


def _colour() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


# ---- what is seen


@dataclass(frozen=True, slots=True)
class Facts:
    """What a machine answered. Numbers named ..._errno are 0 where it worked.

    huge_pages: by size in KiB, those that there are and those that are free. shmem_thp: the word in force in
    shmem_enabled, empty without that file. uring_sysctl: kernel.io_uring_disabled, empty without it. devices: the
    vhost-user devices that QEMU has. files: the limit on open files, soft and hard.
    """

    uffd: tuple[Attempt, ...] = ()
    huge_pages: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    shmem_thp: str = ""
    memfd_errno: int = 0
    sealing_errno: int = 0
    uring_errno: int = 0
    uring_sysctl: str = ""
    tap_errno: int = 0
    net_admin: bool = False
    kvm_errno: int = 0
    qemu: str = ""
    devices: tuple[str, ...] = ()
    files: tuple[int, int] = (1024, 1024)


def look() -> Facts:
    """Asks this machine, as this user. Starts QEMU for a moment if there is one."""
    qemu, devices = _qemu()
    memfd_errno, sealing_errno = _memfd()
    return Facts(
        uffd=tuple(attempts()),
        huge_pages=_huge_pages(),
        shmem_thp=_bracketed(_read("/sys/kernel/mm/transparent_hugepage/shmem_enabled")),
        memfd_errno=memfd_errno,
        sealing_errno=sealing_errno,
        uring_errno=_io_uring(),
        uring_sysctl=_read("/proc/sys/kernel/io_uring_disabled"),
        tap_errno=_answers("/dev/net/tun", _TUNGETFEATURES),
        net_admin=_net_admin(),
        kvm_errno=_answers("/dev/kvm", _KVM_GET_API_VERSION),
        qemu=qemu,
        devices=devices,
        files=resource.getrlimit(resource.RLIMIT_NOFILE),
    )


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _bracketed(text: str) -> str:
    """The word in force, as in "always [never]"."""
    found = re.search(r"\[(\w+)\]", text)
    return found[1] if found else ""


def _errno(call: Callable[[], object]) -> int:
    try:
        call()
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def _huge_pages() -> dict[int, tuple[int, int]]:
    found = {}
    for directory in Path("/sys/kernel/mm/hugepages").glob("hugepages-*kB"):
        counts = (_read(f"{directory}/{name}") for name in ("nr_hugepages", "free_hugepages"))
        total, free = (int(count or 0) for count in counts)
        found[int(directory.name.removeprefix("hugepages-").removesuffix("kB"))] = (total, free)
    return dict(sorted(found.items()))


def _memfd() -> tuple[int, int]:
    """Errnos of making one and of sealing it."""
    try:
        fd = os.memfd_create("doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        return error.errno or errno.EIO, error.errno or errno.EIO
    try:
        return 0, _errno(lambda: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK))
    finally:
        os.close(fd)


def _io_uring() -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(_IO_URING_SETUP, 1, ctypes.create_string_buffer(256))
    if fd < 0:
        return ctypes.get_errno()
    os.close(fd)
    return 0


def _answers(device: str, request: int) -> int:
    """The errno of opening a device and asking it something."""
    try:
        fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return error.errno or errno.EIO
    try:
        return _errno(lambda: fcntl.ioctl(fd, request, bytes(4) if request == _TUNGETFEATURES else 0))
    finally:
        os.close(fd)


def _net_admin() -> bool:
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", _read("/proc/self/status"), re.MULTILINE)
    return bool(found and int(found[1], 16) >> _CAP_NET_ADMIN & 1)


def _qemu() -> tuple[str, tuple[str, ...]]:
    """Its version and its vhost-user devices."""
    path = shutil.which(_QEMU + os.uname().machine)
    if path is None:
        return "", ()
    version = _output(path, "--version").partition("\n")[0]
    devices = re.findall(r'^name "(vhost-user-[\w-]+)"', _output(path, "-device", "help"), re.MULTILINE)
    return version, tuple(sorted(devices))


def _output(*command: str) -> str:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=_LONGEST_QEMU_TAKES, check=False
        ).stdout  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""


# ---- what it means


class Verdict(Enum):
    """How much is allowed."""

    YES = "yes"
    PARTLY = "partly"
    NO = "no"


_COLOURS: Final = {Verdict.YES: "\x1b[32m", Verdict.PARTLY: "\x1b[33m", Verdict.NO: "\x1b[31m"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line. cure: what to do for more; empty for a yes."""

    topic: str
    verdict: Verdict
    what: str
    cure: str = ""

    def lines(self, *, colour: bool = False) -> str:
        """As text, the cure on a line of its own."""
        word = f"{self.verdict.value:<7}"
        head = f"{_COLOURS[self.verdict]}{word}\x1b[0m" if colour else word
        return f"{head} {self.topic}: {self.what}" + (f"\n        cure: {self.cure}" if self.cure else "")

    def as_dict(self) -> dict[str, str]:
        return {**asdict(self), "verdict": self.verdict.value}


def judge(facts: Facts) -> Iterator[Finding]:
    """A finding for each thing that the project can use."""
    for attempt in facts.uffd:
        yield _uffd(attempt)
    yield _postcopy(facts.uffd)
    yield from _memory(facts)
    yield _io(facts)
    yield _files(*facts.files)
    yield _tap(facts)
    yield _kvm(facts.kvm_errno)
    yield _machine(facts)


def _wrong(number: int) -> str:
    return f"{os.strerror(number)} ({errno.errorcode.get(number, number)})"


def _uffd(attempt: Attempt) -> Finding:
    topic = f"userfaultfd by {attempt.way}"
    if attempt.errno:
        return Finding(topic, Verdict.NO, _wrong(attempt.errno), attempt.cure)
    return Finding(topic, Verdict.YES, _features(attempt.features))


def _features(bits: int) -> str:
    known = dict(enumerate(FEATURE_NAMES))
    return " ".join(known.get(bit, f"bit{bit}") for bit in range(bits.bit_length()) if bits >> bit & 1)


def _postcopy(tried: Sequence[Attempt]) -> Finding:
    topic = "postcopy"
    had = [attempt for attempt in tried if not attempt.errno]
    if not had:
        return Finding(topic, Verdict.NO, "no way to a userfaultfd", "one of the cures above")
    features = had[0].features
    if lacking := NEEDED_FOR_POSTCOPY & ~features:
        return Finding(topic, Verdict.NO, f"the userfaultfd lacks {_features(lacking)}", "Linux 4.11 or later")
    return Finding(topic, Verdict.YES, f"by {had[0].way}")


def _memory(facts: Facts) -> Iterator[Finding]:
    if facts.memfd_errno:
        yield Finding("memfd", Verdict.NO, _wrong(facts.memfd_errno), "a kernel with CONFIG_MEMFD_CREATE")
    elif facts.sealing_errno:
        yield Finding(
            "memfd", Verdict.PARTLY, f"no seals: {_wrong(facts.sealing_errno)}", "a seccomp filter that allows it"
        )
    else:
        yield Finding("memfd", Verdict.YES, "with seals")
    if not facts.huge_pages:
        yield Finding("huge pages", Verdict.NO, "the kernel has none", "a kernel with CONFIG_HUGETLBFS")
    for size, (total, free) in facts.huge_pages.items():
        yield _huge(size, total, free)
    yield _shmem_thp(facts.shmem_thp)


def _huge(size: int, total: int, free: int) -> Finding:
    name = f"{size >> 20} GiB" if size >= 1 << 20 else f"{size >> 10} MiB" if size >= 1 << 10 else f"{size} KiB"
    topic, what = f"huge pages of {name}", f"{free} free of {total}"
    if free:
        return Finding(topic, Verdict.YES, what)
    path = f"/sys/kernel/mm/hugepages/hugepages-{size}kB/nr_hugepages"
    return Finding(
        topic, Verdict.NO, what, f"echo {max(1, (1 << 20) // size)} > {path} (as root, for 1 GiB; early after boot)"
    )


def _shmem_thp(word: str) -> Finding:
    topic, path = "transparent huge pages of shared memory", "/sys/kernel/mm/transparent_hugepage/shmem_enabled"
    if not word:
        return Finding(topic, Verdict.NO, "the kernel has none", "a kernel with CONFIG_TRANSPARENT_HUGEPAGE")
    if word in ("never", "deny"):
        return Finding(topic, Verdict.NO, word, f"echo advise > {path} (as root)")
    return Finding(topic, Verdict.YES, word)


def _io(facts: Facts) -> Finding:
    if not facts.uring_errno:
        return Finding("io_uring", Verdict.YES, "can be set up")
    told = f"kernel.io_uring_disabled is {facts.uring_sysctl or 'not there'}"
    if facts.uring_sysctl not in ("", "0"):
        cure = "sysctl kernel.io_uring_disabled=0"
    elif facts.uring_errno == errno.ENOSYS:
        cure = "a kernel with CONFIG_IO_URING"
    else:
        cure = "a container whose seccomp filter allows io_uring_setup"
    return Finding("io_uring", Verdict.NO, f"{_wrong(facts.uring_errno)}, {told}; threads do its work", cure)


def _files(soft: int, hard: int) -> Finding:
    enough = soft < 0 or soft >= _MANY_FILES  # -1: no limit
    more = "" if enough else f"ulimit -n {hard if hard > soft else _MANY_FILES}, LimitNOFILE= in a unit file"
    return Finding("open files", Verdict.YES if enough else Verdict.PARTLY, f"{soft}, at most {hard}", more)


def _tap(facts: Facts) -> Finding:
    if facts.tap_errno == errno.ENOENT:
        return Finding(
            "tap", Verdict.NO, _wrong(facts.tap_errno), "modprobe tun; a container must be given /dev/net/tun"
        )
    if facts.tap_errno:
        return Finding("tap", Verdict.NO, _wrong(facts.tap_errno), "access to /dev/net/tun")
    if facts.net_admin:
        return Finding("tap", Verdict.YES, "interfaces can be made")
    cure = "CAP_NET_ADMIN, or as root: ip tuntap add tap0 mode tap user USER"
    return Finding("tap", Verdict.PARTLY, "only interfaces that were made for this user", cure)


def _kvm(number: int) -> Finding:
    if not number:
        return Finding("KVM", Verdict.YES, "/dev/kvm answers")
    if number in (errno.EACCES, errno.EPERM):
        return Finding("KVM", Verdict.NO, _wrong(number), "the user in group kvm (usermod -aG kvm USER)")
    return Finding("KVM", Verdict.NO, _wrong(number), "virtualisation in the firmware, nested in a VM; modprobe kvm")


def _machine(facts: Facts) -> Finding:
    if not facts.qemu:
        return Finding("QEMU", Verdict.NO, "not found", f"a package with {_QEMU}{os.uname().machine}")
    if not facts.devices:
        return Finding(
            "QEMU", Verdict.PARTLY, f"{facts.qemu}, without vhost-user devices", "a build with --enable-vhost-user"
        )
    kinds = dict.fromkeys(re.sub(r"^vhost-user-|-(pci|device).*$", "", device) for device in facts.devices)
    return Finding("QEMU", Verdict.YES, f"{facts.qemu}, vhost-user: {' '.join(kinds)}")
