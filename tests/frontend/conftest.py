"""A front-end and a scripted back-end, on asyncio and on uvloop."""

import asyncio
from collections.abc import Callable, Mapping

import pytest
import uvloop

from vhostuser.frontend import Frontend
from vhostuser.testing.peer import ScriptedPeer


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.fixture
def ends(no_leaks: None, scripted_backend: tuple[Frontend, ScriptedPeer]) -> tuple[Frontend, ScriptedPeer]:
    return scripted_backend


@pytest.fixture
def frontend(ends: tuple[Frontend, ScriptedPeer]) -> Frontend:
    return ends[0]


@pytest.fixture
def peer(ends: tuple[Frontend, ScriptedPeer]) -> ScriptedPeer:
    return ends[1]
