"""Our own front-end passes the suite for front-ends, strictly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.conformance.frontends import in_memory
from vhostuser.conformance.bench import Device
from vhostuser.conformance.caller import Launch
from vhostuser.conformance.frontend_cases import CASES
from vhostuser.conformance.offer import offer_of
from vhostuser.conformance.stage import FrontendBench, Settings
from vhostuser.conformance.suite import Case, Result, judge_all


async def try_on(launch: Launch, cases: Sequence[Case[Any]], *, jobs: int = 8) -> list[Result[Any]]:
    bench = FrontendBench(Settings(offer_of(Device.BLK), launch=launch, patience=1.0, quiet=0.1))
    await bench.look()
    try:
        return [result async for result in judge_all(cases, bench, jobs=jobs)]
    finally:
        await bench.close()


async def test_our_front_end_conforms_strictly() -> None:
    results = await try_on(in_memory(), CASES)
    assert [(r.case.id, r.actual or r.reason) for r in results if r.verdict != "PASS"] == []
