"""Fixtures that several groups of tests share, beside the public ones (``vhostuser.testing.plugin``)."""

from collections.abc import Iterator
from pathlib import Path

import pytest

HUGE_PAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")


@pytest.fixture(scope="session")
def huge_pages() -> Iterator[None]:
    """64 huge pages of 2 MiB that nobody else uses, for this session."""
    free = HUGE_PAGES / "free_hugepages"
    total = HUGE_PAGES / "nr_hugepages"
    if not HUGE_PAGES.exists():
        pytest.skip("the kernel has no huge pages of 2 MiB")
    before, wanted = int(total.read_text()), 64
    if int(free.read_text()) < wanted:
        try:
            total.write_text(str(before + wanted))
        except OSError as error:
            pytest.skip(f"too few free huge pages and no right to add some: {error.strerror}")
    if int(free.read_text()) < wanted:
        pytest.skip(f"there is no memory for {wanted} huge pages")
    yield
    if int(total.read_text()) == before + wanted:
        total.write_text(str(before))
