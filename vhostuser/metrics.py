"""Metrics: what is counted is declared once, with name, help and unit, and shown as Prometheus text and as JSON.

What belongs here: what a metric is, samples of it, adding those of several sources up, the two forms. What does not:
which metrics there are (``measures`` for the runtime, each device for itself), who is given them (``tools``).

No I/O and no state: nothing is counted here.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, NamedTuple

_NAME = re.compile(r"vhostuser_[a-z][a-z0-9_]*[a-z0-9]")
_LABEL = re.compile(r"[a-z][a-z0-9_]*")

# Of 2 us and twice as much each time, up to 67 s: what takes longer than that is of one kind.
_BOUNDS = 26
BOUNDS = tuple(2e-6 * (1 << n) for n in range(_BOUNDS))
"""The upper bounds of every histogram, in seconds."""


class Kind(Enum):
    """What may be done with the numbers; the words are Prometheus's."""

    COUNTER = "counter"
    """Only grows, from 0 at the start of the process."""
    GAUGE = "gauge"
    HISTOGRAM = "histogram"
    """Of durations, in seconds, by ``BOUNDS``."""


@dataclass(frozen=True, slots=True)
class Distribution:
    """Durations: how many fell under each of ``BOUNDS`` but not the one before, how many under none, and their sum."""

    counts: tuple[int, ...] = (0,) * (_BOUNDS + 1)
    seconds: float = 0.0

    @classmethod
    def of(cls, histogram: Sequence[int], nanoseconds: int) -> Distribution:
        """Of a histogram as C keeps it: element n counts those of 2**n up to 2**(n + 1) microseconds, 0 from 0."""
        counts = [*histogram, *(0,) * _BOUNDS][:_BOUNDS]
        return cls((*counts, sum(histogram[_BOUNDS:])), nanoseconds / 1e9)

    @property
    def count(self) -> int:
        """How many there are."""
        return sum(self.counts)

    def __add__(self, other: Distribution) -> Distribution:
        counts = tuple(a + b for a, b in zip(self.counts, other.counts, strict=True))
        return Distribution(counts, self.seconds + other.seconds)


Value = int | float | Distribution


@dataclass(frozen=True, slots=True)
class Metric:
    """What one number means. Declared once, as a constant of the module that counts it.

    name: in full, ``vhostuser_`` and for a counter ``_total`` included; before that it ends with the unit, if there is
    one. help: one line. unit: the base unit: seconds, bytes; empty for a plain number. labels: names of the labels that
    each of its samples has. highest: of several sources' gauges the highest counts, and not their sum.

    Raises ValueError for a name that does not keep to this.
    """

    name: str
    kind: Kind
    help: str
    unit: str = ""
    labels: tuple[str, ...] = ()
    highest: bool = False

    def __post_init__(self) -> None:
        stem = self.name.removesuffix("_total")
        counts = self.kind is Kind.COUNTER
        if not _NAME.fullmatch(self.name) or (stem != self.name) != counts or not stem.endswith(self.unit):
            raise ValueError(f"{self.name}: a {self.kind.value} is not named so (see Metric)")
        if not all(_LABEL.fullmatch(label) for label in self.labels) or "le" in self.labels:
            raise ValueError(f"{self.name}: labels {self.labels}")

    def sample(self, value: Value, **labels: object) -> Sample:
        """A value, with every label that was declared. Raises ValueError if that is not so."""
        if tuple(sorted(labels)) != tuple(sorted(self.labels)):
            raise ValueError(f"{self.name} has the labels {self.labels}, not {tuple(labels)}")
        if isinstance(value, Distribution) != (self.kind is Kind.HISTOGRAM):
            raise ValueError(f"{self.name} is a {self.kind.value}, not {value!r}")
        return Sample(self, tuple(str(labels[name]) for name in self.labels), value)


class Sample(NamedTuple):
    """A value of a metric, with the values of its labels in their order."""

    metric: Metric
    labels: tuple[str, ...]
    value: Value


def merged(samples: Iterable[Sample]) -> list[Sample]:
    """One sample for each metric and labels: those of several sources together, in the order in which they came."""
    found: dict[tuple[str, tuple[str, ...]], Sample] = {}
    for sample in samples:
        key = sample.metric.name, sample.labels
        found[key] = _together(found[key], sample) if key in found else sample
    return list(found.values())


