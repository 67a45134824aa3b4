"""What every test with a real QEMU needs: the guest's image once, and a bench of its own for each test."""

from collections.abc import AsyncIterator, Generator

import pytest

from vhostuser.tools.lab.bench import Bench
from vhostuser.tools.lab.image import GuestImage, guest_image


@pytest.fixture(scope="session")
def image() -> GuestImage:
    return guest_image()


@pytest.fixture
async def bench(image: GuestImage) -> AsyncIterator[Bench]:
    async with Bench(image) as bench:
        yield bench


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failure is shown with what every process of the bench said last."""
    report = yield
    bench = getattr(item, "funcargs", {}).get("bench")
    if report.when == "call" and report.failed and bench is not None:
        report.sections.append(("the bench", bench.report()))
    return report
