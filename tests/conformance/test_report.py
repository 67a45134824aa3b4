"""What is said about results, and what waivers do to them."""

from __future__ import annotations

import json
from xml.etree.ElementTree import fromstring

import pytest

from tests.conformance.conftest import result
from vhostuser.conformance.report import Report, as_json, as_junit, line, listing, mark, summary
from vhostuser.conformance.suite import Level, Verdict
from vhostuser.conformance.waivers import WaiverError, Waivers

PASS = result(Verdict.PASS, "ring.start")
FAIL = result(Verdict.FAIL, "ring.stop", expected="a base of 5", actual="3\x1b[0m")
ADVICE = result(Verdict.FAIL, "config.size", level=Level.SHOULD, expected="this", actual="that")
SKIP = result(Verdict.SKIP, "log.bytes", reason="LOG_SHMFD is not offered")
ERROR = result(Verdict.ERROR, "log.end", reason="no descriptor left")
WAIVED = result(Verdict.FAIL, "log.size", expected="8", actual="0", waiver="as DPDK does")
ALL = [PASS, FAIL, ADVICE, SKIP, ERROR, WAIVED]


def report(*results: object, strict: bool = False) -> Report:
    return Report("it", results, strict)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("results", "strict", "conforms"),
    [
        ([PASS, SKIP], True, True),
        ([PASS, ADVICE], False, True),
        ([PASS, ADVICE], True, False),
        ([PASS, WAIVED], True, True),
        ([PASS, FAIL], False, False),
        ([PASS, ERROR], False, False),
        ([SKIP], False, False),
        ([], False, False),
    ],
)
def test_who_conforms(results: list[object], strict: bool, conforms: bool) -> None:
    assert report(*results, strict=strict).conforms is conforms


def test_marks() -> None:
    assert [mark(each, strict=False) for each in ALL] == ["pass", "fail", "advice", "skip", "error", "waived"]
    assert mark(ADVICE, strict=True) == "fail"


def test_a_failure_is_told_with_rule_section_expected_and_actual() -> None:
    text = line(FAIL, strict=False)
    for part in ("ring.stop", "The rule.", "MUST: Some section", "expected a base of 5", "got 3"):
        assert part in text
    assert "\x1b[31m" in line(FAIL, strict=False, colour=True)
    assert len(line(PASS, strict=False).splitlines()) == 1
    assert "waived: as DPDK does" in line(WAIVED, strict=False)
    assert "LOG_SHMFD is not offered" in line(SKIP, strict=False)


def test_the_summary_counts_by_theme() -> None:
    text = summary(report(*ALL))
    assert "ring    1 pass, 1 fail" in text
    assert "log     1 error, 1 waived, 1 skip" in text
    assert "DOES NOT CONFORM" in text
    assert "CONFORMS (strict)" in summary(report(PASS, strict=True))
    assert "'log.*' is not needed any more" in summary(Report("it", [PASS], False, idle=["log.*"]))


def test_json_has_everything() -> None:
    told = json.loads(as_json(report(*ALL)))
    assert (told["subject"], told["strict"], told["conforms"]) == ("it", False, False)
    assert told["counts"] == {"pass": 1, "fail": 1, "advice": 1, "skip": 1, "error": 1, "waived": 1}
    assert [entry["id"] for entry in told["cases"]] == [each.case.id for each in ALL]
    assert told["cases"][1]["expected"] == "a base of 5"


def test_junit_counts_what_fails_and_says_why() -> None:
    root = fromstring(as_junit(report(*ALL)))
    counts = {suite.get("name"): [suite.get(k) for k in ("tests", "failures", "errors", "skipped")] for suite in root}
    assert counts == {"ring": ["2", "1", "0", "0"], "config": ["1", "0", "0", "1"], "log": ["3", "0", "1", "2"]}
    failure = root.find("testsuite/testcase[@name='ring.stop']/failure")
    assert failure is not None
    assert failure.get("message") == "expected a base of 5, got 3?[0m", "XML has no place for control characters"


def test_the_list_of_cases_says_what_each_needs() -> None:
    assert "ring.start\n    MUST, Some section: The rule." in listing([PASS.case])


# ---- waivers


def test_a_waiver_is_a_pattern_and_a_reason() -> None:
    waivers = Waivers.parse("# known\n\nring.*: told upstream: issue 5\nlog.size: ours\n")
    assert waivers.lines == (("ring.*", "told upstream: issue 5"), ("log.size", "ours"))


@pytest.mark.parametrize("text", ["ring.stop", "ring.stop:", ": because"])
def test_a_waiver_without_a_reason_is_none(text: str) -> None:
    with pytest.raises(WaiverError, match="line 1"):
        Waivers.parse(text)


def test_only_what_fails_is_waived() -> None:
    waivers = Waivers.parse("*: why not")
    assert [waivers.apply(each).waiver for each in (PASS, FAIL, SKIP, ERROR)] == ["", "why not", "", "why not"]
    assert Waivers.parse("log.*: x").apply(FAIL).waiver == ""


def test_waivers_that_nothing_needs_any_more_are_named() -> None:
    waivers = Waivers.parse("ring.start: a\nring.stop: b\nlog.bytes: skipped\nnever.heard: of\nring.*: c")
    assert waivers.idle(ALL) == ["ring.start"]
