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
from vhostuser.tools.postcopy.report import MIB, Result, bucket, duration

# Okabe and Ito's colours, which people tell apart whatever their eyes; the first is left to what is in the background.
_GREY, *_COLOURS = "#bbbbbb", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"
_OURS = "#000000"
_DPI = {".png": 130, ".svg": 90}
"""Also of the points in an SVG, which are put into it as a picture: there may be a million."""
_SLICES = 120
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "vhostuser",
}


class PlotError(Exception):
    """There is nothing to draw with, or nowhere to put it: one line, and the cure."""


@dataclass(frozen=True)
class Points:
    """Milliseconds since the first kick, and MiB of guest memory (regions put together)."""

    ms: list[float]
    mib: list[float]


@dataclass(frozen=True)
class Lane:
    """One client; ``name``: empty for our own threads. Pages: a wake of several is as many."""

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
    """Fault to wake: ``edges`` are exponents of two, of microseconds; one more than each client has counts."""

    edges: list[int]
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
    return Bars(list(range(first, last + 2)), counts)


def labels(results: Sequence[Result]) -> list[str]:
    """What tells runs apart: what all their labels begin or end with is left out."""
    words = [result.record.label.split(", ") for result in results]
    differing = [n for n, column in enumerate(zip(*words, strict=True)) if len(set(column)) > 1]
    return [
        ", ".join(each[n] for n in differing) or result.record.label
        for each, result in zip(words, results, strict=True)
    ]


# ---- drawing


def require() -> None:
    """Raises PlotError if matplotlib is missing; before a run that would be for nothing."""
    _pyplot()


def draw(results: Sequence[Result], path: Path) -> None:
    """One run's timeline and histogram, or several runs beside each other, as PNG or SVG by the name of the file.

    Raises PlotError.
    """
    pyplot = _pyplot()
    with pyplot.rc_context(_STYLE):
        figure = _run(pyplot, results[0]) if len(results) == 1 else _comparison(pyplot, results)
        try:
            figure.savefig(path, dpi=_DPI[path.suffix], metadata={"Date": None} if path.suffix == ".svg" else None)
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
    data = timeline(result.record)
    height = 0.3 + 0.42 * len(data.lanes)
    figure, (memory, lanes, histogram) = pyplot.subplots(
        3, 1, figsize=(9, 6.4 + height), height_ratios=[3.4, height, 1.9], layout="constrained"
    )
    verdict = "pass" if result.verdict.passed else "FAIL " + ", ".join({f.id: 0 for f in result.verdict.findings})
    figure.suptitle(f"{result.record.label}: {verdict}", x=0.01, ha="left", fontsize=11, fontweight="bold")
    _draw_memory(memory, data)
    _draw_phases(memory, result.record)
    lanes.sharex(memory)
    _draw_lanes(lanes, data)
    _draw_histogram(histogram, bars(result.record))
    return figure


def _draw_memory(axes: Any, data: Timeline) -> None:
    axes.set_title("Pages of guest memory: placed, and waited for")
    axes.scatter(data.placed.ms, data.placed.mib, s=2, color=_GREY, label="placed", rasterized=True, linewidths=0)
    for number, lane in enumerate(data.lanes):
        points, colour = lane.faults, _colour(lane, number)
        label = f"fault of {lane.name or 'a CPU'}"
        axes.scatter(points.ms, points.mib, s=6, color=colour, label=label, rasterized=True, linewidths=0, alpha=0.8)
    axes.set_ylabel("guest memory, MiB")
    axes.tick_params(axis="x", labelbottom=False)
    axes.legend(loc="lower left", bbox_to_anchor=(0.42, 1.0), ncols=4, markerscale=2, handletextpad=0.1, borderpad=0)
    axes.margins(x=0.01, y=0.02)


def _draw_phases(axes: Any, record: Record) -> None:
    """Where pages began to come, and where the last request was done: what came later nobody waited for."""
    for at, what in ((record.released, "pages come"), (record.ended, "requests done")):
        ms = (at - record.began) / 1e6
        axes.axvline(ms, color=_OURS, linewidth=0.6, linestyle=(0, (2, 3)))
        place = {"transform": axes.get_xaxis_transform(), "rotation": 90, "ha": "right", "va": "center"}
        box = {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1}
        axes.text(ms, 0.5, what, fontsize=7, color="#444444", bbox=box, **place)


