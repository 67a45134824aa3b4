"""The examples are programs by the back-end program conventions, and their ends find each other."""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vhostuser.frontend import Frontend

EXAMPLES = Path(__file__).parents[2] / "examples"
TYPES = {"ramdisk": "block", "rng": "rng", "keyboard": "input", "notebook": "fs", "echo": "virtio-63"}


def command(name: str, *arguments: str) -> list[str]:
    return [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments]


@pytest.mark.parametrize(("name", "kind"), TYPES.items())
def test_capabilities_are_printed_whatever_stands_beside(name: str, kind: str) -> None:
    said = subprocess.check_output(command(name, "--bogus", "--print-capabilities"), text=True)
    assert json.loads(said) == {"type": kind}


@contextmanager
def running(*words: str, fds: tuple[int, ...] = ()) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(words, pass_fds=fds, stderr=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.terminate()


@pytest.mark.parametrize("name", TYPES)
async def test_each_serves_a_passed_socket_and_ends_well(name: str) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs, running(*command(name, f"--fd={theirs.fileno()}", "--once"), fds=(theirs.fileno(),)) as process:
        async with Frontend(ours) as frontend:
            await frontend.negotiate()
        assert process.wait(20) == 0


def test_the_echo_is_asked_over_its_socket(tmp_path: Path) -> None:
    path = tmp_path / "echo.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        with running(*command("echo", f"--fd={listener.fileno()}"), fds=(listener.fileno(),)):
            for _ in range(2):
                said = subprocess.check_output(command("ask", str(path), "hello, device"), text=True, timeout=20)
                assert said == "hello, device\n"


@pytest.mark.parametrize("name", ["ask", *TYPES])
def test_an_example_is_short(name: str) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 150
