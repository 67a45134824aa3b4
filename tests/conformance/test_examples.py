"""The examples' devices, which the suite does not know, in all cases that any device has to pass."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.conformance.test_our_blk import conform

EXAMPLES = Path(__file__).parents[2] / "examples"
KEPT = ["--keep", "--strict", "--device=generic"]


def start(name: str) -> str:
    return f"{sys.executable} {EXAMPLES / name}.py --socket-path={{socket}} --log-level=error"


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("name", "ring"), [("rng", 0), ("echo", 0), ("notebook", 1), ("keyboard", 1)])
def test_an_example_conforms_strictly(name: str, ring: int, tmp_path: Path) -> None:
    done = conform("--start", start(name), f"--ring={ring}", *KEPT, f"--json={tmp_path / 'json'}", seconds=240)
    told = json.loads((tmp_path / "json").read_text())
    assert [case["id"] for case in told["cases"] if case["mark"] not in ("pass", "skip")] == [], done.stderr
    assert done.returncode == 0
    passed = {case["id"].rpartition(".")[0] for case in told["cases"] if case["mark"] == "pass"}
    assert {"ring.state", "kick", "setup"} <= passed, "the cases about rings were among them"


def test_a_ring_that_returns_nothing_is_seen() -> None:
    """The keyboard keeps what it is given on ring 0 until there is something to type."""
    case = "ring.state.started-enabled"
    done = conform("--start", start("keyboard"), "--ring=0", *KEPT, "--timeout=0.3", case)
    assert done.returncode == 1
    assert "every request returned" in done.stderr


def test_a_ring_is_named_for_devices_that_are_not_known() -> None:
    done = conform("--start", start("echo"), "--ring=0", "--device=net")
    assert done.returncode == 2
    assert "--ring is for --device=generic" in done.stderr
