"""The plan: everything lies in memory, nothing overlaps, nobody has a reason to touch a canary."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vhostuser.tools.postcopy.plan import SECTOR, Area, Plan, PlanError, Shape, make_plan

MIB = 1 << 20
HUGE = 2 * MIB


def shape(**changes: int) -> Shape:
    return Shape(**({"size": 4 * MIB, "regions": 2, "page_size": 4096, "clients": 1, "ring_bytes": 6000} | changes))


def areas_of(plan: Plan, client: int) -> list[Area]:
    return [plan.rings[client], *(area for request in plan.requests[client] for area in request.areas)]


slow = settings(deadline=None, max_examples=40)
shapes = st.builds(
    shape,
    size=st.integers(1, 12).map(lambda n: n * 2 * MIB),
    regions=st.integers(1, 4),
    page_size=st.sampled_from([4096, HUGE]),
    clients=st.integers(1, 3),
    requests=st.sampled_from([0, 1, 7]),
    withhold=st.sampled_from([0, 30, 100]),
    seed=st.integers(0, 100),
)


@slow
@given(shapes)
def test_everything_lies_in_memory_and_nothing_overlaps(asked: Shape) -> None:
    try:
        plan = make_plan(asked)
    except PlanError:
        assert asked.size < 8 * asked.regions * asked.clients * asked.page_size
        return
    assert sum(region.size for region in plan.regions) <= asked.size
    found = set()
    for client in range(asked.clients):
        found |= set(areas_of(plan, client))
    ordered = sorted(found, key=lambda area: area.guest)
    assert all(one.end <= other.guest for one, other in pairwise(ordered))
    for area in ordered:
        assert area.size > 0
        assert plan.locate(area.guest)[0] == plan.locate(area.end - 1)[0]


@slow
@given(shapes)
def test_nobody_refers_to_a_canary(asked: Shape) -> None:
    try:
        plan = make_plan(asked)
    except PlanError:
        return
    assert plan.canaries
    assert not set(plan.canaries) & set(plan.withheld)
    for client in range(asked.clients):
        assert not plan.pages(areas_of(plan, client)) & set(plan.canaries)


@slow
@given(shapes)
def test_requests_of_a_client_have_sectors_of_their_own(asked: Shape) -> None:
    try:
        plan = make_plan(asked)
    except PlanError:
        return
    for requests, sectors in zip(plan.requests, plan.sectors, strict=True):
        assert asked.requests == 0 or len(requests) <= asked.requests
        assert [request.number for request in requests] == list(range(len(requests)))
        ends = [(request.sector, request.sector + request.length // SECTOR) for request in requests]
        assert all(request.length % SECTOR == 0 for request in requests)
        assert all(one[1] == other[0] for one, other in pairwise(ends))
        assert ends[-1][1] == sectors


def test_several_clients_write_the_same_pages_and_read_into_their_own() -> None:
    plan = make_plan(shape(clients=2, size=8 * MIB))
    data = [{segment for request in requests for segment in request.segments} for requests in plan.requests]
    shared = data[0] & data[1]
    assert len(shared) > len(data[0]) // 8
    for requests in plan.requests:
        assert all(request.write for request in requests if set(request.segments) & shared)


def test_the_same_seed_makes_the_same_plan_and_another_one_another() -> None:
    assert make_plan(shape()) == make_plan(shape())
    assert make_plan(shape(seed=2)) != make_plan(shape())


def test_a_mixture_of_reads_and_writes_over_several_pages() -> None:
    (requests,) = make_plan(shape()).requests
    assert {request.write for request in requests} == {True, False}
    assert any(len(request.segments) > 1 for request in requests)
    assert any(segment.guest // 4096 != (segment.end - 1) // 4096 for r in requests for segment in r.segments)


@pytest.mark.parametrize("changes", [{"size": 4096, "regions": 2}, {"size": HUGE, "page_size": HUGE, "regions": 1}])
def test_too_little_memory_is_said_in_one_line(changes: dict[str, int]) -> None:
    with pytest.raises(PlanError) as caught:
        make_plan(shape(**changes))
    assert "\n" not in str(caught.value)
