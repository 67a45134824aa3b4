"""The whole suite, strictly, against our own block device; the command line with it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree.ElementTree import parse

import pytest

BLK = f"{sys.executable} -m vhostuser.tools.blk --socket-path={{socket}} --blk-file={{image}} --log-level=error"
TOOL = [sys.executable, "-m", "vhostuser.tools.main", "conform", "backend"]

NOT_OFFERED = (
    *("RARP", "MTU", "NET_F_MTU", "CROSS_ENDIAN", "CRYPTO_SESSION"),
    *("SHARED_OBJECT", "DEVICE_STATE", "SHMEM", "ACCESS_PLATFORM", "HOST_NOTIFIER", "GPA_ADDRESSES"),
)


def conform(*arguments: str, seconds: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*TOOL, *arguments], capture_output=True, text=True, timeout=seconds)


@pytest.mark.timeout(240)
def test_our_disk_conforms_strictly(tmp_path: Path) -> None:
    command = ["--start", f"{BLK} --num-queues=2", "--keep", "--strict"]
    done = conform(*command, f"--json={tmp_path / 'json'}", seconds=240)
    told = json.loads((tmp_path / "json").read_text())
    assert [case["id"] for case in told["cases"] if case["mark"] not in ("pass", "skip")] == [], done.stderr
    assert done.returncode == 0
    # What it does not offer is all that is left out: device state and the messages of other kinds of devices.
    skipped = {case["reason"] for case in told["cases"] if case["mark"] == "skip"}
    left = {reason for reason in skipped if "huge pages" not in reason and "network device" not in reason}
    assert left <= {f"{feature} is not offered" for feature in NOT_OFFERED}


def test_a_back_end_that_runs_already_is_tried_too(tmp_path: Path) -> None:
    image, path = tmp_path / "image", tmp_path / "socket"
    image.write_bytes(bytes(1 << 20))
    command = [sys.executable, "-m", "vhostuser.tools.blk", f"--socket-path={path}", f"--blk-file={image}"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            done = conform(f"--socket-path={path}", "framing", "ring.state", f"--junit={tmp_path / 'xml'}")
        finally:
            process.terminate()
    assert done.returncode == 0, done.stderr
    assert {suite.get("name") for suite in parse(tmp_path / "xml").getroot()} == {"framing", "ring"}


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--socket-path=/nowhere"], 3, "/nowhere: No such file or directory"),
        (["--start", "/no/program {socket}"], 3, "cannot be started"),
        (["--start", "false {socket}"], 3, "the back-end ended: status 1"),
        (["--start", "true"], 2, "no {socket}"),
        ([], 2, "either --start or --socket-path"),
        (["--socket-path=/x", "no.such.case"], 2, "no case has such an id"),
        (["--socket-path=/x", "--waive=/nowhere"], 2, "/nowhere: No such file"),
        (["--socket-path=/x", "--timeout=never"], 2, "'never' is not a number of seconds"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(arguments: list[str], status: int, said: str) -> None:
    done = conform("--timeout=0.2", *arguments) if "--timeout=never" not in arguments else conform(*arguments)
    assert (done.returncode, len(done.stderr.splitlines())) == (status, 1), done.stderr
    assert said in done.stderr


def test_the_cases_are_listed() -> None:
    done = conform("--list", "framing")
    assert done.returncode == 0
    assert "framing.reply-flags\n    MUST, Message Specification:" in done.stdout
