"""Pictures of runs: a timeline and a histogram of one, a comparison of several.

What belongs here: which points and bars there are (``timeline``, ``bars``; no matplotlib), and drawing them. matplotlib
is imported when something is drawn; it is the extra ``plots``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vhostuser.tools.postcopy.record import Happening, Record, histogram, latencies
from vhostuser.tools.postcopy.report import MIB, Result, duration

# Okabe and Ito's colours, which people tell apart whatever their eyes; the first is left to what is in the background.
_GREY, *_COLOURS = "#bbbbbb", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"
_OURS = "#000000"
_DPI = 130


class PlotError(Exception):
    """There is nothing to draw with, or nowhere to put it: one line, and the cure."""


@dataclass(frozen=True)
class Points:
    """Milliseconds since the first kick, and MiB of guest memory (regions put together)."""

    ms: list[float]
    mib: list[float]


@dataclass(frozen=True)
class Lane:
    """One client; ``name``: empty for our own threads."""

    name: str
    faults: Points
    wakes: Points


@dataclass(frozen=True)
class Timeline:
    """``placed``: pages as they were put into place, whoever asked for them."""

    placed: Points
    lanes: list[Lane]


def timeline(record: Record) -> Timeline:
    """A lane for each client, and one for our own threads if they had to wait."""
    lanes: list[int | None] = [*range(len(record.clients))]
    if any(event.client is None and event.kind is Happening.FAULT for event in record.events):
        lanes.append(None)

    def points(kind: Happening, client: int | None = None, *, everyone: bool = False) -> Points:
        found = [event for event in record.events if event.kind is kind and (everyone or event.client == client)]
        places = [(event.at, at) for event in found for at in _pages(event.guest, event.size, record.page_size)]
        return Points(
            [(at - record.began) / 1e6 for at, _ in places], [_place(guest, record.regions) for _, guest in places]
        )

    return Timeline(
        points(Happening.PLACED, everyone=True),
        [
            Lane(
                "" if client is None else record.clients[client].name,
                points(Happening.FAULT, client),
                points(Happening.WOKEN, client),
            )
            for client in lanes
        ],
    )


def _pages(guest: int, size: int, page_size: int) -> range:
    return range(guest, guest + size, page_size)


def _place(guest: int, regions: Sequence[tuple[int, int]]) -> float:
    """MiB of memory below a guest address, holes left out."""
    return sum(max(0, min(size, guest - start)) for start, size in regions) / MIB


@dataclass(frozen=True)
class Bars:
    """Fault to wake, by powers of two: ``edges`` in microseconds has one element more than each client's counts."""

    edges: list[float]
    counts: list[tuple[str, list[int]]]


def bars(record: Record) -> Bars:
    """Empty edges where nobody waited."""
    times = latencies(record)
    found = [histogram(times.get(index, [])) for index in range(len(record.clients))]
    used = [n for counts in found for n, count in enumerate(counts) if count]
    if not used:
        return Bars([], [])
    first, last = min(used), max(used)
    counts = [
        (client.name, [counts[n] if n < len(counts) else 0 for n in range(first, last + 1)])
        for client, counts in zip(record.clients, found, strict=True)
    ]
    return Bars([float(1 << n) for n in range(first, last + 2)], counts)


# ---- drawing


def require() -> None:
    """Raises PlotError if matplotlib is missing; before a run that would be for nothing."""
    _pyplot()


def draw(results: Sequence[Result], path: Path) -> None:
    """One run's timeline and histogram, or several runs beside each other, as PNG or SVG by the name of the file.

    Raises PlotError.
    """
    pyplot = _pyplot()
    settings = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "legend.frameon": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "vhostuser",
    }
    with pyplot.rc_context(settings):
        figure = _run(pyplot, results[0]) if len(results) == 1 else _comparison(pyplot, results)
        try:
            figure.savefig(path, dpi=_DPI, metadata={"Date": None} if path.suffix == ".svg" else None)
        except OSError as error:
            raise PlotError(f"--plot: {path}: {error.strerror}") from None
        finally:
            pyplot.close(figure)


def _pyplot() -> Any:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise PlotError("--plot needs matplotlib: pip install 'vhostuser[plots]'") from None
    return pyplot


def _run(pyplot: Any, result: Result) -> Any:
    record = result.record
    data = timeline(record)
    height = 0.5 + 0.32 * len(data.lanes)
    figure, (memory, lanes, histogram) = pyplot.subplots(
        3, 1, figsize=(9, 6.2 + height), height_ratios=[3.4, height, 2.0], layout="constrained"
    )
    verdict = "pass" if result.verdict.passed else "FAIL " + ", ".join({f.id: 0 for f in result.verdict.findings})
    figure.suptitle(f"{record.label}: {verdict}", x=0.01, ha="left", fontsize=11, fontweight="bold")
    _draw_memory(memory, data)
    _draw_lanes(lanes, data)
    lanes.sharex(memory)
    _draw_histogram(histogram, bars(record))
    return figure


