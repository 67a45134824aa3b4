"""The command: sockets, what it prints, how it ends."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO

import pytest

from vhostuser.protocol import REPLY, U64, VERSION, encode
from vhostuser.protocol import FrontendRequest as F

COMMAND = [sys.executable, "-m", "vhostuser.tools.main", "trace"]
# Longer than anything here takes; only a failing test waits for it.
PATIENCE = 20
ASK = encode(F.GET_FEATURES, VERSION)
OFFER = encode(F.GET_FEATURES, VERSION | REPLY, U64(1 << 30))


@contextmanager
def tracing(directory: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A tracer that listens on `front` and connects to `back`."""
    command = [*COMMAND, f"--listen={directory / 'front'}", f"--connect={directory / 'back'}", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + PATIENCE
        while not (directory / "front").exists():
            assert process.poll() is None and time.monotonic() < deadline, "it does not listen"
            time.sleep(0.01)
        yield process
    finally:
        process.terminate()
        process.wait(PATIENCE)
        out(process).close()


def out(process: subprocess.Popen[str]) -> IO[str]:
    assert process.stdout is not None
    return process.stdout


def connected(path: Path) -> socket.socket:
    """Between its bind and its listen a socket is there already, and refuses."""
    deadline = time.monotonic() + PATIENCE
    while True:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(PATIENCE)
        try:
            sock.connect(str(path))
            return sock
        except ConnectionRefusedError:
            sock.close()
            assert time.monotonic() < deadline, "it does not listen"
            time.sleep(0.01)


@pytest.fixture
def backend(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.settimeout(PATIENCE)
        listener.bind(str(tmp_path / "back"))
        listener.listen()
        yield listener


def exchange(front: socket.socket, back: socket.socket) -> None:
    front.sendall(ASK)
    assert back.recv(100) == ASK
    back.sendall(OFFER)
    assert front.recv(100) == OFFER


def test_one_connection_as_text_and_json(tmp_path: Path, backend: socket.socket) -> None:
    with tracing(tmp_path, "--once", f"--json={tmp_path / 'json'}") as process:
        with closing(connected(tmp_path / "front")) as front, closing(backend.accept()[0]) as back:
            exchange(front, back)
        text = out(process).read()
        assert process.wait(PATIENCE) == 0
    assert "front-end -> GET_FEATURES\n" in text
    assert "): 0x40000000 PROTOCOL_FEATURES\n" in text
    lines = [json.loads(line) for line in (tmp_path / "json").read_text().splitlines()]
    assert [line["message"] for line in lines if line["event"] == "message"] == ["GET_FEATURES"] * 2
    assert not (tmp_path / "front").exists()


def test_who_waits_is_told_by_and_by_and_on_request(tmp_path: Path, backend: socket.socket) -> None:
    with tracing(tmp_path, "--patience=0.05") as process:
        with closing(connected(tmp_path / "front")) as front, closing(backend.accept()[0]):
            front.sendall(ASK)
            lines = iter(out(process).readline, "")
            assert next(line for line in lines if "the front-end has waited for" in line)
            process.send_signal(signal.SIGUSR1)
            assert next(line for line in lines if "as it stands:" in line)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 0


def test_a_back_end_that_is_not_there_is_told(tmp_path: Path) -> None:
    with tracing(tmp_path, "--once") as process, closing(connected(tmp_path / "front")) as front:
        assert front.recv(1) == b""
        assert "start the back-end first" in out(process).read()


def test_a_reader_that_goes_away_breaks_no_connection(tmp_path: Path, backend: socket.socket) -> None:
    with tracing(tmp_path) as process:
        out(process).close()
        with closing(connected(tmp_path / "front")) as front, closing(backend.accept()[0]) as back:
            for _ in range(100):
                exchange(front, back)


def test_packets_for_wireshark(tmp_path: Path, backend: socket.socket) -> None:
    """Each is in the file as soon as it has passed; the notices are none."""
    with tracing(tmp_path, "--once", "--quiet", f"--pcapng={tmp_path / 'packets'}") as process:
        with closing(connected(tmp_path / "front")) as front, closing(backend.accept()[0]) as back:
            exchange(front, back)
        assert process.wait(PATIENCE) == 0
    packets = (tmp_path / "packets").read_bytes()
    assert packets.startswith(b"\x0a\x0d\x0d\x0a")
    assert packets.count(ASK) == packets.count(OFFER) == 1


def test_a_transcript_is_drawn(tmp_path: Path, backend: socket.socket) -> None:
    with tracing(tmp_path, "--once", "--quiet", f"--json={tmp_path / 'json'}") as process:
        with closing(connected(tmp_path / "front")) as front, closing(backend.accept()[0]) as back:
            exchange(front, back)
        assert process.wait(PATIENCE) == 0
    done = subprocess.run([*COMMAND, f"--draw={tmp_path / 'json'}"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("<svg")
    assert ">GET_FEATURES<" in done.stdout


def test_what_is_no_transcript_is_not_drawn(tmp_path: Path) -> None:
    (tmp_path / "json").write_text("{}\n")
    done = subprocess.run([*COMMAND, f"--draw={tmp_path / 'json'}"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "is none of 'vhostuser trace --json'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_dissector_is_printed() -> None:
    done = subprocess.run([*COMMAND, "--dissector"], capture_output=True, text=True, check=True)
    assert "SET_MEM_TABLE" in done.stdout
    assert "wtap.USER0" in done.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--listen=x", "--connect=x"], "are the same socket"),
        (["--listen=x", "--connect=y", "--json=-", "--pcapng=-"], "cannot both be stdout"),
        (["--dissector", "--listen=x"], "not allowed with"),
        (["--listen=x"], "--connect"),
        (["--listen=x", "--connect=y", "--corrupt=NOTHING"], "there is no message 'NOTHING'"),
    ],
)
def test_wrong_options_are_one_line(options: list[str], words: str) -> None:
    done = subprocess.run([*COMMAND, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
