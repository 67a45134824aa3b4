"""The whole program with metrics, and under a service manager, both as an operator has them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from vhostuser.measures import CONNECTIONS, MESSAGES
from vhostuser.metrics import value_in

COMMAND = [sys.executable, "-P", "-m", "vhostuser.tools.blk"]
GET_FEATURES = struct.pack("<III", 1, 1, 0)
# Longer than anything here takes; only a failing test waits for it.
PATIENCE = 20


class Program:
    """The program while it runs, and the manager that it tells."""

    def __init__(
        self, arguments: Sequence[str], notify: Path, passed: dict[str, socket.socket], **environ: str
    ) -> None:
        self.manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.manager.bind(str(notify))
        self.manager.settimeout(PATIENCE)
        fds = [sock.fileno() for sock in passed.values()]
        environ |= {"NOTIFY_SOCKET": str(notify), "LISTEN_FDS": str(len(fds)), "LISTEN_FDNAMES": ":".join(passed)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", ACTIVATE, json.dumps(fds), *COMMAND, *arguments],
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=fds,
            env={**os.environ, **environ},
        )
        self.ready = self.told()

    def told(self) -> str:
        return self.manager.recv(1000).decode()

    def line(self, pattern: str) -> re.Match[str]:
        """The first line of stderr from here that this is found in."""
        assert self.process.stderr is not None
        return next(found for line in self.process.stderr if (found := re.search(pattern, line)))

    def end(self) -> int:
        self.process.terminate()
        self.process.communicate(timeout=PATIENCE)
        return self.process.returncode


# Puts the descriptors where sd_listen_fds(3) wants them. In a process of its own, whose numbers are nobody else's.
ACTIVATE = """
import json, os, sys
fds = [os.dup2(fd, 100 + n) for n, fd in enumerate(json.loads(sys.argv[1]))]
for number, fd in enumerate(fds):
    os.dup2(fd, 3 + number)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.argv[2], sys.argv[2:])
