"""The suite for front-ends finds every fault, and every case of it can fail.

Try the whole suite on a fault that is added: ``VHOSTUSER_BROKEN=all`` with its name behind -k (see ``turns``).
"""

from __future__ import annotations

import asyncio

import pytest

from tests.conformance.broken_frontends import FAULTS
from tests.conformance.frontends import in_memory
from tests.conformance.test_frontends import try_on
from tests.conformance.turns import MOST, whole
from vhostuser.conformance.frontend_cases import CASES
from vhostuser.conformance.suite import Verdict

pytestmark = pytest.mark.timeout(600)

WHOLE = whole(FAULTS)
TOGETHER = 16


async def failures(name: str, turn: asyncio.Semaphore) -> list[str]:
    fault = FAULTS[name]
    async with turn:
        cases = [case for case in CASES if name in WHOLE or case.id in fault.fails]
        results = await try_on(in_memory(fault.make), cases, patience=fault.patience)
    errors = [f"{result.case.id}: {result.reason}" for result in results if result.verdict is Verdict.ERROR]
    assert not errors, f"{name}: {errors}"
    return [result.case.id for result in results if result.verdict is Verdict.FAIL]


async def all_failures(names: list[str]) -> dict[str, list[str]]:
    turn = asyncio.Semaphore(TOGETHER)
    found = await asyncio.gather(*(failures(name, turn) for name in names))
    return dict(zip(names, found, strict=True))


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest) -> dict[str, list[str]]:
    """What fails on each front-end that is tried; they spend most of their time waiting, so many at a time."""
    ours = [item for item in request.session.items if item.path == request.path]
    chosen = [getattr(item, "callspec", None) for item in ours]
    names = sorted({spec.params["fault"] for spec in chosen if spec is not None})
    return asyncio.run(all_failures(names))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault: str, found: dict[str, list[str]]) -> None:
    missed = sorted(set(FAULTS[fault].fails) - set(found[fault]))
    assert not missed, f"these pass, and {found[fault]} fail"
    assert len(found[fault]) <= MOST, found[fault]


def test_every_case_can_fail() -> None:
    shown = {case for fault in FAULTS.values() for case in fault.fails}
    assert {case.id for case in CASES} - shown == set()


def test_there_are_many_faults() -> None:
    assert len(FAULTS) >= 40
