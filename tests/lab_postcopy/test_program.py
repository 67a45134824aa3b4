"""The program as its users meet it: our own back-end passes in every way, wrong options are told in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from vhostuser.tools.main import TOOLS
from vhostuser.tools.postcopy.rules import RULES

OWN = f"{sys.executable} -m vhostuser.tools.blk --socket-path={{socket}} --blk-file={{disk}} --log-level=error"
SMALL = ("--quiet", "--memory=4", "--patience=2")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vhostuser.tools.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=50)


def postcopy(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run("postcopy", *SMALL, *arguments)


def runs_of(*arguments: str) -> list[dict[str, Any]]:
    """The runs of a command that has to pass."""
    done = postcopy("--json", *arguments)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    found = json.loads(done.stdout)
    assert found["passed"]
    runs: list[dict[str, Any]] = found["runs"]
    return runs


needs_uffd = [pytest.mark.postcopy, pytest.mark.usefixtures("permitted")]


# ---- our own back-end passes


class TestOurs:
    pytestmark = needs_uffd

    @pytest.mark.parametrize("clients", [1, 2])
    @pytest.mark.parametrize("flow", ["table", "regions"])
    def test_it_passes_in_both_flows(self, flow: str, clients: int) -> None:
        (found,) = runs_of(f"--flow={flow}", f"--clients={clients}", "--seed=7")
        assert set(found["checks"].values()) == {"ok"}
        assert found["requests"]["completed"] == found["requests"]["planned"]
        assert len(found["clients"]) == clients
        assert all(client["faults"] > 10 for client in found["clients"])
        assert found["pages"] == 4 << 20 >> 12

    @pytest.mark.parametrize("clients", [1, 2])
    def test_it_passes_with_huge_pages(self, huge_pages: None, clients: int) -> None:
        (found,) = runs_of("--page-size=2M", "--memory=24", "--order=none", "--requests=200", f"--clients={clients}")
        assert all(client["faults"] >= 1 for client in found["clients"])  # one may find what the other has asked for
        assert found["pages"] == 12

    def test_every_wake_policy_passes_and_only_broadcast_wakes_those_who_do_not_wait(self) -> None:
        runs = runs_of("--wake=broadcast,demand,batch,channel", "--clients=2", "--order=random")
        assert [found["label"].split(", ")[1] for found in runs] == ["broadcast", "demand", "batch", "channel"]
        spurious = [sum(client["spurious_wakes"] for client in found["clients"]) for found in runs]
        assert spurious[0] > 500
        assert spurious[1:] == [0, 0, 0]

    def test_nothing_comes_unless_it_is_asked_for(self) -> None:
        (found,) = runs_of("--order=none")
        (client,) = found["clients"]
        assert client["faults"] > 500

    def test_a_slow_source_slows_the_faults(self) -> None:
        (found,) = runs_of("--latency=2000", "--bandwidth=50", "--requests=40", "--order=none")
        assert found["clients"][0]["fault_to_wake_us"]["50 %"] >= 2000

    @pytest.mark.parametrize("placement", ["copy", "continue"])
    def test_several_streams_bring_pages_side_by_side(self, placement: str) -> None:
        (found,) = runs_of("--streams=4", "--bandwidth=20", "--latency=500", f"--placement={placement}")
        assert found["settings"]["source"].startswith("4 x 20 MiB/s, 500 us")
        assert found["clients"][0]["faults"] > 10

    def test_descriptors_may_lie_in_indirect_tables(self) -> None:
        (direct,) = runs_of("--order=none")
        (indirect,) = runs_of("--order=none", "--indirect")
        assert indirect["requests"]["completed"] > 100
        assert indirect["clients"][0]["faults"] > 100
        assert direct["settings"] != indirect["settings"]

    @pytest.mark.parametrize("flow", ["table", "regions"])
    def test_regions_may_lie_in_one_file(self, flow: str) -> None:
        (found,) = runs_of("--one-file", "--regions=4", f"--flow={flow}")
        assert found["clients"][0]["faults"] > 10

    def test_the_same_seed_makes_the_same_requests(self) -> None:
        one, again, other = (runs_of(f"--seed={seed}", "--order=none")[0]["requests"]["bytes"] for seed in (1, 1, 2))
        assert one == again != other

    def test_a_stop_ends_the_back_end_and_leaves_no_files(self, tmp_path: Path) -> None:
        command = [sys.executable, "-m", "vhostuser.tools.main", "postcopy", "--memory=4", "--duration=60"]
        environment = os.environ | {"TMPDIR": str(tmp_path)}
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
            assert process.stderr is not None
            while b"pages come" not in process.stderr.readline():
                assert process.poll() is None
            process.terminate()
            process.communicate(timeout=10)
        assert process.returncode == 128 + 15
        assert not list(tmp_path.iterdir())

    def test_pages_of_zeros_are_placed_without_data(self) -> None:
        (found,) = runs_of("--zeros=50")
        assert 0.4 * found["pages"] < found["zero_pages"] < 0.5 * found["pages"]
        assert not found["findings"]

    def test_requests_go_on_for_as_long_as_it_was_asked_for(self) -> None:
        (found,) = runs_of("--duration=0.5", "--requests=10")
        assert found["requests"]["completed"] > 10 * found["requests"]["planned"]

    def test_one_that_runs_already_can_be_tried(self, tmp_path: Path) -> None:
        socket, disk = tmp_path / "s", tmp_path / "d"
        disk.write_bytes(bytes(8 << 20))
        words = OWN.format(socket=socket, disk=disk).split()
        with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
            try:
                while not socket.exists():
                    assert process.poll() is None
                runs_of(f"--socket-path={socket}", f"--disk={disk}")
            finally:
                process.terminate()

    def test_the_picture_is_drawn(self, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        runs_of(f"--plot={tmp_path / 'picture.svg'}")
        assert (tmp_path / "picture.svg").read_text().startswith("<?xml")

    def test_tables_and_the_verdict_go_to_stdout_and_progress_to_stderr(self) -> None:
        done = run("postcopy", "--memory=4", "--requests=10")
        assert done.stdout.splitlines()[-1] == "PASS"
        assert all(f"  {rule.id} " in done.stdout for rule in RULES)
        assert "s] handshake" in done.stderr


# ---- back-ends that cannot be tried at all


class TestUnable:
    pytestmark = needs_uffd

    def test_one_that_ends_at_once(self) -> None:
        done = postcopy("--start", "sh -c 'echo no disk today >&2; exit 3' {socket} {disk}")
        assert done.returncode == 1
        assert done.stderr == "vhostuser postcopy: blk 0 ended with status 3, its last words: no disk today\n"

    def test_one_that_never_listens(self) -> None:
        done = postcopy("--patience=0.3", "--start", "sleep 60 {socket} {disk}")
        assert done.returncode == 1
        assert done.stderr.startswith("vhostuser postcopy: ")
        assert "blk 0" in done.stderr
        assert done.stderr.count("\n") == 1

    def test_a_socket_where_nobody_listens(self, tmp_path: Path) -> None:
        (tmp_path / "d").touch()
        done = postcopy(f"--socket-path={tmp_path / 's'}", f"--disk={tmp_path / 'd'}")
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1

    def test_one_without_postcopy_fails_by_name(self) -> None:
        done = postcopy("--start", f"{OWN} --postcopy=off")
        assert done.returncode == 1
        assert done.stdout.splitlines()[-1] == "FAIL no-pagefault"
        assert "PAGEFAULT not offered" in done.stdout


# ---- options

WRONG: dict[str, tuple[Sequence[str], str]] = {
    "no-socket": (["--start", "blk {disk}"], "--start: the command has no {socket}"),
    "quotes": (["--start", "blk '{socket} {disk}"], "--start: No closing quotation"),
    "no-disk": (["--start", "blk {socket}"], "--start: a command without {disk} needs --disk"),
    "path-no-disk": (["--socket-path=/nowhere"], "--socket-path needs --disk"),
    "disk-twice": (["--start", "blk {socket} {disk}", "--disk=/dev/null"], "--disk: the command has {disk}"),
    "disk-missing": (["--socket-path=/s", "--disk=/nowhere"], "--disk: /nowhere: no such file"),
    "clients": (["--socket-path=/s", "--disk=/dev/null", "--clients=2"], "--clients=2 needs --socket-path 2 times"),
    "channel": (["--wake=channel", "--start", "blk {socket} {disk}"], "--wake=channel: --start a command with {wake}"),
    "channel-continue": (
        ["--wake=batch,channel", "--placement=continue"],
        "--wake=channel: with --placement=continue ",
    ),
    "wake": (["--wake=batch,loud"], "argument --wake: 'batch,loud' is not of broadcast, demand, batch, channel"),
    "flow": (["--flow=up"], "argument --flow: 'up' is not of table, regions, both"),
    "plot": (["--plot=picture.gif"], "argument --plot: 'picture.gif' does not end in .svg or .png"),
    "patience": (["--patience=-1"], "argument --patience: '-1' is not a time in seconds above 0"),
    "depth": (["--depth=17"], "argument --depth: '17' is not a number from 1 to 16"),
    "abbreviated": (["--mem=8"], "unrecognized arguments: --mem=8"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options_are_told_in_one_line_with_status_2(name: str) -> None:
    arguments, words = WRONG[name]
    done = run("postcopy", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"vhostuser postcopy: {words}")
    assert done.stderr.endswith("(see vhostuser postcopy --help)\n")
    assert done.stderr.count("\n") == 1


def test_too_little_memory_is_told_in_one_line() -> None:
    done = postcopy("--memory=1", "--regions=8", "--clients=32")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "give more memory or fewer regions" in done.stderr


def test_the_help_names_every_option_and_the_exit_statuses() -> None:
    done = run("postcopy", "--help")
    assert done.returncode == 0
    for word in ("--start", "--withhold", "--placement", "--json", "Exit status: 0", "docs/postcopy-lab.md"):
        assert word in done.stdout


@pytest.mark.parametrize(("arguments", "status"), [(["--help"], 0), ([], 2)])
def test_the_tools_are_listed(arguments: list[str], status: int) -> None:
    done = run(*arguments)
    assert done.returncode == status
    assert all(f"  {name}  " in done.stdout for name in TOOLS)


@pytest.mark.postcopy
def test_output_that_nobody_reads_is_no_reason_for_a_traceback(permitted: None) -> None:
    command = [sys.executable, "-m", "vhostuser.tools.main", "postcopy", *SMALL, "--requests=5"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_a_tool_that_does_not_exist() -> None:
    done = run("postcopie")
    assert done.returncode == 2
    assert done.stderr == f"vhostuser: there is no tool 'postcopie', only {', '.join(TOOLS)} (see vhostuser --help)\n"
