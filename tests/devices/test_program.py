"""``vhostuser-blk`` follows the back-end program conventions: options, exit statuses, sockets, signals, readiness."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from vhostuser import measures
from vhostuser.devices.blk import REQUESTS
from vhostuser.driverqueue import DriverQueue
from vhostuser.frontend import Frontend, FrontendRing, SharedMemory
from vhostuser.protocol import FrontendRequest, PostcopyAck, ProtocolFeature

COMMAND = [sys.executable, "-m", "vhostuser.tools.blk"]
GET_FEATURES = struct.pack("<III", 1, 1, 0)
# Longer than anything here takes; only a failing test waits for it.
PATIENCE = 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    return image


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s"


def run(*arguments: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Runs the program to its end."""
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=PATIENCE, check=False, **settings
    )


class Program:
    """The program while it runs; ready when the constructor returns."""

    def __init__(
        self, arguments: Sequence[str], notify: Path, *, command: Sequence[str] = (), fds: tuple[int, ...] = ()
    ):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.bind(str(notify))
            manager.settimeout(PATIENCE)
            self.process = subprocess.Popen(
                [*(command or COMMAND), *arguments],
                stderr=subprocess.PIPE,
                text=True,
                pass_fds=fds,
                env={**os.environ, "NOTIFY_SOCKET": str(notify)},
            )
            assert manager.recv(100) == b"READY=1\nSTATUS=Waiting for a front-end"
        notify.unlink()

    def end(self, number: signal.Signals | None = None) -> tuple[int, str]:
        """Waits for the end, after a signal if one is given; exit status and what stderr held."""
        if number is not None:
            self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, errors


@pytest.fixture
def start(tmp_path: Path, disk: Path) -> Iterator[Callable[..., Program]]:
    """Starts the program on the disk with these options."""
    started: list[Program] = []

    def make(*arguments: str, **settings: Any) -> Program:
        options = [f"--blk-file={disk}", *arguments]
        started.append(Program(options, tmp_path / "notify", **settings))
        return started[-1]

    yield make
    for program in started:
        program.process.kill()
        program.process.communicate()


def answers(sock: socket.socket) -> bool:
    """Whether a back-end is at the other end."""
    sock.settimeout(PATIENCE)
    sock.sendall(GET_FEATURES)
    reply = sock.recv(20, socket.MSG_WAITALL)
    return struct.unpack("<III", reply[:12]) == (1, 5, 8)


def front_end(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(path))
    return sock


