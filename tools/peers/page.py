"""docs/conformance-results.md, made of outcomes. No I/O.

A failure is explained by the reason of its waiver, which says what the program does; beside it stands what the
specification asks for, as the case says it. What has no waiver is named as not explained.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from vhostuser.tools.peers.run import Outcome
from vhostuser.tools.peers.table import Peer

_HEAD: Final = """\
# Conformance results

Made by `tools/results`, which starts each program, runs the whole [suite](conformance.md) strictly, and writes this
page. Do not edit it.

What is counted: a case passes or fails; rules that bind (MUST) and recommendations (SHOULD, and what the specification
leaves open although a front-end would come to harm) are told apart. "Not tried" is what needs a feature that is not
offered, or requests of a kind of device that the suite does not speak.

What did not pass was tried a second time, with a process of its own, and is counted as it was then; what differed
between the two is named. A failure is a difference between a program and one reading of the specification, by a suite
that has mistakes of its own: tell us of any. Many are about messages that no front-end sends, and harmless with those
that exist. The worst are written up, each with a command that shows it, in [findings.md](findings.md).
"""

_EXPLAINED: Final = "not explained yet"


def render(found: Sequence[tuple[Peer, Outcome]], absent: Sequence[str]) -> str:
    """The whole page. absent: a line each about what could not be tried."""
    lines = [_HEAD, *_overview(found), ""]
    if absent:
        lines += ["Not on the machine that made this page:", "", *(f"* {line}" for line in absent), ""]
    for peer, outcome in found:
        lines += [*_peer(peer, outcome), ""]
    return "\n".join(lines).rstrip() + "\n"


def unexplained(outcome: Outcome) -> list[str]:
    """The ids of failures without a waiver."""
    return [case["id"] for case in outcome.cases if _bad(case) and not case.get("waiver")]


def _overview(found: Sequence[tuple[Peer, Outcome]]) -> Iterator[str]:
    yield "| program | version | day | pass | fail (MUST) | fail (SHOULD) | not tried | seconds |"
    yield "|---|---|---|---|---|---|---|---|"
    for peer, outcome in found:
        counts = _counts(outcome.cases)
        numbers = " | ".join(str(counts[kind]) for kind in ("pass", "MUST", "SHOULD", "skip"))
        link = f"[{_title(peer, outcome)}](#{_anchor(_title(peer, outcome))})"
        yield f"| {link} | {outcome.version} | {outcome.day} | {numbers} | {outcome.seconds:.0f} |"


def _peer(peer: Peer, outcome: Outcome) -> Iterator[str]:
    yield from (f"## {_title(peer, outcome)}", "")
    origin = f"Debian's `{peer.package}` {outcome.version}" + (f" ({peer.release})" if peer.release else "")
    yield from (f"{f'{origin}.' if peer.package else 'This project.'} {peer.remark}".rstrip(), "")
    yield from ("```text", peer.command, "```", "")
    yield from (*_sections(outcome.cases), "")
    bad = [case for case in outcome.cases if _bad(case)]
    if outcome.unsteady:
        names = ", ".join(f"`{name}`" for name in outcome.unsteady)
        yield from (f"Passed one time and not the other, and counted as passed: {names}.", "")
    if not bad:
        yield "Nothing fails."
        return
    yield from ("| what it does | where that shows, and what is asked for |", "|---|---|")
    for reason, cases in _by_reason(bad).items():
        yield f"| {_cell(reason)} | {'<br>'.join(map(_case, cases))} |"


def _sections(cases: Iterable[dict[str, Any]]) -> Iterator[str]:
    sections: dict[str, list[dict[str, Any]]] = {}
    for case in cases:
        sections.setdefault(case["section"], []).append(case)
    yield "| section of the specification | pass | fail (MUST) | fail (SHOULD) | not tried |"
    yield "|---|---|---|---|---|"
    for section in sorted(sections):
        counts = _counts(sections[section])
        numbers = " | ".join(str(counts[kind] or "") for kind in ("pass", "MUST", "SHOULD", "skip"))
        yield f"| {section} | {numbers} |"


def _counts(cases: Iterable[dict[str, Any]]) -> Counter[str]:
    return Counter(case["level"] if _bad(case) else case["verdict"].lower() for case in cases)


def _bad(case: dict[str, Any]) -> bool:
    return case["verdict"] in ("FAIL", "ERROR")


def _by_reason(cases: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for case in cases:
        found.setdefault(case.get("waiver", _EXPLAINED), []).append(case)
    return found


def _case(case: dict[str, Any]) -> str:
    return f"`{case['id']}` {case['level']}: {_cell(case['rule'])}"


def _title(peer: Peer, outcome: Outcome) -> str:
    """With the version as its authors count: without Debian's own part."""
    upstream = outcome.version.partition(":")[2] or outcome.version
    return f"{peer.title} {upstream.split('+')[0].split('-')[0].split('~git')[-1]}" if peer.package else peer.title


def _anchor(heading: str) -> str:
    kept = "".join(letter for letter in heading.lower() if letter.isalnum() or letter in " -_")
    return kept.replace(" ", "-")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
