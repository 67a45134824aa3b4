"""``vhostuser-net`` with several sockets: who hears whom, who comes and goes, what is counted and told of whom."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.devices.interface import RECEIVED, SENT, Driver, frame
from vhostuser.devices.net import FRAMES
from vhostuser.frontend import Frontend
from vhostuser.measures import ACCEPTED
from vhostuser.metrics import value_in
from vhostuser.protocol import ProtocolFeature
from vhostuser.testing.pair import Pair

COMMAND = [sys.executable, "-P", "-m", "vhostuser.tools.net"]
# Longer than anything here takes; only a failing test waits for it.
PATIENCE = 20
NAMES = ("red", "green", "blue")
STATIONS = [bytes([2, 0, 0, 0, 0, number]) for number in range(3)]


class Guest(Driver):
    """A front-end with a driver; what its device forgets at its start is not waited for, its first frame is."""

    @classmethod
    async def at(cls, path: Path) -> Guest:
        guest = cls()
        guest.pair = Pair(None, await Frontend.connect(path), asyncio.ensure_future(asyncio.sleep(0)))  # type: ignore[arg-type]
        await guest.pair.set_up(rings=2)
        guest.drive(0, RECEIVED, SENT)
        guest.post()
        for ring in guest.pair.rings:
            ring.kick()
        guest.send(b"a runt")
        await guest.sent(1)
        return guest


class Program:
    """The program while it runs: its sockets are named by NAMES in the test's directory."""

    def __init__(self, process: Process, directory: Path) -> None:
        self.process = process
        self.paths = {name: directory / name for name in NAMES}
        self.lines: list[str] = []

    async def line(self, pattern: str) -> re.Match[str]:
        """The first line from here that this is found in."""
        assert self.process.stderr is not None
        async with asyncio.timeout(PATIENCE):
            while True:
                self.lines.append((await self.process.stderr.readline()).decode())
                assert self.lines[-1], "".join(self.lines)
                if found := re.search(pattern, self.lines[-1]):
                    return found

    async def states(self) -> dict[str, dict[str, Any]]:
        """Of each port, by its name."""
        self.process.send_signal(signal.SIGUSR1)
        state = json.loads((await self.line("vhostuser-state: (.*)")).group(1))
        return {Path(path).name: port for path, port in state["ports"].items()}

    async def end(self) -> int:
        self.process.terminate()
        async with asyncio.timeout(PATIENCE):
            return await self.process.wait()


Start = Callable[..., Coroutine[Any, Any, Program]]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """Starts the program with a socket for each of NAMES, or of those given; it listens when that returns."""
    async with AsyncExitStack() as stack:

        async def make(*arguments: str, names: tuple[str, ...] = NAMES, activated: bool = False) -> Program:
            manager = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
            manager.bind(str(tmp_path / "notify"))
            manager.setblocking(False)
            listeners = [stack.enter_context(listening(tmp_path / name)) for name in names] if activated else []
            command = (
                handing_over(listeners)
                if activated
                else [*COMMAND, *(f"--socket-path={tmp_path / name}" for name in names)]
            )
            process = await asyncio.create_subprocess_exec(
                *(*command, *arguments),
                stderr=PIPE,
                pass_fds=[listener.fileno() for listener in listeners],
                env={**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")},
            )
            stack.push_async_callback(ended, process)
            told = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(manager, 100), PATIENCE)
            assert told.startswith(b"READY=1")
            return Program(process, tmp_path)

        yield make


