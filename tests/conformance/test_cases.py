"""The cases as data: ids that stay, rules that can be read."""

from __future__ import annotations

import re

import pytest

from vhostuser.conformance.backend_cases import CASES
from vhostuser.conformance.peer import Peer
from vhostuser.conformance.suite import Case


def test_ids_are_unique() -> None:
    ids = [case.id for case in CASES]
    assert sorted(ids) == sorted(set(ids))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_case_is_complete(case: Case[Peer]) -> None:
    assert re.fullmatch(r"[a-z][a-z0-9-]*(\.[a-z0-9][a-z0-9-]*)+", case.id)
    assert case.section
    assert case.rule[0].isupper() or case.rule[0].isdigit()
    assert case.rule.endswith((".", "?"))
    assert len(case.rule) < 120


def test_there_are_enough_of_them_and_not_too_many_that_nobody_wrote() -> None:
    generated = [case for case in CASES if case.id.startswith("message.")]
    assert len(generated) <= 120
    assert len(CASES) - len(generated) >= 250