"""


@pytest.fixture
def start(tmp_path: Path, image: Path) -> Iterator[Callable[..., Program]]:
    started: list[Program] = []

    def make(*arguments: str, passed: dict[str, socket.socket] | None = None, **environ: str) -> Program:
        options = [f"--blk-file={image}", *arguments]
        started.append(Program(options, tmp_path / f"n{len(started)}", passed or {}, **environ))
        return started[-1]

    yield make
    for program in started:
        program.process.kill()
        program.process.communicate()
        program.manager.close()


def fetch(where: str | tuple[str, int], path: str) -> str:
    family = socket.AF_UNIX if isinstance(where, str) else socket.AF_INET
    with socket.socket(family) as sock:
        sock.settimeout(PATIENCE)
        sock.connect(where)
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: here\r\n\r\n".encode())
        answer = b"".join(iter(lambda: sock.recv(65536), b"")).decode()
    head, _, body = answer.partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 200 OK\r\n")
    return body


def front_end(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(PATIENCE)
    sock.connect(str(path))
    sock.sendall(GET_FEATURES)
    assert struct.unpack("<III", sock.recv(20, socket.MSG_WAITALL)[:12]) == (1, 5, 8)
    return sock


def listener(path: Path, kind: int = socket.SOCK_STREAM) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, kind)
    sock.bind(str(path))
    sock.listen()
    return sock


# ---- metrics


def test_metrics_at_a_path_and_the_state_dump_have_the_same_numbers(
    start: Callable[..., Program], tmp_path: Path
) -> None:
    program = start(f"--socket-path={tmp_path}/s", f"--metrics=unix:{tmp_path}/m")
    with front_end(tmp_path / "s"):
        shown = json.loads(fetch(f"{tmp_path}/m", "/metrics.json"))
        assert value_in(shown, CONNECTIONS) == 1
        assert value_in(shown, MESSAGES, message="GET_FEATURES") == 1
        program.process.send_signal(signal.SIGUSR1)
        dumped = json.loads(program.line("^vhostuser-state: (.*)$")[1])["metrics"]
    assert dumped == shown
    assert (tmp_path / "m").stat().st_mode & 0o777 == 0o600
    assert program.end() == 0
    assert not (tmp_path / "m").exists()


def test_metrics_on_loopback_are_prometheus_text(start: Callable[..., Program], tmp_path: Path) -> None:
    program = start(f"--socket-path={tmp_path}/s", "--metrics=127.0.0.1:0")
    port = int(program.line(r"metrics at http://127\.0\.0\.1:(\d+)/metrics$")[1])
    families = {family.name for family in text_string_to_metric_families(fetch(("127.0.0.1", port), "/metrics"))}
    assert {"vhostuser_blk_requests", "vhostuser_queue_request_seconds", "vhostuser_connections"} <= families


def test_metrics_for_other_machines_have_to_be_asked_for(image: Path, tmp_path: Path) -> None:
    ended = run(f"--blk-file={image}", f"--socket-path={tmp_path}/s", "--metrics=0.0.0.0:0")
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert "--metrics-remote" in ended.stderr


def test_an_address_that_is_taken_is_a_failure(image: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = run(f"--blk-file={image}", f"--socket-path={tmp_path}/s", f"--metrics=127.0.0.1:{port}")
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
    assert f"port {port}: Address already in use" in ended.stderr
    assert not (tmp_path / "s").exists()


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=PATIENCE, check=False)


# ---- under a service manager


def test_sockets_are_taken_by_their_names(start: Callable[..., Program], tmp_path: Path) -> None:
    sockets = {
        "metrics": listener(tmp_path / "m"),
        "vhostuser-blk@0.socket": listener(tmp_path / "s"),
        "wake": listener(tmp_path / "w", socket.SOCK_SEQPACKET),
    }
    program = start(passed=sockets)
    for sock in sockets.values():
        sock.close()
    with front_end(tmp_path / "s"):
        assert value_in(json.loads(fetch(f"{tmp_path}/m", "/metrics.json")), CONNECTIONS) == 1
    environ = Path(f"/proc/{program.process.pid}/environ").read_bytes()
    assert b"LISTEN_PID=" in environ  # as it was started; what a child of ours would get is tested in test_manager.py
    assert program.end() == 0
    assert (tmp_path / "s").exists(), "the socket files are the manager's"


def test_a_socket_of_the_wrong_kind_is_a_failure(image: Path, tmp_path: Path) -> None:
    wrong = listener(tmp_path / "w")
    command = [sys.executable, "-c", ACTIVATE, json.dumps([wrong.fileno()]), *COMMAND]
    ended = subprocess.run(
        [*command, f"--blk-file={image}", f"--socket-path={tmp_path}/s"],
        env={**os.environ, "LISTEN_FDS": "1", "LISTEN_FDNAMES": "wake"},
        pass_fds=[wrong.fileno()],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    wrong.close()
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
    assert "not a listening socket of the kind that its name says" in ended.stderr


def test_the_manager_hears_of_every_state(start: Callable[..., Program], tmp_path: Path) -> None:
    program = start(f"--socket-path={tmp_path}/s")
    assert program.ready == "READY=1\nSTATUS=Waiting for a front-end"
    with front_end(tmp_path / "s"):
        assert program.told() == "STATUS=Serving 1 front-end"
    assert program.told() == "STATUS=Waiting for a front-end"
    program.process.terminate()
    assert program.told() == "STOPPING=1"


def test_the_manager_hears_that_the_control_thread_gets_on(start: Callable[..., Program], tmp_path: Path) -> None:
    program = start(f"--socket-path={tmp_path}/s", WATCHDOG_USEC="20000")
    assert [program.told() for _ in range(3)] == ["WATCHDOG=1"] * 3
    program.process.send_signal(signal.SIGSTOP)


BROKEN = """
import sys
from vhostuser.device import Device
from vhostuser.tools.service import Parser, serve

async def beside(device):
    raise ValueError("there was no reason")

serve(Parser("broken", ""), sys.argv[1:], lambda _: Device(), beside=beside)
"""


def test_what_runs_beside_may_fail_and_the_front_ends_are_served_on(tmp_path: Path) -> None:
    path = tmp_path / "s"
    command = [sys.executable, "-P", "-c", BROKEN, f"--socket-path={path}", "--once"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            assert any("has ended: there was no reason" in line for line in process.stderr)
            front_end(path).close()
            assert "the front-end has gone" in process.stderr.read()
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()


def test_every_line_of_the_log_names_the_socket(start: Callable[..., Program], tmp_path: Path) -> None:
    path = tmp_path / "s"
    program = start(f"--socket-path={path}", "--log-level=debug", f"--metrics=unix:{tmp_path}/m")
    with front_end(path) as sock:
        sock.sendall(b"\xff" * 12)
        assert sock.recv(1) == b""
    program.process.terminate()
    _, errors = program.process.communicate(timeout=PATIENCE)
    lines = errors.splitlines()
    assert len(lines) >= 4
    named = re.compile(rf"vhostuser-blk: \w+: {re.escape(str(path))}: ")
    assert [line for line in lines if not named.match(line)] == []
