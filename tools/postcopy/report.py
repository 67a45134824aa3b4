"""A run for people (tables, a histogram, the verdict) and for programs (JSON).

What belongs here: words, columns and figures made from a record and its judgement. What does not: printing them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field

from vhostuser.tools.postcopy.record import Happening, Record, Timed, histogram, latencies, percentile
from vhostuser.tools.postcopy.rules import State, Verdict

MIB = 1 << 20
BAR = 40
"""Characters of the longest bar of a histogram."""
_SHADES = {State.HELD: "32", State.BROKEN: "1;31", State.UNTRIED: "33"}


@dataclass(frozen=True)
class Result:
    """One run: what was asked for (JSON-able), what was seen, what follows."""

    settings: dict[str, object]
    record: Record
    verdict: Verdict = field(repr=False)


# ---- for people


def text(result: Result, *, colour: bool = False) -> str:
    """Everything about one run, without a line feed at the end. ``colour``: with the escapes of terminals."""
    parts = [_summary(result), *_clients(result.record), *_histogram(result.record), _checks(result.verdict, colour)]
    return "\n\n".join("\n".join(part) for part in (*parts, [last_line(result, colour=colour)]))


def last_line(result: Result, *, colour: bool = False) -> str:
    """The verdict in one line: the faults by their ids, else what was not tried."""
    verdict = result.verdict
    if verdict.passed:
        return _shade("PASS", State.HELD, colour)
    broken = [check.id for check in verdict.checks if check.state is State.BROKEN]
    untried = [check.id for check in verdict.checks if check.state is State.UNTRIED]
    what = ", ".join(broken) if broken else f"nothing broken, but not tried: {', '.join(untried)}"
    return _shade(f"FAIL {what}", State.BROKEN, colour)


def comparison(results: Sequence[Result]) -> str:
    """Several runs beside each other, a line each."""
    head = ["run", "verdict", "background pages/s", "requests/s", "faults", "wakes", "p50 us", "p99 us"]
    rows = [[result.record.label, "pass" if result.verdict.passed else "FAIL", *_rates(result)] for result in results]
    return "\n".join(_table([head, *rows]))


def _summary(result: Result) -> list[str]:
    record = result.record
    lines = [f"{name:<12}{value}" for name, value in result.settings.items() if name != "command"]
    if record.pages:
        lines.append(f"{'placed':<12}{record.pages:,} pages{_zeros(record)}{_background(record)}")
    if done := record.requests:
        writes = sum(one.write for one in done)
        size = sum(one.size for one in done) / MIB
        lines.append(
            f"{'requests':<12}{len(done):,} of {record.planned:,} ({len(done) - writes:,} reads, {writes:,} writes), "
            f"{size:,.1f} MiB, {per_second(len(done), record.request_seconds)}/s"
        )
        lines.append(
            f"{'':<12}" + ", ".join(f"{name} {duration(value)}" for name, value in _spread(_request_times(record)))
        )
    if record.compared:
        lines.append(f"{'compared':<12}{record.compared / MIB:,.1f} MiB of memory and disks, every byte")
    return lines


def _zeros(record: Record) -> str:
    return f", {record.zeros:,} as zeros" if record.zeros else ""


def _background(record: Record) -> str:
    pages, seconds = record.background()
    if not pages:
        return ""
    rate = per_second(pages * record.page_size / MIB, seconds)
    return f", {pages:,} of them in the background in {seconds:.3f} s, {rate} MiB/s"


def _request_times(record: Record) -> list[float]:
    """Microseconds, sorted, of the requests that were not held with the first faults."""
    return sorted((one.completed - one.offered) / 1000 for one in record.requests if one.offered >= record.released)


def _spread(sorted_us: list[float]) -> Iterator[tuple[str, float]]:
    for percent in (50, 90, 99):
        yield f"{percent} %", percentile(sorted_us, percent)
    yield "longest", sorted_us[-1] if sorted_us else 0.0


def _clients(record: Record) -> list[list[str]]:
    if not record.clients:
        return []
    head = ["back-end", "pid", "requests", "faults", "wakes", "merged", "spurious", "50 %", "90 %", "99 %", "longest"]
    times = latencies(record)
    rows = [
        [
            client.name,
            str(client.pid or "-"),
            *(f"{n:,}" for n in (_requests(record.requests, index), client.faults, client.wakes)),
            *(f"{n:,}" for n in (client.merged, client.spurious)),
            *(duration(value) for _, value in _spread(times.get(index, []))),
        ]
        for index, client in enumerate(record.clients)
    ]
    return [_table([head, *rows])]


def _requests(done: Sequence[Timed], client: int) -> int:
    return sum(one.client == client for one in done)


def _histogram(record: Record) -> list[list[str]]:
    """All back-ends in one, by powers of two of microseconds."""
    buckets = histogram(_of_back_ends(record))
    if not buckets:
        return []
    first = next(n for n, count in enumerate(buckets) if count)
    most = max(buckets)
    lines = ["fault to wake"]
    for n in range(first, len(buckets)):
        bar = "#" * -(-buckets[n] * BAR // most)
        lines.append(f"  {'below ' + bucket(n + 1):>14}{buckets[n]:>9,}  {bar}".rstrip())
    return [lines]


def _of_back_ends(record: Record) -> list[float]:
    """Their times from fault to wake, sorted."""
    found = latencies(record)
    return sorted(time for client, times in found.items() if client is not None for time in times)


def _checks(verdict: Verdict, colour: bool) -> list[str]:
    lines = ["checks"]
    for check in verdict.checks:
        lines.append(f"  {check.id:<20}{_shade(check.state, check.state, colour)}")
        for finding in check.findings:
            whose = f"{finding.client}: " if finding.client else ""
            lines += [f"      expected  {whose}{finding.expected}", f"      actual    {whose}{finding.actual}"]
    return lines


def _rates(result: Result) -> list[str]:
    record = result.record
    times = _of_back_ends(record)
    return [
        per_second(*record.background()),
        per_second(len(record.requests), record.request_seconds),
        f"{sum(client.faults for client in record.clients):,}",
        f"{sum(client.wakes for client in record.clients):,}",
        f"{percentile(times, 50):,.0f}",
        f"{percentile(times, 99):,.0f}",
    ]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if n == 0 else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def bucket(n: int) -> str:
    """2**n microseconds; a ms is 1024 of them here, so that the number stays a power of two."""
    for shift, unit in ((20, "s"), (10, "ms")):
        if n >= shift:
            return f"{1 << n - shift} {unit}"
    return f"{1 << n} us"


def per_second(count: float, seconds: float) -> str:
    """A rate, with separators."""
    return f"{count / seconds:,.0f}" if seconds else "-"


def duration(us: float) -> str:
    """Microseconds with a unit that makes them short."""
    for limit, divisor, unit in ((1000, 1, "us"), (1_000_000, 1000, "ms")):
        if us < limit:
            return f"{us / divisor:.3g} {unit}"
    return f"{us / 1_000_000:.3g} s"


def _shade(what: str, state: State, colour: bool) -> str:
    return f"\033[{_SHADES[state]}m{what}\033[0m" if colour else what


# ---- for programs

JSON_VERSION = 1


def as_json(results: Sequence[Result]) -> dict[str, object]:
    """All runs of a command, JSON-able. Times are in seconds, or microseconds where the name ends in ``_us``."""
    return {
        "version": JSON_VERSION,
        "passed": all(result.verdict.passed for result in results),
        "runs": [_run(result) for result in results],
    }


def _run(result: Result) -> dict[str, object]:
    record, verdict = result.record, result.verdict
    return {
        "label": record.label,
        "settings": result.settings,
        "passed": verdict.passed,
        "checks": {check.id: check.state.value for check in verdict.checks},
        "findings": [asdict(finding) for finding in verdict.findings],
        "seconds": round(record.request_seconds, 6),
        "background": dict(zip(("pages", "seconds"), record.background(), strict=True)),
        "pages": record.pages,
        "zero_pages": record.zeros,
        "page_size": record.page_size,
        "compared_bytes": record.compared,
        "requests": {
            "planned": record.planned,
            "completed": len(record.requests),
            "writes": sum(one.write for one in record.requests),
            "bytes": sum(one.size for one in record.requests),
            "latency_us": _percentiles(_request_times(record)),
        },
        "clients": [_client(record, index) for index in range(len(record.clients))],
        "events": {kind.value: sum(event.kind is kind for event in record.events) for kind in Happening},
        "events_lost": record.lost_events,
        "control_us": _percentiles(sorted(probe.seconds * 1e6 for probe in record.probes if probe.seconds is not None)),
    }


def _client(record: Record, index: int) -> dict[str, object]:
    client = record.clients[index]
    times = latencies(record).get(index, [])
    return {
        "name": client.name,
        "pid": client.pid,
        "requests": _requests(record.requests, index),
        "faults": client.faults,
        "wakes": client.wakes,
        "merged_wakes": client.merged,
        "spurious_wakes": client.spurious,
        "blocked_us": client.blocked_ns // 1000,
        "fault_to_wake_us": _percentiles(times),
        "histogram": {bucket(n + 1): count for n, count in enumerate(histogram(times)) if count},
    }


def _percentiles(sorted_us: list[float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in _spread(sorted_us)}
