"""The cases as data: ids that stay, rules that can be read."""

from __future__ import annotations

import re
from typing import Any

import pytest

from vhostuser.conformance.backend_cases import CASES
from vhostuser.conformance.frontend_cases import CASES as FRONTEND_CASES
from vhostuser.conformance.suite import Case


@pytest.mark.parametrize("cases", [CASES, FRONTEND_CASES], ids=["backend", "frontend"])
def test_ids_are_unique(cases: list[Case[Any]]) -> None:
    ids = [case.id for case in cases]
    assert sorted(ids) == sorted(set(ids))


@pytest.mark.parametrize("case", [*CASES, *FRONTEND_CASES], ids=lambda case: case.id)
def test_a_case_is_complete(case: Case[Any]) -> None:
    assert re.fullmatch(r"[a-z][a-z0-9-]*(\.[a-z0-9][a-z0-9-]*)+", case.id)
    assert case.section
    assert case.rule[0].isupper() or case.rule[0].isdigit()
    assert case.rule.endswith((".", "?"))
    assert len(case.rule) < 120


def test_there_are_enough_of_them_and_not_too_many_that_nobody_wrote() -> None:
    generated = [case for case in CASES if case.id.startswith("message.")]
    assert len(generated) <= 120
    assert len(CASES) - len(generated) >= 250
