"""docs/conformance-results.md, from outcomes in memory."""

from __future__ import annotations

from typing import Any

from vhostuser.tools.peers.page import render, unexplained
from vhostuser.tools.peers.run import Outcome
from vhostuser.tools.peers.table import Peer

PEER = Peer("some", "Some server", "some-package", "some --socket={socket}", "blk")


def case(name: str, verdict: str, level: str = "MUST", **more: Any) -> dict[str, Any]:
    return {"id": name, "section": "Rings", "rule": f"The rule | of {name}.", "level": level, "verdict": verdict} | more


def outcome(*cases: dict[str, Any], **more: Any) -> Outcome:
    return Outcome("some", "1:2.3+dfsg-1", "2026-01-31", 12.3, list(cases), more.get("unsteady", []), [])


def test_failures_stand_beside_their_reason_and_what_is_asked_for() -> None:
    bad = [case("a.b", "FAIL", waiver="does so"), case("a.c", "FAIL", "SHOULD", waiver="does so")]
    page = render([(PEER, outcome(case("a.a", "PASS"), *bad, case("a.d", "SKIP")))], [])
    assert "| [Some server 2.3](#some-server-23) | 1:2.3+dfsg-1 | 2026-01-31 | 1 | 1 | 1 | 1 | 12 |" in page
    assert "| Rings | 1 | 1 | 1 | 1 |" in page
    assert "| does so | `a.b` MUST: The rule \\| of a.b.<br>`a.c` SHOULD: The rule \\| of a.c. |" in page


def test_what_nobody_has_explained_is_said_to_be_so() -> None:
    found = outcome(case("a.a", "FAIL"), case("a.b", "ERROR", waiver="known"))
    assert unexplained(found) == ["a.a"]
    assert "| not explained yet | `a.a` MUST" in render([(PEER, found)], [])


def test_what_passed_once_and_what_is_not_here_are_named() -> None:
    page = render([(PEER, outcome(case("a.a", "PASS"), unsteady=["a.a"]))], ["Other is not installed"])
    assert "Passed one time and not the other, and counted as passed: `a.a`." in page
    assert "Nothing fails." in page
    assert "* Other is not installed" in page