def _together(one: Sample, other: Sample) -> Sample:
    if isinstance(one.value, Distribution) and isinstance(other.value, Distribution):
        return one._replace(value=one.value + other.value)
    assert not isinstance(one.value, Distribution) and not isinstance(other.value, Distribution)
    if one.metric.highest:
        return one._replace(value=max(one.value, other.value))
    return one._replace(value=one.value + other.value)


def labelled(samples: Iterable[Sample], name: str, value: str) -> Iterator[Sample]:
    """The same samples with one label more, which says from which of several sources they come."""
    for metric, labels, number in samples:
        yield Sample(_with_label(metric, name), (*labels, value), number)


@functools.cache
def _with_label(metric: Metric, name: str) -> Metric:
    return replace(metric, labels=(*metric.labels, name))


def kept(samples: Iterable[Sample]) -> list[Sample]:
    """What stays when its source has gone: counters and histograms, which never go back."""
    return [sample for sample in samples if sample.metric.kind is not Kind.GAUGE]


# ---- as JSON


def as_json(samples: Iterable[Sample]) -> dict[str, list[dict[str, object]]]:
    """By name, samples with ``labels`` and ``value``, or ``count``, ``sum`` in seconds and ``buckets``.

    A bucket is named by its upper bound in seconds, and counts what is not in the one before; empty ones are left out.
    """
    found: dict[str, list[dict[str, object]]] = {}
    for metric, labels, value in samples:
        entry: dict[str, object] = {"labels": dict(zip(metric.labels, labels, strict=True))}
        if isinstance(value, Distribution):
            entry |= {"count": value.count, "sum": value.seconds}
            entry["buckets"] = {bound: count for bound, count in zip(_LIMITS, value.counts, strict=True) if count}
        else:
            entry["value"] = value
        found.setdefault(metric.name, []).append(entry)
    return found


def value_in(shown: Mapping[str, Sequence[Mapping[str, Any]]], metric: Metric, **labels: object) -> int | float:
    """One value out of what ``as_json`` gave, of a histogram the count; 0 if it is not there."""
    wanted = {name: str(value) for name, value in labels.items()}
    for entry in shown.get(metric.name, ()):
        if entry["labels"] == wanted:
            value: int | float = entry["count" if metric.kind is Kind.HISTOGRAM else "value"]
            return value
    return 0


# ---- as text


def as_text(samples: Iterable[Sample]) -> str:
    """Prometheus's text format, version 0.0.4: each metric with its help and type, in the order of first samples."""
    families: dict[Metric, list[Sample]] = {}
    for sample in samples:
        families.setdefault(sample.metric, []).append(sample)
    return "".join(line for metric, of_it in families.items() for line in _family(metric, of_it))


def _family(metric: Metric, samples: Iterable[Sample]) -> Iterator[str]:
    escaped = metric.help.replace("\\", r"\\").replace("\n", r"\n")
    yield f"# HELP {metric.name} {escaped}\n# TYPE {metric.name} {metric.kind.value}\n"
    for _, labels, value in samples:
        pairs = [f'{name}="{_escaped(text)}"' for name, text in zip(metric.labels, labels, strict=True)]
        if isinstance(value, Distribution):
            yield from _histogram(metric.name, pairs, value)
        else:
            yield f"{metric.name}{_braced(pairs)} {value}\n"


def _histogram(name: str, pairs: list[str], value: Distribution) -> Iterator[str]:
    reached = 0
    for bound, count in zip(_LIMITS, value.counts, strict=True):
        reached += count
        limit = f'le="{bound}"'
        yield f"{name}_bucket{_braced([*pairs, limit])} {reached}\n"
    yield f"{name}_sum{_braced(pairs)} {value.seconds}\n{name}_count{_braced(pairs)} {reached}\n"


_LIMITS = (*(repr(round(bound, 6)) for bound in BOUNDS), "+Inf")


def _braced(pairs: Sequence[str]) -> str:
    return f"{{{','.join(pairs)}}}" if pairs else ""


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
