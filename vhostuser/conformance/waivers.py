"""Waivers: deviations that are known, each with its reason, so that a new one stands out.

A file of lines, ``ID: reason``; an ID may be a pattern (``config.*``). Empty lines and those that begin with ``#`` say
nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Self

from vhostuser.conformance.suite import C, Result, Verdict


class WaiverError(Exception):
    """The file cannot be used: one line that says which line of it and why."""


@dataclass(frozen=True)
class Waivers:
    """(pattern, reason) of each line."""

    lines: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises WaiverError for a line without a reason."""
        found = []
        for number, line in enumerate(map(str.strip, text.splitlines()), 1):
            if not line or line.startswith("#"):
                continue
            pattern, _, reason = map(str.strip, line.partition(":"))
            if not pattern or not reason:
                raise WaiverError(f"line {number}: expected 'ID: reason', not {line!r}")
            found.append((pattern, reason))
        return cls(tuple(found))

    def apply(self, result: Result[C]) -> Result[C]:
        """The result, with the reason why it may fail if it does fail and there is one."""
        if result.verdict not in (Verdict.FAIL, Verdict.ERROR):
            return result
        return replace(result, waiver=self._reason(result.case.id))

    def _reason(self, case_id: str) -> str:
        return next((reason for pattern, reason in self.lines if fnmatchcase(case_id, pattern)), "")

    def idle(self, results: Iterable[Result[C]]) -> list[str]:
        """Patterns of cases that were tried, of which none fails any more: their lines can go."""
        tried = [result for result in results if result.verdict is not Verdict.SKIP]
        return [
            pattern
            for pattern, _ in self.lines
            if (named := [result for result in tried if fnmatchcase(result.case.id, pattern)])
            and all(result.verdict is Verdict.PASS for result in named)
        ]
