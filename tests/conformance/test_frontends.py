"""Our own front-end passes the suite for front-ends, strictly; the command line with it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import parse

import pytest

from tests.conformance.frontends import in_memory
from vhostuser.conformance.bench import Device
from vhostuser.conformance.caller import Launch
from vhostuser.conformance.frontend_cases import CASES
from vhostuser.conformance.offer import offer_of
from vhostuser.conformance.stage import FrontendBench, Settings
from vhostuser.conformance.suite import Case, Result, judge_all

pytestmark = pytest.mark.timeout(180)


async def try_on(launch: Launch, cases: Sequence[Case[Any]], *, patience: float = 12.0) -> list[Result[Any]]:
    """The results. Many cases at a time: they spend most of their time waiting."""
    bench = FrontendBench(Settings(offer_of(Device.BLK), launch=launch, patience=patience, quiet=0.1))
    await bench.look()
    try:
        return [result async for result in judge_all(cases, bench, jobs=8, patience=60)]
    finally:
        await bench.close()


async def test_our_front_end_conforms_strictly() -> None:
    results = await try_on(in_memory(), CASES)
    assert [(r.case.id, r.actual or r.reason) for r in results if r.verdict != "PASS"] == []


# ---- the command line

OURS = f"{sys.executable} -m tests.conformance.frontends"
TOOL = [sys.executable, "-m", "vhostuser.tools.main", "conform", "frontend"]
ONE = ("life", "frame", "answer.flags.get-config", "death.while-running")


def conform(*arguments: str, seconds: float = 150) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*TOOL, *arguments], capture_output=True, text=True, timeout=seconds)


def marks(path: Path) -> dict[str, str]:
    return {case["id"]: case["mark"] for case in json.loads(path.read_text())["cases"]}


def test_a_front_end_is_started(tmp_path: Path) -> None:
    done = conform("--start", f"{OURS} {{socket}}", "--strict", f"--json={tmp_path / 'json'}", *ONE)
    assert done.returncode == 0, done.stderr
    assert set(marks(tmp_path / "json").values()) == {"pass"}


def test_a_front_end_that_listens_is_started(tmp_path: Path) -> None:
    done = conform("--start", f"{OURS} {{socket}} --server", "--server", f"--json={tmp_path / 'json'}", *ONE)
    assert done.returncode == 0, done.stderr
    assert set(marks(tmp_path / "json").values()) == {"pass"}


def test_a_front_end_that_runs_already_is_awaited(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with subprocess.Popen([*OURS.split(), str(path)]) as process:
        try:
            done = conform(f"--socket-path={path}", f"--junit={tmp_path / 'xml'}", f"--json={tmp_path / 'json'}", *ONE)
        finally:
            process.terminate()
    assert done.returncode == 0, done.stderr
    assert process.returncode == 0
    assert set(marks(tmp_path / "json").values()) == {"pass"}
    themes = {suite.get("name") for suite in parse(tmp_path / "xml").getroot()}
    assert themes == {"answer", "death", "frame", "life"}


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--socket-path=/nowhere/socket"], 3, "/nowhere/socket: No such file or directory"),
        (["--start", "/no/program {socket}"], 3, "cannot be started"),
        (["--start", "false {socket}"], 3, "the front-end ended without a word: status 1"),
        (["--socket-path=here"], 3, "no front-end has connected"),
        ([f"--socket-path={'x' * 200}"], 3, "too long"),
        (["--start", "true"], 2, "no {socket}"),
        (["--start", "true '{socket}"], 2, "No closing quotation"),
        (["--socket-path=/x", "--json=/nowhere/results"], 2, "--json: /nowhere/results cannot be written"),
        (["--socket-path=/x", "--junit=/"], 2, "--junit: / cannot be written"),
        ([], 2, "either --start or --socket-path"),
        (["--socket-path=/x", "no.such.case"], 2, "no case has such an id"),
        (["--socket-path=/x", "--keep"], 2, "unrecognized arguments: --keep"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(
    arguments: list[str], status: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = conform("--timeout=0.2", *arguments)
    assert (done.returncode, len(done.stderr.splitlines())) == (status, 1), done.stderr
    assert said in done.stderr


def test_which_side_is_tried_is_said_first() -> None:
    """And the cases of the other side are never taken for those that were asked for."""
    done = subprocess.run([*TOOL[:-1], "--list", TOOL[-1]], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "frontend comes before its options" in done.stderr


def test_the_cases_are_listed() -> None:
    done = conform("--list", "death.while-running")
    assert done.returncode == 0
    assert done.stdout.startswith("death.while-running\n    MUST, Communication: ")
