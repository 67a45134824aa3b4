"""Guests that are closed at the end of the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.queue.guest import Guest


@pytest.fixture
def guests() -> Iterator[Callable[..., Guest]]:
    made: list[Guest] = []

    def make(*regions: tuple[int, int]) -> Guest:
        made.append(Guest(*regions))
        return made[-1]

    yield make
    for guest in made:
        guest.close()


@pytest.fixture
def guest(guests: Callable[..., Guest]) -> Guest:
    """1 MiB at 0, with 64 KiB right after it in another file, and 1 MiB far off."""
    return guests((0, 1 << 20), (1 << 20, 1 << 16), (1 << 32, 1 << 20))
