"""The kit as pytest fixtures. Load them with ``pytest_plugins = ["vhostuser.testing.plugin"]``, or ``-p``.

They are not loaded by themselves: their names are short, and a suite that wants none of them should not pay for them.
pytest-asyncio runs the tests that use ``pairs``, ``scripted_backend`` or ``scripted_frontend``.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
import pytest_asyncio

from vhostuser.backend import Backend
from vhostuser.device import Device
from vhostuser.frontend import Frontend, SharedMemory
from vhostuser.testing import leaks
from vhostuser.testing.pair import Pair, connect
from vhostuser.testing.peer import ScriptedPeer


@pytest.fixture
def no_leaks() -> Iterator[None]:
    """Fails the test if it leaves descriptors open. Name it first, so that it looks last."""
    with leaks.no_open_fds():
        yield


@pytest.fixture
def no_mappings() -> Iterator[None]:
    """Fails the test if it leaves files mapped. Name it first, so that it looks last.

    The kit's other fixtures let go of what they have mapped; a fixture of your own that holds a ring does not.
    """
    with leaks.no_mappings():
        yield


@pytest.fixture
def guest_memory() -> Iterator[Callable[..., SharedMemory]]:
    """Makes guest memories (the arguments are SharedMemory's) that are closed at the end of the test."""
    made: list[SharedMemory] = []

    def make(*regions: tuple[int, int], **options: object) -> SharedMemory:
        made.append(SharedMemory(*regions, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for memory in made:
        memory.close()


@pytest_asyncio.fixture
async def pairs() -> AsyncIterator[Callable[..., Pair]]:
    """Makes pairs (``pairs(device, **options of Backend)``) that are closed at the end of the test."""
    made: list[Pair] = []

    def make(device: Device | Callable[[], Device], **options: object) -> Pair:
        made.append(connect(device, **options))
        return made[-1]

    yield make
    for pair in made:
        await pair.close()


@pytest_asyncio.fixture
async def scripted_backend() -> AsyncIterator[tuple[Frontend, ScriptedPeer]]:
    """A Frontend, and the peer that answers it as the test says."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    async with Frontend(ours) as frontend, ScriptedPeer(theirs) as peer:
        yield frontend, peer
    await asyncio.sleep(0)  # what was under way ends


@pytest_asyncio.fixture
async def scripted_frontend() -> AsyncIterator[Callable[..., ScriptedPeer]]:
    """Makes peers that are the front-end of a device (``scripted_frontend(device, **options of Backend)``)."""
    made: list[tuple[ScriptedPeer, asyncio.Task[None]]] = []

    def make(device: Device | Callable[[], Device], **options: object) -> ScriptedPeer:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        backend = Backend(device, **options)  # type: ignore[arg-type]
        made.append((ScriptedPeer(ours), asyncio.ensure_future(backend.serve(theirs, "test"))))
        return made[-1][0]

    yield make
    for peer, serving in made:
        peer.close()
        await asyncio.wait([serving], timeout=10)
