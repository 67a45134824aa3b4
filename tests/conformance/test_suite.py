"""The engine: what becomes of what a case does."""

from __future__ import annotations

import asyncio

import pytest

from tests.conformance.conftest import Ability, Bench, case, nothing, result
from vhostuser.conformance.suite import (
    Level,
    Skipped,
    Theme,
    Unreachable,
    Verdict,
    Violation,
    check,
    equal,
    judge,
    judge_all,
    select,
)
from vhostuser.frontend import ReplyTimeout
from vhostuser.protocol import LocalProtocolError, QueueBroken, RemoteProtocolError, RequestRefused


def raising(error: BaseException):  # type: ignore[no-untyped-def]
    async def run(_: list[str]) -> None:
        raise error

    return run


async def test_a_case_passes_by_returning() -> None:
    bench = Bench()
    assert (await judge(case(), bench, 1)).verdict is Verdict.PASS
    assert len(bench.opened) == 1


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (Violation("this", "that"), Verdict.FAIL),
        (RequestRefused("no"), Verdict.FAIL),
        (RemoteProtocolError(None, "wrong flags"), Verdict.FAIL),
        (ReplyTimeout(None, 1, "it"), Verdict.FAIL),
        (QueueBroken(0, 1, 2), Verdict.FAIL),
        (ConnectionResetError(), Verdict.FAIL),
        (Skipped("not here"), Verdict.SKIP),
        (Unreachable("nobody"), Verdict.ERROR),
        (LocalProtocolError(None, "the case is wrong"), Verdict.ERROR),
        (KeyError("the case is wrong"), Verdict.ERROR),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
async def test_whose_fault_it_is_says_the_exception(error: Exception, verdict: Verdict) -> None:
    got = await judge(case(raising(error)), Bench(), 1)
    assert got.verdict is verdict
    assert bool(got.actual) == (verdict is Verdict.FAIL)
    assert bool(got.reason) == (verdict in (Verdict.SKIP, Verdict.ERROR))


async def test_a_failure_says_what_was_expected_and_what_was_seen() -> None:
    got = await judge(case(raising(Violation("a base of 5", "3"))), Bench(), 1)
    assert (got.expected, got.actual) == ("a base of 5", "3")


async def test_a_case_that_never_ends_fails() -> None:
    async def wait(_: list[str]) -> None:
        await asyncio.Event().wait()

    got = await judge(case(wait), Bench(), 0.01)
    assert (got.verdict, got.actual) == (Verdict.FAIL, "nothing for 0.01 s")


async def test_what_a_back_end_does_at_the_end_counts() -> None:
    got = await judge(case(), Bench(outcome=Violation("survival", "SIGSEGV")), 1)
    assert (got.verdict, got.actual) == (Verdict.FAIL, "SIGSEGV")


async def test_a_case_whose_needs_are_not_met_is_skipped_unopened() -> None:
    bench = Bench()
    got = await judge(case(nothing, Ability.FLY), bench, 1)
    assert (got.verdict, got.reason) == (Verdict.SKIP, "needs the ability to fly")
    assert not bench.opened


@pytest.mark.parametrize("jobs", [1, 3, 20])
async def test_every_case_has_one_result_and_its_own_context(jobs: int) -> None:
    bench = Bench()
    running, most = 0, 0

    async def run(context: list[str]) -> None:
        nonlocal running, most
        assert context == []
        context.append("used")
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1

    cases = [case(run, name=f"theme.{number}") for number in range(7)]
    found = [r.case.id async for r in judge_all(cases, bench, jobs=jobs)]
    assert sorted(found) == [c.id for c in cases]
    assert len(bench.opened) == 7
    assert most <= jobs


async def test_who_stops_listening_stops_the_cases() -> None:
    ended = []

    async def run(_: list[str]) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    running = judge_all([case(), case(run)], Bench(), jobs=2)
    assert (await anext(running)).verdict is Verdict.PASS
    await running.aclose()  # type: ignore[attr-defined]
    assert ended == [True]


@pytest.mark.parametrize(
    ("ids", "sections", "found"),
    [
        ([], [], ["ring.start", "ring.stop.base", "log.bytes"]),
        (["ring"], [], ["ring.start", "ring.stop.base"]),
        (["ring."], [], ["ring.start", "ring.stop.base"]),
        (["ring.stop"], [], ["ring.stop.base"]),
        (["ring.st"], [], []),
        (["*.base", "log.bytes"], [], ["ring.stop.base", "log.bytes"]),
        ([], ["migration"], ["log.bytes"]),
        (["ring"], ["migration"], []),
    ],
)
def test_cases_are_selected_by_id_and_section(ids: list[str], sections: list[str], found: list[str]) -> None:
    cases = [
        case(name="ring.start", section="Ring states"),
        case(name="ring.stop.base", section="VHOST_USER_GET_VRING_BASE"),
        case(name="log.bytes", section="Migration"),
    ]
    assert [c.id for c in select(cases, ids, sections)] == found


def test_a_theme_gives_ids_levels_and_sections() -> None:
    theme: Theme[list[str]] = Theme("ring", "Ring states")
    theme.must("start", "A kick starts it.")(nothing)
    theme.should("stop", "It stops.", Ability.FLY, section="Elsewhere")(nothing)
    assert [(c.id, c.level, c.section, c.needs) for c in theme.cases] == [
        ("ring.start", Level.MUST, "Ring states", ()),
        ("ring.stop", Level.SHOULD, "Elsewhere", (Ability.FLY,)),
    ]


@pytest.mark.parametrize(
    ("verdict", "level", "waiver", "fails"),
    [
        (Verdict.PASS, Level.MUST, "", (False, False)),
        (Verdict.SKIP, Level.MUST, "", (False, False)),
        (Verdict.FAIL, Level.MUST, "", (True, True)),
        (Verdict.FAIL, Level.SHOULD, "", (False, True)),
        (Verdict.ERROR, Level.SHOULD, "", (True, True)),
        (Verdict.FAIL, Level.MUST, "known", (False, False)),
    ],
)
def test_recommendations_count_when_strict(
    verdict: Verdict, level: Level, waiver: str, fails: tuple[bool, bool]
) -> None:
    got = result(verdict, level=level, waiver=waiver)
    assert (got.fails(strict=False), got.fails(strict=True)) == fails


def test_expectations_raise_what_a_case_fails_with() -> None:
    check(True, "this", "that")
    equal("the base", 5, 5)
    with pytest.raises(Violation) as caught:
        equal("the base", 3, 5)
    assert (caught.value.expected, caught.value.actual) == ("the base to be 5", "3")