# ---- options


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "--blk-file"),
        (["--blk-file=DISK"], "--socket-path"),
        (["--blk-file=DISK", "--socket-path=s", "--fd=3"], "not allowed with"),
        (["--blk-file=DISK", "--fd=3", "--connect"], "--connect"),
        (["--blk-file=DISK", "--sock=s"], "--sock=s"),
        (["--blk-file=DISK", "--socket-path=s", "--bogus"], "--bogus"),
        (["--blk-file=DISK", "--socket-path=s", "stray"], "stray"),
        (["--blk-file=DISK", "--socket-path=s", "--num-queues=0"], "1 to 256"),
        (["--blk-file=DISK", "--socket-path=s", "--num-queues=many"], "1 to 256"),
        (["--blk-file=DISK", "--socket-path=s", "--queue-size=100"], "power of two"),
        (["--blk-file=DISK", "--socket-path=s", "--queue-size=65536"], "32768"),
        (["--blk-file=DISK", "--socket-path=s", "--block-size=511"], "power of two"),
        (["--blk-file=DISK", "--socket-path=s", "--serial=123456789012345678901"], "20"),
        (["--blk-file=DISK", "--socket-path=s", "--serial=\u00e4"], "ASCII"),
        (["--blk-file=DISK", "--socket-path=s", "--cache=none"], "writeback"),
        (["--blk-file=DISK", "--socket-path=s", "--log-level=loud"], "info"),
        (["--blk-file=DISK", "--socket-path=s", "--postcopy=sometimes"], "auto"),
        (["--blk-file=DISK", "--socket-path=s", "--mem-slots=510"], "509"),
        (["--blk-file=DISK", "--socket-path=s", "--poll-us=-1"], "0 to"),
        (["--blk-file=DISK", "--socket-path=s", "--socket-mode=rw"], "octal"),
        (["--blk-file=DISK", "--socket-path=s", "--socket-mode=1777"], "octal"),
        (["--blk-file=DISK", "--socket-path=s", "--socket-group=no such group"], "no such group"),
        (["--blk-file=DISK", "--socket-path=s", "--socket-group=4294967295"], "no group"),
        (["--blk-file=DISK", "--fd=x"], "number"),
        (["--blk-file=DISK", "--fd=-1"], "number"),
    ],
)
def test_wrong_options_are_one_line_and_status_2(arguments: list[str], word: str, disk: Path) -> None:
    ended = run(*(argument.replace("DISK", str(disk)) for argument in arguments))
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("vhostuser-blk: ")
    assert word in ended.stderr
    assert not ended.stdout


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--blk-file=none", "--socket-path=s"], "No such file"),
        (["--blk-file=/", "--socket-path=s"], "directory"),
        (["--blk-file=/dev/zero", "--socket-path=s"], "neither a regular file"),
        (["--blk-file=DISK", "--socket-path=no/such/directory/s"], "No such file"),
        (["--blk-file=DISK", "--socket-path=" + "x" * 108], "107"),
        (["--blk-file=DISK", "--fd=99"], "Bad file descriptor"),
        (["--blk-file=DISK", "--fd=0"], "not a socket"),
    ],
)
def test_what_cannot_work_is_one_line_and_status_1(arguments: list[str], word: str, disk: Path, tmp_path: Path) -> None:
    options = [argument.replace("DISK", str(disk)) for argument in arguments]
    ended = run(*options, cwd=tmp_path, stdin=subprocess.DEVNULL, env=env())
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("vhostuser-blk: ")
    assert word in ended.stderr
    assert not {entry.name for entry in tmp_path.iterdir()} - {"disk.img"}


def env() -> dict[str, str]:
    """For another working directory: the package is found where this test finds it."""
    return {**os.environ, "PYTHONPATH": str(Path.cwd())}


def test_an_image_that_does_not_fit_its_blocks_says_what_would(disk: Path) -> None:
    os.truncate(disk, 4096 + 512)
    ended = run(f"--blk-file={disk}", "--socket-path=s", "--block-size=4096")
    assert ended.returncode == 1
    assert "8192" in ended.stderr


@pytest.mark.parametrize("beside", [[], ["--bogus", "--fd=nonsense", "stray"], ["--socket-path=/nowhere/s"]])
def test_capabilities_are_printed_whatever_stands_beside(beside: list[str]) -> None:
    ended = run(*beside, "--print-capabilities")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == '{"type": "block", "features": ["read-only", "blk-file"]}\n'


