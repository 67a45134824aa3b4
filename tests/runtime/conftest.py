"""Tests of the runtime run on asyncio and on uvloop."""

import asyncio
import errno
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path

import pytest
import uvloop

from tests.runtime.migration import PAGE, Migration
from vhostuser.device import Device
from vhostuser.testing.pair import Pair
from vhostuser.uffd import NotPermitted, Userfaultfd


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.fixture
def permitted() -> None:
    try:
        Userfaultfd.probe()
    except NotPermitted as error:
        pytest.skip(str(error))


@pytest.fixture(params=["table", "slots"])
async def migrations(
    request: pytest.FixtureRequest, pairs: Callable[..., Pair]
) -> AsyncIterator[Callable[..., Migration]]:
    made: list[Migration] = []

    def make(device: Device, **options: object) -> Migration:
        made.append(Migration(pairs(device, **options), slots=request.param == "slots"))
        return made[-1]

    yield make
    for migration in made:
        await migration.pair.close()
        migration.close()


@pytest.fixture
def image(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "disk"
    path.write_bytes(b"".join(bytes([page + 1]) * PAGE for page in range(64)))
    yield path


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes one function fail as with a full table of descriptors."""

    def fail(name: str) -> None:
        def raise_(*_: object, **__: object) -> None:
            raise OSError(errno.EMFILE, "Too many open files")

        monkeypatch.setattr(name, raise_)

    return fail