def listening(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    return listener


def handing_over(listeners: list[socket.socket]) -> list[str]:
    """A command that starts the program as a service manager does; by way of numbers that are in nobody's way."""
    program = (
        f"import os, sys; fds = [os.dup2(fd, 100 + n) for n, fd in enumerate({[s.fileno() for s in listeners]})];"
        "[os.dup2(fd, 3 + n) for n, fd in enumerate(fds)];"
        "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(fds)));"
        f"os.execv(sys.executable, {COMMAND!r} + sys.argv[1:])"
    )
    return [sys.executable, "-c", program]


async def ended(process: Process) -> None:
    if process.returncode is None:
        process.kill()
    await process.communicate()


async def test_three_guests_on_a_switch_one_of_which_goes_and_comes_back(start: Start) -> None:
    program = await start("--end=switch")
    guests = [await Guest.at(path) for path in program.paths.values()]
    for number, guest in enumerate(guests):
        guest.send(frame(60, number, source=STATIONS[number]))
        for other in guests:
            if other is not guest:
                assert [data[6:12] for _, data in await other.receive(1)] == [STATIONS[number]]
    assert [port["device"]["stations"] for port in (await program.states()).values()] == [1, 1, 1]
    guests[1].pair.frontend.close()
    await program.line("green: the front-end has gone")
    assert [port["device"]["stations"] for port in (await program.states()).values()] == [1, 0, 1]
    to_blue = frame(70, 1, STATIONS[2], STATIONS[0])
    guests[0].send(to_blue)
    assert [data for _, data in await guests[2].receive(1)] == [to_blue]
    again = await Guest.at(program.paths["green"])
    hello, answer = frame(80, 1, STATIONS[0], STATIONS[1]), frame(90, 1, STATIONS[1], STATIONS[0])
    again.send(hello)
    assert [data for _, data in await guests[0].receive(1)] == [hello]
    guests[0].send(answer)
    assert [data for _, data in await again.receive(1)] == [answer], "and nothing of the time before"
    for guest in (*guests, again):
        await guest.pair.close()
    assert await program.end() == 0


async def test_what_is_counted_and_told_of_each_port(start: Start, tmp_path: Path) -> None:
    program = await start("--end=peer", f"--metrics=unix:{tmp_path}/metrics", names=NAMES[:2])
    assert await program.line("postcopy is not offered: one process serves several front-ends")
    one, other = await Guest.at(program.paths["red"]), await Guest.at(program.paths["green"])
    assert not await one.pair.frontend.get_protocol_features() & ProtocolFeature.PAGEFAULT.mask
    one.send(*[frame(100)] * 5)
    await other.receive(5)
    await one.sent(5)
    states = await program.states()
    assert list(states) == ["red", "green"]
    assert states["red"]["device"]["end"] == f"{program.paths['red']}: peer"
    assert [value_in(states[name]["metrics"], FRAMES, queue=1) for name in states] == [5, 0]
    assert [value_in(states[name]["metrics"], FRAMES, queue=0) for name in states] == [0, 5]
    shown = await fetched(tmp_path / "metrics")
    for name, transmitted, received in (("red", 5, 0), ("green", 0, 5)):
        path = program.paths[name]
        assert f'{FRAMES.name}{{queue="1",socket="{path}"}} {transmitted}' in shown
        assert f'{FRAMES.name}{{queue="0",socket="{path}"}} {received}' in shown
        assert f'{ACCEPTED.name}{{socket="{path}"}} 1' in shown
    assert shown.count(f"# TYPE {FRAMES.name} ") == 1
    for guest in (one, other):
        await guest.pair.close()
    await program.end()
    assert program.process.stderr is not None
    rest = (await program.process.stderr.read()).decode().splitlines()
    for line in (*program.lines, *rest):
        named = any(str(path) in line for path in program.paths.values()) or str(tmp_path / "metrics") in line
        assert named or "postcopy is not offered" in line, line


async def fetched(path: Path) -> str:
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: here\r\n\r\n")
    answer = (await asyncio.wait_for(reader.read(), PATIENCE)).decode()
    writer.close()
    return answer.replace("\\\\", "\\")


async def test_it_ends_when_the_first_front_end_of_every_port_has_gone(start: Start) -> None:
    program = await start("--end=switch", "--once", names=NAMES[:2])
    one, other = await Guest.at(program.paths["red"]), await Guest.at(program.paths["green"])
    await one.pair.close()
    await program.line("red: the front-end has gone")
    other.send(frame(60))
    await other.sent(1)
    await other.pair.close()
    async with asyncio.timeout(PATIENCE):
        assert await program.process.wait() == 0


async def test_a_service_manager_may_pass_a_socket_for_each_port_and_one_file_records_them_all(
    start: Start, tmp_path: Path
) -> None:
    program = await start("--end=peer", f"--pcap={tmp_path}/all", names=NAMES[:2], activated=True)
    one, other = await Guest.at(program.paths["red"]), await Guest.at(program.paths["green"])
    one.send(frame(100))
    assert [data for _, data in await other.receive(1)] == [frame(100)]
    for guest in (one, other):
        await guest.pair.close()
    assert await program.end() == 0
    recorded = (tmp_path / "all").read_bytes()
    assert all(str(program.paths[name]).encode() in recorded for name in NAMES[:2])
    assert recorded.count(frame(100)) == 2, "sent by one, received by the other"