def test_capabilities_need_neither_the_compiled_module_nor_a_dependency() -> None:
    program = (
        "import sys; sys.modules.update({'vhostuser._native': None, 'cffi': None, 'construct': None, 'asyncio': None});"
        "from vhostuser.tools.blk import main; main(['--print-capabilities'])"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (ended.returncode, json.loads(ended.stdout)["type"]) == (0, "block")


def test_the_descriptor_for_management_software_says_the_same(request: pytest.FixtureRequest) -> None:
    descriptor = json.loads((request.config.rootpath / "share/50-vhostuser-blk.json").read_text())
    assert descriptor["type"] == "block"
    assert Path(descriptor["binary"]).is_absolute()


# ---- the socket file


def test_the_socket_belongs_to_its_owner_and_goes_with_the_program(start: Callable[..., Program], path: Path) -> None:
    program = start(f"--socket-path={path}")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with closing(front_end(path)) as sock:
        assert answers(sock)
    status, errors = program.end(signal.SIGTERM)
    assert status == 0
    assert not path.exists()
    assert not Path(f"{path}.lock").exists()
    assert all(line.startswith("vhostuser-blk: ") and str(path) in line for line in errors.splitlines())


def test_group_and_mode_of_the_socket_are_settable(start: Callable[..., Program], path: Path) -> None:
    start(f"--socket-path={path}", "--socket-mode=0660", f"--socket-group={os.getegid()}")
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    assert path.stat().st_gid == os.getegid()


def test_a_dead_socket_is_replaced(start: Callable[..., Program], path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        dead.listen()
    start(f"--socket-path={path}")
    with closing(front_end(path)) as sock:
        assert answers(sock)


def test_the_socket_of_one_that_was_killed_is_replaced(start: Callable[..., Program], path: Path) -> None:
    start(f"--socket-path={path}").end(signal.SIGKILL)
    assert path.exists()
    start(f"--socket-path={path}")
    with closing(front_end(path)) as sock:
        assert answers(sock)


def test_a_live_socket_is_never_taken(path: Path, disk: Path) -> None:
    with socket.socket(socket.AF_UNIX) as live:
        live.bind(str(path))
        live.listen(0)
        before = path.stat().st_ino
        for _ in range(3):  # the second finds the backlog full
            ended = run(f"--blk-file={disk}", f"--socket-path={path}")
            assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
            assert "listens" in ended.stderr
        assert path.stat().st_ino == before


def test_a_second_instance_is_refused(start: Callable[..., Program], path: Path, disk: Path) -> None:
    start(f"--socket-path={path}")
    ended = run(f"--blk-file={disk}", f"--socket-path={path}")
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
    assert "another process serves it" in ended.stderr
    with closing(front_end(path)) as sock:
        assert answers(sock)


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_another_kind_of_file_is_never_touched(path: Path, disk: Path, kind: str) -> None:
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(disk)
    ended = run(f"--blk-file={disk}", f"--socket-path={path}")
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
    assert "not a socket" in ended.stderr
    assert (kind == "directory" and path.is_dir()) or path.read_bytes()
    assert not Path(f"{path}.lock").exists()


# ---- inherited sockets


def test_fd_may_be_a_listening_socket(start: Callable[..., Program], path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        program = start(f"--fd={listener.fileno()}", fds=(listener.fileno(),))
    for _ in range(2):
        with closing(front_end(path)) as sock:
            assert answers(sock)
    assert program.end(signal.SIGTERM)[0] == 0
    assert path.exists(), "the socket file is not ours"


def test_fd_may_be_a_connected_socket_and_its_end_is_the_programs(start: Callable[..., Program]) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        program = start(f"--fd={theirs.fileno()}", fds=(theirs.fileno(),))
    assert answers(ours)
    ours.close()
    assert program.end()[0] == 0


def test_fd_that_is_neither_is_refused(disk: Path) -> None:
    for sock, word in (
        (socket.socket(socket.AF_UNIX), "neither listening nor connected"),
        (socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM), "not a Unix stream socket"),
        (socket.socket(socket.AF_INET), "not a Unix stream socket"),
    ):
        with sock:
            ended = run(f"--blk-file={disk}", f"--fd={sock.fileno()}", pass_fds=(sock.fileno(),))
        assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
        assert word in ended.stderr


def activated(fd: int, count: int) -> list[str]:
    """A command that hands over ``fd`` as a service manager does."""
    program = (
        f"import os, sys; os.dup2({fd}, 3); os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='{count}');"
        "os.execv(sys.executable, [sys.executable, '-m', 'vhostuser.tools.blk', *sys.argv[1:]])"
    )
    return [sys.executable, "-c", program]


def test_a_service_manager_may_pass_the_socket(start: Callable[..., Program], path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        start(command=activated(listener.fileno(), 1), fds=(listener.fileno(),))
    with closing(front_end(path)) as sock:
        assert answers(sock)


def test_a_service_manager_passes_one_socket(disk: Path) -> None:
    ended = subprocess.run(
        [*activated(0, 2), f"--blk-file={disk}"], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
    assert "2 sockets" in ended.stderr


# ---- connecting, once


def test_it_connects_again_and_again(start: Callable[..., Program], path: Path) -> None:
    program = start(f"--socket-path={path}", "--connect")  # nobody listens yet
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(PATIENCE)
        for _ in range(2):
            sock, _ = listener.accept()
            with sock:
                assert answers(sock)
    assert program.end(signal.SIGTERM)[0] == 0
    assert path.exists(), "the socket file is not ours"


@pytest.mark.parametrize("mode", ["listen", "connect"])
def test_once_means_one_front_end(start: Callable[..., Program], path: Path, mode: str) -> None:
    if mode == "listen":
        program = start(f"--socket-path={path}", "--once")
        sock = front_end(path)
    else:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen()
            program = start(f"--socket-path={path}", "--once", "--connect")
            sock, _ = listener.accept()
    with sock:
        assert answers(sock)
    assert program.end()[0] == 0


# ---- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("connected", [False, True])
def test_term_and_int_are_a_clean_end(
    start: Callable[..., Program], path: Path, number: signal.Signals, connected: bool
) -> None:
    program = start(f"--socket-path={path}")
    with closing(front_end(path)) as sock:
        assert not connected or answers(sock)
        status, errors = program.end(number)
    assert status == 0
    assert "Traceback" not in errors
    assert not path.exists()


def test_hangup_is_ignored_and_usr1_shows_the_state(start: Callable[..., Program], path: Path, disk: Path) -> None:
    program = start(f"--socket-path={path}", "--num-queues=2", "--serial=here")
    program.process.send_signal(signal.SIGHUP)
    with closing(front_end(path)) as sock:
        assert answers(sock)
        program.process.send_signal(signal.SIGUSR1)
        assert program.process.stderr is not None
        line = next(line for line in program.process.stderr if line.startswith("vhostuser-state: "))
    state = json.loads(line.removeprefix("vhostuser-state: "))
    assert state["device"]["image"] == str(disk)
    assert state["connections"][0]["socket"] == str(path)
    assert len(state["connections"][0]["rings"]) == 2
    assert {metric.name for metric in (REQUESTS, measures.MESSAGES, measures.BLOCKED)} <= state["metrics"].keys()
    assert program.end(signal.SIGTERM)[0] == 0


def test_readiness_is_told_to_an_abstract_socket_too(path: Path, disk: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        name = f"\0vhostuser-test-{os.getpid()}"
        manager.bind(name)
        manager.settimeout(PATIENCE)
        with subprocess.Popen(
            [*COMMAND, f"--blk-file={disk}", f"--socket-path={path}"],
            env={**os.environ, "NOTIFY_SOCKET": "@" + name[1:]},
            stderr=subprocess.DEVNULL,
        ) as process:
            assert manager.recv(100).split(b"\n")[0] == b"READY=1"
            process.terminate()
            assert manager.recv(100) == b"STOPPING=1"


# ---- postcopy


@pytest.mark.postcopy
@pytest.mark.parametrize("number", [signal.SIGTERM, None])
async def test_a_thread_that_waits_for_a_page_holds_up_neither_the_end_nor_the_next_front_end(
    start: Callable[..., Program], path: Path, number: signal.Signals | None
) -> None:
    program = start(f"--socket-path={path}")
    memory = SharedMemory((0, 1 << 20))
    async with await Frontend.connect(str(path)) as frontend:
        await frontend.negotiate()
        if not frontend.session.has(ProtocolFeature.PAGEFAULT):
            pytest.skip("userfaultfd is not permitted here")
        _, fds = await frontend.request(FrontendRequest.POSTCOPY_ADVISE)
        await frontend.request(FrontendRequest.POSTCOPY_LISTEN)
        await frontend.set_memory(memory)
        await frontend.request(FrontendRequest.POSTCOPY_ACK, PostcopyAck())
        ring = FrontendRing(0, DriverQueue(memory.map, 0, 16))
        memory.map.write(0x8000, struct.pack("<IIQ", 0, 0, 0))
        # The data lies in pages that are nowhere, and nobody brings them.
        ring.queue.offer([(0x8000, 16)], [(0x10000, 8192), (0x8010, 1)])
        ring.queue.publish()
        await frontend.start_ring(ring, memory)
        ring.kick()
        assert (await asyncio.to_thread(select.select, [fds[0]], [], [], PATIENCE))[0], "it does not wait"
        if number:
            status, errors = await asyncio.to_thread(program.end, number)
            assert (status, "Traceback" in errors) == (0, False)
    if not number:
        with closing(front_end(path)) as sock:
            assert await asyncio.to_thread(answers, sock)
        assert program.end(signal.SIGTERM)[0] == 0
    assert os.fstat(memory.fds[0]).st_blocks <= 9 * 8, "pages were made up"
    fds.close()
    ring.close()
    memory.close()
