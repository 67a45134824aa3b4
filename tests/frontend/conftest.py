"""A front-end and a scripted back-end, on asyncio and on uvloop."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Mapping

import pytest
import uvloop

from vhostuser.frontend import Frontend
from vhostuser.testing.peer import ScriptedPeer


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.fixture
async def ends(no_leaks: None) -> AsyncIterator[tuple[Frontend, ScriptedPeer]]:
    ours, theirs = socket.socketpair()
    async with Frontend(ours) as frontend, ScriptedPeer(theirs) as peer:
        yield frontend, peer
    await asyncio.sleep(0)  # cancelled tasks close what they hold
    await asyncio.sleep(0)


@pytest.fixture
def frontend(ends: tuple[Frontend, ScriptedPeer]) -> Frontend:
    return ends[0]


@pytest.fixture
def peer(ends: tuple[Frontend, ScriptedPeer]) -> ScriptedPeer:
    return ends[1]
