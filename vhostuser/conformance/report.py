"""What is said about results: lines for people, JSON, JUnit.

What belongs here: texts made of results. What does not: judging, files, terminals (``tools.conform``).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from vhostuser.conformance.suite import Case, Result, Verdict

_COLOURS = {Verdict.PASS: "32", Verdict.FAIL: "31", Verdict.SKIP: "90", Verdict.ERROR: "35"}
_WAIVED = "33"


@dataclass(frozen=True)
class Report:
    """All results of a run against ``subject``. strict: recommendations count as rules. idle: waivers that can go."""

    subject: str
    results: Sequence[Result[Any]]
    strict: bool
    idle: Sequence[str] = ()

    @property
    def conforms(self) -> bool:
        """Nothing fails, and something was tried."""
        tried = any(result.verdict is not Verdict.SKIP for result in self.results)
        return tried and not any(result.fails(strict=self.strict) for result in self.results)

    def counts(self) -> Counter[str]:
        """How many results have each mark."""
        return Counter(mark(result, strict=self.strict) for result in self.results)


def mark(result: Result[Any], *, strict: bool) -> str:
    """A result in a word: its verdict, or "waived", or "advice" for a recommendation that does not count."""
    if result.waiver:
        return "waived"
    if result.verdict is Verdict.FAIL and not result.fails(strict=strict):
        return "advice"
    return result.verdict.lower()


# ---- for people


def line(result: Result[Any], *, strict: bool, colour: bool = False) -> str:
    """One result: the mark, the id, the rule, and what was wrong below it."""
    word = mark(result, strict=strict)
    code = _COLOURS[result.verdict] if word not in ("waived", "advice") else _WAIVED
    head = f"{_paint(f'{word:6}', code, colour)} {result.case.id}: {result.case.rule}"
    return "\n".join([head, *(f"         {detail}" for detail in _details(result))])


def _details(result: Result[Any]) -> list[str]:
    if result.verdict is Verdict.PASS:
        return []
    said = [result.reason] if result.reason else []
    if result.verdict is Verdict.FAIL:
        said = [f"{result.case.level}: {result.case.section}", f"expected {result.expected}", f"got {result.actual}"]
    return [*said, f"waived: {result.waiver}"] if result.waiver else said


def _paint(text: str, code: str, colour: bool) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if colour else text


def summary(report: Report, *, colour: bool = False) -> str:
    """A row for each theme, and the verdict."""
    themes: dict[str, Counter[str]] = {}
    for result in report.results:
        themes.setdefault(theme(result.case), Counter())[mark(result, strict=report.strict)] += 1
    width = max(map(len, themes), default=0)
    rows = [f"  {name:{width}}  {_counted(counts)}" for name, counts in sorted(themes.items())]
    rows += [f"the waiver {pattern!r} is not needed any more" for pattern in report.idle]
    verdict = _paint("CONFORMS", "32", colour) if report.conforms else _paint("DOES NOT CONFORM", "31", colour)
    how = "strict" if report.strict else "recommendations do not count"
    return "\n".join([*rows, f"{report.subject}: {verdict} ({how}): {_counted(report.counts())}"])


def _counted(counts: Counter[str]) -> str:
    words = ("pass", "fail", "error", "waived", "advice", "skip")
    return ", ".join(f"{counts[word]} {word}" for word in words if counts[word]) or "nothing tried"


def theme(case: Case[Any]) -> str:
    """The first part of its id."""
    return case.id.partition(".")[0]


def listing(cases: Iterable[Case[Any]]) -> str:
    """The cases: id, level, section, rule and needs."""
    return "\n".join(
        f"{case.id}\n    {case.level}, {case.section}: {case.rule}"
        + (f"\n    needs: {', '.join(need.name for need in case.needs)}" if case.needs else "")
        for case in cases
    )


# ---- for machines


def as_json(report: Report) -> str:
    """Everything, for programs."""
    return json.dumps(
        {
            "subject": report.subject,
            "strict": report.strict,
            "conforms": report.conforms,
            "counts": report.counts(),
            "idle_waivers": list(report.idle),
            "cases": [_entry(result, strict=report.strict) for result in report.results],
        },
        indent=2,
    )


def _entry(result: Result[Any], *, strict: bool) -> dict[str, object]:
    case = result.case
    entry: dict[str, object] = {
        "id": case.id,
        "section": case.section,
        "rule": case.rule,
        "level": case.level,
        "needs": [need.name for need in case.needs],
        "verdict": result.verdict,
        "mark": mark(result, strict=strict),
        "seconds": round(result.seconds, 4),
    }
    said = {"expected": result.expected, "actual": result.actual, "reason": result.reason, "waiver": result.waiver}
    return entry | {name: text for name, text in said.items() if text}


def as_junit(report: Report) -> str:
    """JUnit's XML: a suite for each theme. Failures that do not count are skips with their reason."""
    root = Element("testsuites", name=f"vhost-user conformance of {report.subject}")
    suites: dict[str, Element] = {}
    for result in report.results:
        name = theme(result.case)
        if name not in suites:
            suites[name] = SubElement(root, "testsuite", name=name)
        _add_junit(suites[name], result, strict=report.strict)
    for suite in suites.values():
        for attribute, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            suite.set(attribute, str(len(suite.findall(f"testcase/{tag}"))))
        suite.set("tests", str(len(suite)))
    indent(root)
    return tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _add_junit(suite: Element, result: Result[Any], *, strict: bool) -> None:
    case = SubElement(suite, "testcase", classname=suite.get("name", ""), name=result.case.id)
    case.set("time", f"{result.seconds:.3f}")
    if result.verdict is Verdict.PASS:
        return
    words = {"fail": "failure", "error": "error"}
    word = mark(result, strict=strict)
    outcome = SubElement(case, words.get(word, "skipped"))
    why = result.waiver or result.reason or f"expected {result.expected}, got {result.actual}"
    outcome.set("message", _printable(why))
    outcome.text = _printable("\n".join([result.case.rule, *_details(result)]))


def _printable(text: str) -> str:
    """XML has no place for control characters, which a peer's last words may hold."""
    return "".join(character if character >= " " or character == "\n" else "?" for character in text)
