"""A tracer between two ends that the tests hold, on asyncio and on uvloop."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field

import pytest
import pytest_asyncio
import uvloop

from vhostuser.tools.trace.events import Event, Passed, Seen
from vhostuser.tools.trace.faults import Fault, Faults
from vhostuser.tools.trace.observer import Observer
from vhostuser.tools.trace.relay import Session


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@dataclass
class Traced:
    """A session of the tracer and its outer ends, which belong to whoever takes them. seen: what it has reported."""

    frontend: socket.socket
    backend: socket.socket
    seen: list[Seen] = field(default_factory=list)
    task: asyncio.Task[None] | None = None

    def events(self) -> list[Event]:
        """What an observer says of it."""
        observer = Observer()
        return [event for seen in self.seen for event in observer.see(seen)]

    def passed(self) -> list[Passed]:
        return [event for event in self.events() if isinstance(event, Passed)]

    def names(self) -> list[str]:
        return [event.message.name for event in self.passed()]

    async def over(self) -> None:
        """Waits for its end."""
        assert self.task is not None
        await asyncio.wait_for(self.task, 5)


@pytest_asyncio.fixture
async def traced(no_leaks: None) -> AsyncIterator[Callable[..., Traced]]:
    """Starts tracers (``traced(faults)``); their ends are closed at the end of the test."""
    made: list[Traced] = []

    def make(faults: Sequence[Fault] = ()) -> Traced:
        (front, near), (far, back) = (socket.socketpair() for _ in range(2))
        made.append(Traced(front, back))
        seen = made[-1].seen
        session = Session(1, lambda look: seen.append(look()), Faults(faults))
        made[-1].task = asyncio.ensure_future(session.run(near, far))
        return made[-1]

    yield make
    for one in made:
        one.frontend.close()
        one.backend.close()
        await one.over()
    await asyncio.sleep(0)  # what was under way ends