def _draw_memory(axes: Any, data: Timeline) -> None:
    axes.set_title("Pages of guest memory: placed, and waited for")
    axes.scatter(data.placed.ms, data.placed.mib, s=2, color=_GREY, label="placed", rasterized=True, linewidths=0)
    for number, lane in enumerate(data.lanes):
        axes.scatter(
            lane.faults.ms,
            lane.faults.mib,
            s=9,
            marker="o",
            color=_colour(lane, number),
            label=f"fault of {lane.name or 'a CPU'}",
            rasterized=True,
            linewidths=0,
            alpha=0.8,
        )
    axes.set_ylabel("guest memory, MiB")
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.08), ncols=4, markerscale=2, handletextpad=0.2)
    axes.margins(x=0.01, y=0.02)


def _draw_lanes(axes: Any, data: Timeline) -> None:
    axes.set_title("Faults (above the line) and wakes (below)")
    for number, lane in enumerate(data.lanes):
        at = -number
        axes.axhline(at, color=_GREY, linewidth=0.6, zorder=0)
        colour = _colour(lane, number)
        for points, low, high, shade in (
            (lane.faults, at + 0.03, at + 0.4, 1.0),
            (lane.wakes, at - 0.4, at - 0.03, 0.45),
        ):
            axes.vlines(points.ms, low, high, color=colour, linewidth=0.6, alpha=shade, rasterized=True)
    axes.set_yticks([-n for n in range(len(data.lanes))], [lane.name or "CPU" for lane in data.lanes])
    axes.set_ylim(-len(data.lanes) + 0.45, 0.55)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("ms since the first kick")


def _draw_histogram(axes: Any, data: Bars) -> None:
    axes.set_title("From fault to wake")
    if not data.edges:
        axes.text(0.5, 0.5, "no fault", ha="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    slots = range(len(data.edges) - 1)
    width = 0.84 / len(data.counts)
    for number, (name, counts) in enumerate(data.counts):
        left = [slot + 0.08 + number * width for slot in slots]
        drawn = axes.bar(left, counts, width * 0.94, align="edge", color=_COLOURS[number % len(_COLOURS)], label=name)
        if len(data.counts) == 1:
            axes.bar_label(drawn, [f"{count:,}" if count else "" for count in counts], fontsize=8, color="#444444")
    axes.set_xticks(range(len(data.edges)), [duration(edge) for edge in data.edges])
    axes.set_ylabel("faults")
    axes.margins(y=0.12)
    if len(data.counts) > 1:
        axes.legend(loc="upper right")


def _colour(lane: Lane, number: int) -> str:
    return _COLOURS[number % len(_COLOURS)] if lane.name else _OURS


def _comparison(pyplot: Any, results: Sequence[Result]) -> Any:
    figure, (rates, wakes, waits) = pyplot.subplots(
        1, 3, figsize=(10, 3.6), width_ratios=[1, 1, 1.3], layout="constrained"
    )
    labels = [result.record.label for result in results]
    colours = [_COLOURS[n % len(_COLOURS)] for n in range(len(results))]
    speed = [
        result.record.pages * result.record.page_size / MIB / max(result.record.page_seconds, 1e-9)
        for result in results
    ]
    _draw_bars(rates, "Placed, MiB/s", labels, speed, colours)
    total = [sum(client.wakes for client in result.record.clients) for result in results]
    _draw_bars(wakes, "Wakes issued", labels, total, colours)
    waits.set_title("From fault to wake: share of faults below")
    for result, colour in zip(results, colours, strict=True):
        times = sorted(time for whose, all_ in latencies(result.record).items() if whose is not None for time in all_)
        _draw_share(waits, times, colour, result.record.label)
    waits.set_xscale("log")
    waits.xaxis.set_major_formatter(lambda value, _: duration(value))
    waits.set_ylim(0, 1.02)
    waits.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    waits.grid(alpha=0.25)
    waits.legend(loc="lower right")
    return figure


def _draw_bars(axes: Any, title: str, labels: list[str], values: Sequence[float], colours: list[str]) -> None:
    axes.set_title(title)
    drawn = axes.barh(range(len(labels)), values, color=colours, height=0.6)
    axes.bar_label(drawn, [f" {value:,.0f}" for value in values], fontsize=8)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.margins(x=0.25)


def _draw_share(axes: Any, times: Iterable[float], colour: str, label: str) -> None:
    """Thinned: a thousand points draw the same line as a million."""
    values = list(times)
    if not values:
        return
    step = max(1, len(values) // 1000)
    kept = [*range(0, len(values), step), len(values) - 1]
    axes.step(
        [max(values[n], 0.5) for n in kept],
        [(n + 1) / len(values) for n in kept],
        where="post",
        color=colour,
        label=label,
    )
