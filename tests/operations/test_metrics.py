"""What a metric may be called, how samples of several sources are joined, and both forms in which they are shown."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostuser import measures
from vhostuser.devices.blk import Blk
from vhostuser.metrics import BOUNDS, Distribution, Kind, Metric, Sample, as_json, as_text, kept, merged, value_in

TOTAL = Metric("vhostuser_thing_bytes_total", Kind.COUNTER, "Bytes.", unit="bytes", labels=("queue",))
LEVEL = Metric("vhostuser_level", Kind.GAUGE, "How many.")
AGE = Metric("vhostuser_age_seconds", Kind.GAUGE, "How old.", unit="seconds", highest=True)
TIMES = Metric("vhostuser_wait_seconds", Kind.HISTOGRAM, "Waits.", unit="seconds")


@pytest.mark.parametrize(
    ("name", "kind", "unit"),
    [
        ("thing_total", Kind.COUNTER, ""),
        ("vhostuser_thing", Kind.COUNTER, ""),
        ("vhostuser_thing_total", Kind.GAUGE, ""),
        ("vhostuser_thing_total", Kind.COUNTER, "bytes"),
        ("vhostuser_bytes_thing_total", Kind.COUNTER, "bytes"),
        ("vhostuser_Thing_total", Kind.COUNTER, ""),
        ("vhostuser_thing_", Kind.GAUGE, ""),
    ],
)
def test_a_metric_is_named_by_prometheus_rules(name: str, kind: Kind, unit: str) -> None:
    with pytest.raises(ValueError, match="is not named so"):
        Metric(name, kind, "A thing.", unit=unit)


@pytest.mark.parametrize("labels", [("le",), ("Queue",), ("",), ("a-b",)])
def test_labels_that_would_break_the_text_are_refused(labels: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="labels"):
        Metric("vhostuser_thing", Kind.GAUGE, "A thing.", labels=labels)


def test_a_sample_has_every_label_and_the_value_that_its_kind_wants() -> None:
    with pytest.raises(ValueError, match="has the labels"):
        TOTAL.sample(1)
    with pytest.raises(ValueError, match="has the labels"):
        LEVEL.sample(1, queue=0)
    with pytest.raises(ValueError, match="histogram"):
        TIMES.sample(1)
    with pytest.raises(ValueError, match="gauge"):
        LEVEL.sample(Distribution())
    assert TOTAL.sample(1, queue=3) == Sample(TOTAL, ("3",), 1)


def test_all_names_are_different_and_every_help_is_a_sentence() -> None:
    declared = [*measures.ALL, *Blk.metrics]
    assert len({metric.name for metric in declared}) == len(declared)
    assert {metric.help for metric in declared if not re.fullmatch(r"\S.*[.]|1 .*", metric.help)} == set()


# ---- distributions


@given(st.lists(st.integers(0, 1 << 40), max_size=50))
def test_a_histogram_in_powers_of_two_keeps_every_duration_under_its_bound(durations: list[int]) -> None:
    """As C fills it: bucket n has [2**n, 2**(n + 1)) microseconds, bucket 0 from 0."""
    histogram = [0] * 32
    for ns in durations:
        histogram[min(31, max(0, (ns // 1000).bit_length() - 1))] += 1
    found = Distribution.of(histogram, sum(durations))
    reached = 0
    for bound, count in zip(BOUNDS, found.counts, strict=False):
        reached += count
        assert reached == sum(ns < bound * 1e9 for ns in durations)
    assert found.count == len(durations)
    assert found.seconds == pytest.approx(sum(durations) / 1e9)


# ---- joining


def test_counters_and_sums_are_added_up_and_the_highest_age_stays() -> None:
    one, other = Distribution.of([1, 2], 5000), Distribution.of([0, 0, 7], 6000)
    joined = merged(
        [
            *(TOTAL.sample(1, queue=0), TOTAL.sample(2, queue=1), LEVEL.sample(3), AGE.sample(4), TIMES.sample(one)),
            *(TOTAL.sample(10, queue=0), LEVEL.sample(30), AGE.sample(0.5), TIMES.sample(other)),
        ]
    )
    assert joined == [
        *(TOTAL.sample(11, queue=0), TOTAL.sample(2, queue=1), LEVEL.sample(33), AGE.sample(4)),
        TIMES.sample(Distribution.of([1, 2, 7], 11000)),
    ]
    assert kept(joined) == [joined[0], joined[1], joined[4]]


# ---- the two forms


def test_the_text() -> None:
    waits = Distribution.of([2, 1], 7_000)
    text = as_text([TOTAL.sample(5, queue='a"b\\c\nd'), LEVEL.sample(0.5), TIMES.sample(waits)])
    lines = text.splitlines()
    assert lines[:5] == [
        "# HELP vhostuser_thing_bytes_total Bytes.",
        "# TYPE vhostuser_thing_bytes_total counter",
        r'vhostuser_thing_bytes_total{queue="a\"b\\c\nd"} 5',
        "# HELP vhostuser_level How many.",
        "# TYPE vhostuser_level gauge",
    ]
    assert lines[5:10] == [
        "vhostuser_level 0.5",
        "# HELP vhostuser_wait_seconds Waits.",
        "# TYPE vhostuser_wait_seconds histogram",
        'vhostuser_wait_seconds_bucket{le="2e-06"} 2',
        'vhostuser_wait_seconds_bucket{le="4e-06"} 3',
    ]
    assert lines[-3:] == [
        'vhostuser_wait_seconds_bucket{le="+Inf"} 3',
        "vhostuser_wait_seconds_sum 7e-06",
        "vhostuser_wait_seconds_count 3",
    ]
    assert text.endswith("\n")


def test_samples_of_one_metric_stand_together_in_the_text_whatever_their_order() -> None:
    text = as_text([TOTAL.sample(1, queue=0), LEVEL.sample(1), TOTAL.sample(2, queue=1)])
    names = [line.split("{")[0].split(" ")[0] for line in text.splitlines() if not line.startswith("#")]
    assert names == [TOTAL.name, TOTAL.name, LEVEL.name]
    assert text.count("# TYPE vhostuser_thing_bytes_total ") == 1


def test_the_json() -> None:
    shown = as_json([TOTAL.sample(5, queue=0), TIMES.sample(Distribution.of([2, 0, 1], 7_000))])
    assert shown == {
        TOTAL.name: [{"labels": {"queue": "0"}, "value": 5}],
        TIMES.name: [{"labels": {}, "count": 3, "sum": 7e-06, "buckets": {"2e-06": 2, "8e-06": 1}}],
    }
    assert value_in(shown, TOTAL, queue=0) == 5
    assert value_in(shown, TOTAL, queue=1) == 0
    assert value_in(shown, TIMES) == 3
