"""What a service manager passes in the environment and is told: sd_listen_fds(3), sd_notify(3)."""

import os
import socket
from collections.abc import Iterator

import pytest

from vhostuser.tools.manager import METRICS, USERFAULTFD, WAKE, Manager

PID = str(os.getpid())


def test_nothing_is_passed_by_an_empty_environment() -> None:
    manager = Manager({})
    assert (manager.sockets(), manager.take(METRICS), manager.watchdog) == ([], None, 0)
    manager.tell("READY=1")


def test_descriptors_go_by_their_names_and_the_variables_are_gone() -> None:
    environ = {
        "LISTEN_PID": PID,
        "LISTEN_FDS": "4",
        "LISTEN_FDNAMES": "metrics:blk.socket:userfaultfd:wake",
        "NOTIFY_SOCKET": "/nowhere",
        "WATCHDOG_USEC": "3000000",
        "WATCHDOG_PID": PID,
        "HOME": "/root",
    }
    manager = Manager(environ)
    assert environ == {"HOME": "/root"}
    assert manager.sockets() == [4]
    assert [manager.take(role) for role in (METRICS, USERFAULTFD, WAKE)] == [3, 5, 6]
    assert manager.take(METRICS) is None, "it belongs to whoever took it"
    assert manager.watchdog == 3.0


@pytest.mark.parametrize(
    ("variables", "sockets"),
    [
        ({"LISTEN_FDS": "2"}, [3, 4]),
        ({"LISTEN_FDS": "2", "LISTEN_FDNAMES": "metrics"}, [4]),
        ({"LISTEN_FDS": "1", "LISTEN_FDNAMES": "a:b:c"}, [3]),
        ({"LISTEN_FDS": "0"}, []),
        ({"LISTEN_FDS": "-1"}, []),
        ({"LISTEN_FDS": "many"}, []),
        ({"LISTEN_FDS": "99999999999999999999999"}, []),
        ({"LISTEN_FDS": "9999999"}, []),
        ({"LISTEN_FDS": "1", "LISTEN_PID": "1"}, []),
        ({"LISTEN_FDS": "1", "LISTEN_PID": ""}, []),
    ],
)
def test_what_is_passed(variables: dict[str, str], sockets: list[int]) -> None:
    environ = {"LISTEN_PID": PID, **variables}
    assert Manager(environ).sockets() == sockets
    assert environ == {}


@pytest.mark.parametrize(
    ("variables", "seconds"),
    [
        ({"WATCHDOG_USEC": "500000"}, 0.5),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": "1"}, 0),
        ({"WATCHDOG_USEC": "soon"}, 0),
    ],
)
def test_the_watchdog(variables: dict[str, str], seconds: float) -> None:
    assert Manager(dict(variables)).watchdog == seconds


@pytest.fixture(params=["a path", "abstract"])
def listening(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        path = str(tmp_path_factory.mktemp("n") / "s")
        sock.bind(path if request.param == "a path" else f"\0vhostuser-{PID}")
        sock.settimeout(10)
        yield sock


def named(sock: socket.socket) -> str:
    name = sock.getsockname()
    return name if isinstance(name, str) else "@" + name[1:].decode()


def test_it_is_told(listening: socket.socket) -> None:
    Manager({"NOTIFY_SOCKET": named(listening)}).tell("READY=1", "STATUS=Here", wait=True)
    assert listening.recv(100) == b"READY=1\nSTATUS=Here"


def test_a_manager_that_reads_nothing_holds_nobody_up(listening: socket.socket) -> None:
    manager = Manager({"NOTIFY_SOCKET": named(listening)})
    for _ in range(10_000):  # more than the socket takes
        manager.tell("STATUS=" + "x" * 1000)


@pytest.mark.parametrize("path", ["/nowhere/at/all", "vsock:2:1234", "relative", "@nobody", "/" + "x" * 200])
def test_a_manager_that_is_not_there_is_no_reason_to_fail(path: str) -> None:
    Manager({"NOTIFY_SOCKET": path}).tell("READY=1", wait=True)
