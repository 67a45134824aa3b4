"""Tests of the runtime run on asyncio and on uvloop."""

import asyncio
import errno
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path

import pytest
import uvloop

from tests.protocol import samples
from tests.runtime.echo import answer, ask
from tests.runtime.gadget import Gadget, Gadgets
from tests.runtime.migration import PAGE, Migration
from vhostuser.device import Device
from vhostuser.frontend import BackendRequests, BackendServices, ObjectRegistry
from vhostuser.testing.pair import Pair
from vhostuser.testing.peer import ScriptedPeer
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


@pytest.fixture
async def registry() -> AsyncIterator[ObjectRegistry]:
    made = ObjectRegistry()
    yield made
    made.close()


@pytest.fixture
async def gadgets(
    no_leaks: None, no_mappings: None, pairs: Callable[..., Pair], registry: ObjectRegistry
) -> AsyncIterator[Callable[..., object]]:
    """Makes gadgets whose ring 0 is started and running."""
    made: list[Gadgets] = []

    async def make() -> Gadgets:
        device = Gadget()
        pair = pairs(device)
        await pair.set_up()
        services = await pair.frontend.serve_requests(registry)
        made.append(Gadgets(pair, device, services))
        await ask(pair, b"abc")
        assert await answer(pair) == b"ABC"
        return made[-1]

    yield make
    for each in made:
        await each.pair.close()
        each.device.close()


@pytest.fixture
async def gadget(gadgets: Callable[..., object]) -> Gadgets:
    return await gadgets()  # type: ignore[misc,no-any-return]


@pytest.fixture
async def hearing(no_leaks: None, no_mappings: None) -> AsyncIterator[tuple[ScriptedPeer, BackendServices]]:
    """A scripted back-end's end of the channel, and our front-end's services."""
    session = samples.connect().front
    services = BackendServices((4 * PAGE, 0, 2 * PAGE), ObjectRegistry(), "us")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    requests = BackendRequests(ours, session.channel(), services, keep=False)
    async with ScriptedPeer(theirs) as peer:
        yield peer, services
    services.close()
    requests.close()
    await asyncio.sleep(0)
