"""An image that cannot be served is refused at once, with one line; two writers never share one; a hand-over works."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vhostuser.devices.image import Image, ImageBusy, ImageError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    return image


def refused(*arguments: object, **settings: object) -> str:
    with pytest.raises(ImageError) as caught:
        Image(*arguments, **settings)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- what can be an image


def test_what_is_no_image_is_refused_with_its_name_and_the_reason(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name, reason in (("none", "No such file"), ("fifo", "neither a regular file"), (".", "a directory")):
        message = refused(str(tmp_path / name))
        assert message.startswith(str(tmp_path / name))
        assert reason in message
    assert "neither a regular file nor a block device" in refused("/dev/null")


def test_a_size_that_is_not_whole_blocks_is_refused_and_the_right_one_is_named(path: Path) -> None:
    os.truncate(path, 4096 + 512)
    assert "8192" in refused(path, block_size=4096)
    assert Image(path).sectors == 9
    os.truncate(path, 100)
    assert "512" in refused(path)
    os.truncate(path, 0)
    assert "empty" in refused(path)


@pytest.mark.parametrize("block_size", [0, 1, 256, 1000, -512])
def test_a_block_size_is_a_power_of_two(path: Path, block_size: int) -> None:
    assert "power of two" in refused(path, block_size=block_size)


def test_a_file_system_without_direct_io_is_refused_with_the_cure() -> None:
    assert "--cache=writeback" in refused("/proc/self/status", direct=True, read_only=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody who may not write")
def test_an_image_that_may_only_be_read_says_so(path: Path) -> None:
    path.chmod(0o444)
    for parent in path.parents[:3]:
        parent.chmod(parent.stat().st_mode | 0o011)
    os.seteuid(65534)
    try:
        assert "--read-only" in refused(path)
        assert Image(path, read_only=True).sectors == 2048
    finally:
        os.seteuid(0)


def test_an_image_leaves_no_descriptor_open(path: Path, no_leaks: None) -> None:
    Image(path).open().close()
    refused("/dev/null")


# ---- the lock


@pytest.fixture
def other(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the image open and locked until its standard input is closed."""
    program = (
        "import sys; from vhostuser.devices.image import Image;"
        "opened = Image(sys.argv[1]).open(); print('locked', flush=True); sys.stdin.read(); opened.close();"
        "print('closed', flush=True); import time; time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "locked\n"
        yield child
        child.kill()


def test_two_processes_never_write_to_one_image(path: Path, other: subprocess.Popen[str]) -> None:
    image = Image(path)  # looking at it is not forbidden
    with pytest.raises(ImageBusy, match="another process"):
        image.open()
    with pytest.raises(ImageBusy):
        Image(path, read_only=True).open()


def test_the_image_is_free_when_the_other_has_closed_it(path: Path, other: subprocess.Popen[str]) -> None:
    assert other.stdin is not None
    assert other.stdout is not None
    other.stdin.close()
    assert other.stdout.readline() == "closed\n"
    Image(path).open().close()


def test_the_image_is_free_when_the_other_was_killed(path: Path, other: subprocess.Popen[str]) -> None:
    other.send_signal(signal.SIGKILL)
    other.wait()
    Image(path).open().close()


def test_two_openings_in_one_process_exclude_each_other_too(path: Path) -> None:
    image = Image(path)
    opened = image.open()
    with pytest.raises(ImageBusy):
        image.open()
    opened.close()
    image.open().close()


def test_readers_share_and_keep_writers_out(path: Path) -> None:
    readers = [Image(path, read_only=True).open() for _ in range(2)]
    with pytest.raises(ImageBusy):
        Image(path).open()
    for reader in readers:
        reader.close()
    Image(path).open().close()


@pytest.mark.skipif(shutil.which("qemu-io") is None, reason="qemu-io (qemu-utils) is not installed")
def test_qemu_and_we_see_each_others_locks(path: Path) -> None:
    opened = Image(path).open()
    command = ["qemu-io", "-f", "raw", "-c", "write 0 512", str(path)]
    denied = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "lock" in denied.stderr
    opened.close()
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


# ---- while it is open


def test_the_size_is_looked_at_again(path: Path) -> None:
    image = Image(path, block_size=4096)
    opened = image.open()
    os.truncate(path, (2 << 20) + 512)
    opened.refresh()
    assert image.sectors == 4096
    opened.close()
    opened.refresh()
    assert image.sectors == 4096


def test_what_another_host_changed_meanwhile_is_refused_when_it_is_opened(path: Path) -> None:
    image = Image(path)
    os.truncate(path, 100)
    with pytest.raises(ImageError, match="not a multiple"):
        image.open()
    path.unlink()
    with pytest.raises(ImageError, match="No such file"):
        image.open()


def test_writes_that_do_not_reach_the_medium_are_reported(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Image(path).open()

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(ImageError, match="writes were lost"):
        opened.sync()
    opened.close()
