"""The suite finds every fault: of ours here, and of the postcopy laboratory's disks.

Set ``VHOSTUSER_BROKEN=all`` to try the whole suite on each, as must be done when a fault is added: none may fail more
than fifteen cases, or it would prove little about any of them.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tests.conformance.broken import FAULTS
from tests.conformance.test_our_blk import conform

pytestmark = pytest.mark.timeout(300)

OPTIONS = "--socket-path={socket} --blk-file={image} --log-level=error --num-queues=2"
LABORATORY = Path(__file__).parents[1] / "lab_postcopy/broken"
MOST = 15

POSTCOPY = {
    "advise_with_another_descriptor": ["postcopy.advise-userfaultfd"],
    "advise_with_two_descriptors": ["postcopy.advise"],
    "advise_without_descriptor": ["postcopy.advise"],
    "bases_of_other_regions": ["postcopy.two-regions", "postcopy.two-regions-in-table"],
    "bases_of_the_front_end": ["postcopy.ack-empty", "postcopy.ack-u64", "postcopy.ack-slots"],
    "bases_off_by_a_page": ["postcopy.fault", "postcopy.end"],
    "blocks_the_control_socket": ["postcopy.control"],
    "end_not_answered": ["postcopy.end", "postcopy.end-again", "postcopy.second"],
    "fills_before_the_ack": ["postcopy.no-touch", "postcopy.no-hole-filled"],
    "listen_not_acked": ["postcopy.listen", "postcopy.listen-again"],
    "registers_nothing": ["postcopy.fault", "postcopy.no-hole-filled", "postcopy.loss-then-next"],
    "sends_an_idle_userfaultfd": ["postcopy.fault", "postcopy.loss"],
    "table_not_answered": ["postcopy.table", "postcopy.table-order"],
    "unregisters_early": ["postcopy.waits", "postcopy.two-regions"],
}
"""Disks of the laboratory, and the cases that must fail on them."""


def failures(program: str, wanted: list[str], tmp_path: Path) -> list[str]:
    cases = [] if os.environ.get("VHOSTUSER_BROKEN") == "all" else wanted
    told = tmp_path / "json"
    done = conform(
        "--start", f"{sys.executable} {program} {OPTIONS}", "--timeout=0.7", f"--json={told}", *cases, seconds=280
    )
    results = json.loads(told.read_text())["cases"]
    assert done.returncode in (0, 1), done.stderr
    assert not [case["id"] for case in results if case["verdict"] == "ERROR"], done.stderr
    return [case["id"] for case in results if case["verdict"] == "FAIL"]


def judge(found: list[str], wanted: list[str]) -> None:
    missed = [case for case in wanted if not any(f == case or f.startswith(f"{case}.") for f in found)]
    assert not missed, f"these pass, and {found} fail"
    assert len(found) <= MOST, found


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name: str, tmp_path: Path) -> None:
    wanted = list(FAULTS[name].fails)
    judge(failures(f"-m tests.conformance.broken {name}", wanted, tmp_path), wanted)


@pytest.mark.postcopy
@pytest.mark.parametrize("name", POSTCOPY)
def test_a_fault_in_postcopy_is_found(name: str, tmp_path: Path) -> None:
    judge(failures(str(LABORATORY / f"{name}.py"), POSTCOPY[name], tmp_path), POSTCOPY[name])


def test_there_are_many_faults() -> None:
    assert len(FAULTS) + len(POSTCOPY) >= 40
