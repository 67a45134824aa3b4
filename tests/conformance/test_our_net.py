"""The whole suite, strictly, against our own network device."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.conformance.test_our_blk import conform

NET = f"{sys.executable} -m vhostuser.tools.net --socket-path={{socket}} --log-level=error --end="
OPTIONS = ("--device=net", "--keep", "--strict")


def cases(path: Path) -> dict[str, dict[str, str]]:
    return {case["id"]: case for case in json.loads(path.read_text())["cases"]}


@pytest.mark.timeout(240)
def test_our_network_device_conforms_strictly() -> None:
    done = conform("--start", f"{NET}loopback", *OPTIONS, "--frames-return", seconds=240)
    assert done.returncode == 0, done.stderr


@pytest.mark.postcopy
@pytest.mark.timeout(120)
def test_nothing_about_frames_is_left_out_with_two_pairs(tmp_path: Path) -> None:
    pairs = f"{NET}loopback --queue-pairs=2 --postcopy=always"
    done = conform(
        "--start", pairs, *OPTIONS, "--frames-return", f"--json={tmp_path / 'json'}", "net", "packed.net", seconds=120
    )
    assert done.returncode == 0, done.stderr
    assert {case["mark"] for case in cases(tmp_path / "json").values()} == {"pass"}


@pytest.mark.parametrize(("end", "mark"), [("loopback", "pass"), ("sink", "skip")])
def test_whether_frames_come_back_is_found_out(end: str, mark: str, tmp_path: Path) -> None:
    output = tmp_path / "json"
    ids = "net.frame.order", "net.transmit.used-length"
    done = conform("--start", f"{NET}{end}", *OPTIONS, f"--json={output}", "--timeout=1.5", *ids)
    assert done.returncode == 0, done.stderr
    order, returned = (cases(output)[name] for name in ids)
    assert (order["mark"], returned["mark"]) == (mark, "pass")
    assert mark == "pass" or "whose frames come back" in order["reason"]
