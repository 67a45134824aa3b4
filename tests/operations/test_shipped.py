"""What is shipped for management software and systemd is true of the programs, and systemd takes it."""

from __future__ import annotations

import json
import shutil
import socket
import struct
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
PROGRAMS = sorted(name for name in SCRIPTS if name.startswith("vhostuser-"))
# QEMU's vhost-user.json: VHostUserBackendType, and the features of the types that have some.
TYPES = {"9p", "balloon", "block", "caif", "console", "crypto", "gpu", "input", "net", "rng", "rpmsg", "rproc-serial"}
TYPES |= {"scsi", "vsock", "fs"}
FEATURES = {"block": {"read-only", "blk-file"}, "input": {"evdev-path", "no-grab"}, "gpu": {"render-node", "virgl"}}


def capabilities(program: str) -> dict[str, object]:
    module, _, function = SCRIPTS[program].partition(":")
    command = f"from {module} import {function} as main; main()"
    printed: dict[str, object] = json.loads(
        subprocess.check_output([sys.executable, "-P", "-c", command, "--print-capabilities", "--nonsense"], text=True)
    )
    return printed


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_has_a_descriptor_and_its_capabilities_agree(program: str) -> None:
    descriptor = json.loads((ROOT / f"share/50-{program}.json").read_text())
    printed = capabilities(program)
    assert descriptor["binary"] == f"/usr/bin/{program}"
    assert descriptor["type"] == printed["type"] in TYPES
    assert set(printed.get("features", [])) <= FEATURES.get(str(printed["type"]), set())  # type: ignore[call-overload]
    assert printed.keys() <= {"type", "features"}


@pytest.mark.parametrize("path", sorted((ROOT / "share").glob("*.json")), ids=lambda path: path.name)
def test_a_descriptor_is_what_the_schema_says(path: Path) -> None:
    """VhostUserBackend: description, type and binary, perhaps tags; its file begins with two digits."""
    descriptor = json.loads(path.read_text())
    assert path.name[:3].removesuffix("-").isdecimal() and path.name[2] == "-"
    assert {"description", "type", "binary"} <= descriptor.keys() <= {"description", "type", "binary", "tags"}
    assert Path(descriptor["binary"]).name in PROGRAMS
    assert Path(descriptor["binary"]).is_absolute()


# ---- systemd


def program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is missing: apt-get install systemd")
    return found


@pytest.fixture
def executable(tmp_path: Path) -> Path:
    """Something at an absolute path that is vhostuser-blk."""
    path = tmp_path / "vhostuser-blk"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -P -m vhostuser.tools.blk "$@"\n')
    path.chmod(0o755)
    return path


def test_systemd_takes_the_units(tmp_path: Path, executable: Path) -> None:
    for unit in (ROOT / "share/systemd").glob("*@.*"):
        (tmp_path / unit.name).write_text(unit.read_text().replace("/usr/bin/vhostuser-blk", str(executable)))
    units = [tmp_path / "vhostuser-blk@disk.service", tmp_path / "vhostuser-blk@disk.socket"]
    done = subprocess.run(
        [program("systemd-analyze"), "verify", "--man=no", *units], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_units_can_be_installed(tmp_path: Path) -> None:
    """As docs/operations.md says, into a root of its own; udev's rule is only put there."""
    root, units = tmp_path / "root", ROOT / "share/systemd"
    for directory in ("etc/systemd/system", "etc/sysusers.d", "etc/udev/rules.d", "usr/bin"):
        (root / directory).mkdir(parents=True)
    (root / "etc/group").write_text("kvm:x:104:\n")
    for unit in units.glob("vhostuser-blk@.*"):
        shutil.copy(unit, root / "etc/systemd/system")
    shutil.copy(units / "vhostuser.sysusers.conf", root / "etc/sysusers.d/vhostuser.conf")
    shutil.copy(units / "60-vhostuser.rules", root / "etc/udev/rules.d")
    subprocess.run([program("systemd-sysusers"), f"--root={root}"], check=True, capture_output=True)
    subprocess.run(
        [program("systemctl"), f"--root={root}", "enable", "vhostuser-blk@web.socket"], check=True, capture_output=True
    )
    assert "vhostuser:" in (root / "etc/passwd").read_text()
    assert "kvm:x:104:vhostuser" in (root / "etc/group").read_text()
    assert (root / "etc/systemd/system/sockets.target.wants/vhostuser-blk@web.socket").is_symlink()


def test_the_filter_of_the_unit_allows_what_postcopy_needs() -> None:
    """mincore is in no set of systemd's that services are usually given; without it every page counts as missing."""
    unit = (ROOT / "share/systemd/vhostuser-blk@.service").read_text()
    (allowed, *_) = (line for line in unit.splitlines() if line.startswith("SystemCallFilter="))
    granted = allowed.partition("=")[2].split()
    for name in granted[:]:
        granted += members(name) if name.startswith("@") else []
    assert {"userfaultfd", "io_uring_setup", "io_uring_enter", "mincore", "preadv2", "pwritev2", "ppoll"} <= set(
        granted
    )


def members(name: str) -> list[str]:
    """The system calls of a set of systemd's, with those of the sets in it."""
    listed = subprocess.check_output([program("systemd-analyze"), "syscall-filter", name], text=True).splitlines()[1:]
    found = [line.strip() for line in listed if not line.strip().startswith("#")]
    return [*found, *(call for inner in found if inner.startswith("@") for call in members(inner))]


def test_systemd_activates_the_program_when_somebody_connects(tmp_path: Path, executable: Path, image: Path) -> None:
    path = tmp_path / "s"
    activate = [program("systemd-socket-activate"), f"--listen={path}", "--fdname=vhost-user"]
    command = [*activate, str(executable), f"--blk-file={image}", "--once"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process, socket.socket(socket.AF_UNIX) as sock:
        assert process.stderr is not None and "Listening on" in process.stderr.readline()
        sock.settimeout(20)
        sock.connect(str(path))
        sock.sendall(struct.pack("<III", 1, 1, 0))
        assert struct.unpack("<III", sock.recv(20, socket.MSG_WAITALL)[:12]) == (1, 5, 8)
        sock.close()
        assert process.wait(20) == 0
