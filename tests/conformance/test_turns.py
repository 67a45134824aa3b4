"""Every broken peer has its turn."""

from tests.conformance.turns import whole

NAMES = [f"fault {number}" for number in range(10)]


def test_others_have_their_turn_every_day_until_all_had_it() -> None:
    days = [whole(NAMES, "4", day) for day in range(3)]
    assert [len(day) for day in days] == [4, 4, 4]
    assert not days[0] & days[1]
    assert frozenset().union(*days) == set(NAMES)


def test_all_and_none() -> None:
    assert whole(NAMES, "all", 3) == set(NAMES) == whole(NAMES, "99", 3)
    assert whole(NAMES, "0", 3) == frozenset() == whole([], "4", 3)
