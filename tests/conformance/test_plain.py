"""The plain data path does everything right, so that what fails on an override of it fails for that override."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.conformance.test_our_blk import conform

PLAIN = (
    f"{sys.executable} -m tests.conformance.plain"
    " --socket-path={socket} --blk-file={image} --log-level=error --num-queues=2"
)


@pytest.mark.timeout(240)
def test_the_plain_data_path_conforms_strictly(tmp_path: Path) -> None:
    done = conform("--start", PLAIN, "--keep", "--strict", f"--json={tmp_path / 'json'}", seconds=240)
    told = json.loads((tmp_path / "json").read_text())
    assert [case["id"] for case in told["cases"] if case["mark"] not in ("pass", "skip")] == [], done.stderr
    assert done.returncode == 0
