"""The report: tables that line up, a histogram, the verdict in one line, and JSON of a fixed shape."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from vhostuser.tools.postcopy.record import Record, Stuck, percentile, waits
from vhostuser.tools.postcopy.report import Result, as_json, comparison, duration, last_line, latencies, text
from vhostuser.tools.postcopy.rules import RULES, judge

Good = Callable[..., Record]


def result(record: Record) -> Result:
    return Result({"memory": "4 MiB", "seed": 1}, record, judge(record))


def test_a_wait_is_a_fault_and_the_next_wake_of_its_page_for_its_client(good: Good) -> None:
    record = good(2)
    pairs = list(waits(record.events, record.page_size))
    assert len(pairs) == 4
    assert all(fault.client == wake.client and wake.at - fault.at == 100_000 for fault, wake in pairs)
    assert latencies(record) == {0: [100.0, 100.0], 1: [100.0, 100.0]}


def test_a_wake_of_several_pages_ends_the_waits_for_all_of_them(good: Good) -> None:
    record = good()
    record.events = [event for event in record.events if event.kind == "fault"]
    from dataclasses import replace

    from vhostuser.tools.postcopy.record import Happening

    wake = replace(record.events[0], at=20_000_000, kind=Happening.WOKEN, guest=4096, size=2 * 4096)
    assert len(list(waits([*record.events, wake], 4096))) == 2


@pytest.mark.parametrize(("percent", "expected"), [(0, 1), (50, 2), (75, 3), (99, 4), (100, 4)])
def test_percentiles_are_values_that_were_seen(percent: float, expected: float) -> None:
    assert percentile([1, 2, 3, 4], percent) == expected


def test_a_passed_run_in_text(good: Good) -> None:
    lines = text(result(good())).splitlines()
    assert lines[-1] == "PASS"
    assert any(line.startswith("blk 0") and "100 us" in line for line in lines)
    assert any("below 128 us" in line and line.endswith("#" * 40) for line in lines)
    assert sum(line.split()[-1:] == ["ok"] for line in lines) == len(RULES)
    assert not [line for line in lines if line != line.rstrip()]


def test_a_failed_run_names_the_faults_in_its_last_line_with_expectation_and_evidence_above(good: Good) -> None:
    record = good()
    record.stuck.append(Stuck(0, 5, 2.0, 3, 0))
    found = text(result(record))
    assert found.splitlines()[-1] == "FAIL never-woken"
    assert "expected  blk 0: goes on with a request" in found
    assert "actual    blk 0: 1 request open 2.0 s" in found


def test_what_was_not_tried_does_not_pass(good: Good) -> None:
    record = good()
    record.sightings.clear()
    assert last_line(result(record)) == "FAIL nothing broken, but not tried: touched-before-ack"


def test_colours_are_only_added(good: Good) -> None:
    plain, coloured = text(result(good())), text(result(good()), colour=True)
    assert "\033" not in plain
    assert coloured.replace("\033[32m", "").replace("\033[0m", "") == plain


def test_an_empty_record_can_be_shown_too() -> None:
    assert text(result(Record())).splitlines()[-1].startswith("FAIL nothing broken, but not tried: no-pagefault")
    json.dumps(as_json([result(Record())]))


def test_several_runs_stand_beside_each_other(good: Good) -> None:
    lines = comparison([result(good()), result(good(2))]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split()[:2] == ["test", "pass"]


def test_the_shape_of_the_json(good: Good) -> None:
    record = good(2)
    record.stuck.append(Stuck(1, 5, 2.0, 3, 0))
    found = json.loads(json.dumps(as_json([result(record)])))
    assert set(found) == {"version", "passed", "runs"}
    assert (found["version"], found["passed"]) == (1, False)
    (run,) = found["runs"]
    assert set(run) == {
        *(
            "label",
            "settings",
            "passed",
            "checks",
            "findings",
            "seconds",
            "background",
            "pages",
            "zero_pages",
            "page_size",
            "compared_bytes",
        ),
        *("requests", "clients", "events", "events_lost", "control_us"),
    }
    assert set(run["checks"]) == {rule.id for rule in RULES}
    assert set(run["checks"].values()) <= {"ok", "broken", "not tried"}
    assert [set(finding) for finding in run["findings"]] == [{"id", "client", "expected", "actual"}]
    assert run["events"] == {"fault": 4, "placed": 4, "woken": 4}
    assert run["requests"]["latency_us"] == {"50 %": 2000.0, "90 %": 2000.0, "99 %": 2000.0, "longest": 2000.0}
    assert run["clients"][0] == {
        "name": "blk 0",
        "pid": 100,
        "requests": 2,
        "faults": 2,
        "wakes": 2,
        "merged_wakes": 0,
        "spurious_wakes": 0,
        "blocked_us": 200,
        "fault_to_wake_us": {"50 %": 100.0, "90 %": 100.0, "99 %": 100.0, "longest": 100.0},
        "histogram": {"128 us": 2},
    }


@pytest.mark.parametrize(
    ("us", "words"), [(0.5, "0.5 us"), (12, "12 us"), (999, "999 us"), (1500, "1.5 ms"), (2_500_000, "2.5 s")]
)
def test_durations_have_a_unit_that_makes_them_short(us: float, words: str) -> None:
    assert duration(us) == words