def _draw_lanes(axes: Any, data: Timeline) -> None:
    """Each lane has its faults upwards and its wakes downwards, to the same scale."""
    ends = [time for lane in data.lanes for points in (lane.faults, lane.wakes) for time in points.ms]
    width = max(ends, default=1.0) / _SLICES or 1.0
    axes.set_title(f"Faults (upwards) and pages woken for (downwards), in slices of {width:.1f} ms")
    for number, lane in enumerate(data.lanes):
        up, down = _sliced(lane.faults.ms, width), _sliced(lane.wakes.ms, width)
        scale = 0.46 / max(*up, *down, 1)
        edges = [n * width for n in range(_SLICES + 1)]
        for counts, sign, alpha in ((up, 1, 1.0), (down, -1, 0.5)):
            heights = [-number + sign * count * scale for count in counts]
            axes.stairs(heights, edges, baseline=-number, fill=True, color=_colour(lane, number), alpha=alpha)
        axes.axhline(-number, color=_GREY, linewidth=0.6)
        axes.text(1.005, -number, f"±{max(*up, *down)}", transform=axes.get_yaxis_transform(), va="center", fontsize=7)
    axes.set_yticks([-n for n in range(len(data.lanes))], [lane.name or "CPU" for lane in data.lanes])
    axes.set_ylim(-len(data.lanes) + 0.48, 0.52)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("ms since the first kick")


def _sliced(times: Iterable[float], width: float) -> list[int]:
    counts = [0] * _SLICES
    for time in times:
        counts[min(max(int(time / width), 0), _SLICES - 1)] += 1
    return counts


def _draw_histogram(axes: Any, data: Bars) -> None:
    axes.set_title("From fault to wake")
    if not data.edges:
        axes.text(0.5, 0.5, "no fault", ha="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    width = 0.84 / len(data.counts)
    for number, (name, counts) in enumerate(data.counts):
        left = [slot + 0.08 + number * width for slot in range(len(counts))]
        drawn = axes.bar(left, counts, width * 0.94, align="edge", color=_COLOURS[number % len(_COLOURS)], label=name)
        if len(data.counts) == 1:
            axes.bar_label(drawn, [f"{count:,}" if count else "" for count in counts], fontsize=7, color="#444444")
    axes.set_xticks(range(len(data.edges)), [bucket(edge) for edge in data.edges])
    axes.set_yscale("symlog", linthresh=1)
    axes.set_yticks([1, 10, 100, 1000, 10000], ["1", "10", "100", "1,000", "10,000"])
    axes.set_ylim(0, max(max(counts) for _, counts in data.counts) * 2.5)
    axes.set_ylabel("faults")
    if len(data.counts) > 1:
        axes.legend(loc="lower left", bbox_to_anchor=(0.42, 1.0), ncols=6, borderpad=0)


def _colour(lane: Lane, number: int) -> str:
    return _COLOURS[number % len(_COLOURS)] if lane.name else _OURS


def _comparison(pyplot: Any, results: Sequence[Result]) -> Any:
    figure, (rates, wakes, waits) = pyplot.subplots(
        1, 3, figsize=(10, 1.6 + 0.45 * len(results)), width_ratios=[1, 1, 1.5], layout="constrained"
    )
    names, records = labels(results), [result.record for result in results]
    colours = [_COLOURS[n % len(_COLOURS)] for n in range(len(results))]
    _draw_bars(rates, "Background, MiB/s", names, [_mib_per_second(record) for record in records], colours)
    total = [sum(client.wakes for client in record.clients) for record in records]
    _draw_bars(wakes, "Wakes issued", names, total, colours)
    wakes.set_yticklabels([])
    waits.set_title("Faults that were answered within")
    for record, name, colour in zip(records, names, colours, strict=True):
        times = sorted(time for whose, found in latencies(record).items() if whose is not None for time in found)
        _draw_share(waits, times, colour, name)
    waits.set_xscale("log")
    waits.xaxis.set_major_formatter(lambda value, _: duration(value))
    waits.set_ylim(0, 1.02)
    waits.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    waits.grid(alpha=0.25)
    if any(record.events for record in records):
        waits.legend(loc="lower right")
    return figure


def _mib_per_second(record: Record) -> float:
    pages, seconds = record.background()
    return pages * record.page_size / MIB / seconds if seconds else 0.0


def _draw_bars(axes: Any, title: str, names: list[str], values: Sequence[float], colours: list[str]) -> None:
    axes.set_title(title)
    drawn = axes.barh(range(len(names)), values, color=colours, height=0.6)
    axes.bar_label(drawn, [f" {value:,.0f}" for value in values], fontsize=8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.margins(x=0.25)


def _draw_share(axes: Any, times: Sequence[float], colour: str, name: str) -> None:
    """Thinned: a few hundred points draw the same line as a million."""
    if not times:
        return
    kept = [*range(0, len(times), max(1, len(times) // 300)), len(times) - 1]
    heights = [(n + 1) / len(times) for n in kept]
    axes.step([max(times[n], 0.5) for n in kept], heights, where="post", color=colour, label=name, linewidth=1.4)
