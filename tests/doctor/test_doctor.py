"""What the doctor says of given facts, and that it can look at this machine."""

import errno
import json
import subprocess
import sys
from dataclasses import replace

import pytest

from vhostuser.tools.doctor import Facts, Finding, Verdict, judge
from vhostuser.uffd import NEEDED_FOR_POSTCOPY, Attempt, Feature

HEALTHY = Facts(
    uffd=(
        Attempt("/dev/userfaultfd", 0, NEEDED_FOR_POSTCOPY),
        Attempt("userfaultfd(2)", 0, NEEDED_FOR_POSTCOPY),
    ),
    huge_pages={2048: (64, 32)},
    shmem_thp="advise",
    net_admin=True,
    qemu="QEMU 7.2",
    devices=("vhost-user-blk", "vhost-user-blk-pci", "vhost-user-gpio-device"),
    files=(1 << 20, 1 << 20),
)


def found(**changes: object) -> dict[str, Finding]:
    return {finding.topic: finding for finding in judge(replace(HEALTHY, **changes))}  # type: ignore[arg-type]


def refused(way: str, number: int) -> Attempt:
    return Attempt(way, number, cure=f"cure of {way}")


def test_a_healthy_machine_needs_no_cure() -> None:
    findings = found().values()
    assert {finding.verdict for finding in findings} == {Verdict.YES}
    assert not [finding.cure for finding in findings if finding.cure]


def test_each_way_to_a_userfaultfd_has_its_own_errno() -> None:
    ways = (refused("/dev/userfaultfd", errno.EACCES), refused("userfaultfd(2)", errno.EPERM))
    findings = found(uffd=ways)
    assert findings["userfaultfd by /dev/userfaultfd"].what == "Permission denied (EACCES)"
    assert findings["userfaultfd by userfaultfd(2)"].what == "Operation not permitted (EPERM)"
    assert findings["userfaultfd by userfaultfd(2)"].cure == "cure of userfaultfd(2)"
    assert findings["postcopy"].verdict is Verdict.NO


def test_one_way_is_enough_for_postcopy() -> None:
    assert (
        found(uffd=(refused("/dev/userfaultfd", errno.ENOENT), HEALTHY.uffd[1]))["postcopy"].what == "by userfaultfd(2)"
    )


def test_a_userfaultfd_without_shared_memory_is_none_for_postcopy() -> None:
    way = Attempt("userfaultfd(2)", 0, Feature.MISSING_HUGETLBFS | 1 << 40)
    assert found(uffd=(way,))["postcopy"].what == "the userfaultfd lacks MISSING_SHMEM"
    assert found(uffd=(way,))["userfaultfd by userfaultfd(2)"].what == "MISSING_HUGETLBFS bit40"


@pytest.mark.parametrize(
    ("topic", "changes", "verdict", "cure"),
    [
        ("memfd", {"memfd_errno": errno.ENOSYS}, Verdict.NO, "CONFIG_MEMFD_CREATE"),
        ("memfd", {"sealing_errno": errno.EPERM}, Verdict.PARTLY, "seccomp"),
        ("huge pages", {"huge_pages": {}}, Verdict.NO, "CONFIG_HUGETLBFS"),
        ("huge pages of 2 MiB", {"huge_pages": {2048: (4, 0)}}, Verdict.NO, "echo 512 >"),
        ("huge pages of 1 GiB", {"huge_pages": {1 << 20: (0, 0)}}, Verdict.NO, "echo 1 >"),
        ("transparent huge pages of shared memory", {"shmem_thp": "never"}, Verdict.NO, "echo advise"),
        ("transparent huge pages of shared memory", {"shmem_thp": ""}, Verdict.NO, "CONFIG_TRANSPARENT_HUGEPAGE"),
        ("io_uring", {"uring_errno": errno.EPERM, "uring_sysctl": "2"}, Verdict.NO, "sysctl"),
        ("io_uring", {"uring_errno": errno.EPERM, "uring_sysctl": "0"}, Verdict.NO, "seccomp"),
        ("io_uring", {"uring_errno": errno.ENOSYS}, Verdict.NO, "CONFIG_IO_URING"),
        ("open files", {"files": (1024, 1 << 19)}, Verdict.PARTLY, "ulimit -n 524288"),
        ("tap", {"tap_errno": errno.ENOENT}, Verdict.NO, "modprobe tun"),
        ("tap", {"tap_errno": errno.EACCES}, Verdict.NO, "access to /dev/net/tun"),
        ("tap", {"net_admin": False}, Verdict.PARTLY, "CAP_NET_ADMIN"),
        ("KVM", {"kvm_errno": errno.EACCES}, Verdict.NO, "group kvm"),
        ("KVM", {"kvm_errno": errno.ENOENT}, Verdict.NO, "firmware"),
        ("QEMU", {"qemu": ""}, Verdict.NO, "qemu-system-"),
        ("QEMU", {"devices": ()}, Verdict.PARTLY, "--enable-vhost-user"),
    ],
)
def test_what_is_missing_has_its_cure(topic: str, changes: dict[str, object], verdict: Verdict, cure: str) -> None:
    finding = found(**changes)[topic]
    assert finding.verdict is verdict
    assert cure in finding.cure
    assert finding.lines().splitlines()[1:] == [f"        cure: {finding.cure}"]


def test_devices_are_named_once_each() -> None:
    assert found()["QEMU"].what == "QEMU 7.2, vhost-user: blk gpio"


def test_it_can_look_at_this_machine() -> None:
    command = [sys.executable, "-m", "vhostuser.tools.main", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    topics = [json.loads(line)["topic"] for line in done.stdout.splitlines()]
    assert {"postcopy", "memfd", "io_uring", "tap", "KVM", "QEMU"} <= set(topics)
    assert not done.stderr
