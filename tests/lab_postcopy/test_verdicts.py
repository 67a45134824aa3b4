"""Every broken back-end (``broken/``) gets the verdict that it says it must get, first of all that are given."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vhostuser.tools.postcopy.rules import RULES

BROKEN = sorted((Path(__file__).parent / "broken").glob("*.py"))
PATIENCE = 0.7

pytestmark = [pytest.mark.postcopy, pytest.mark.usefixtures("permitted")]


def text_of(script: Path) -> str:
    return ast.get_docstring(ast.parse(script.read_text())) or ""


def verdict_of(script: Path) -> str:
    """What its docstring says."""
    found = re.search(r"^Verdict: ([a-z-]+)\.\Z", text_of(script), re.MULTILINE)
    assert found
    return found[1]


def options_of(script: Path) -> list[str]:
    """What the laboratory needs to be told to see its fault."""
    found = re.search(r"^Options: (.+)$", text_of(script), re.MULTILINE)
    return found[1].split() if found else []


@pytest.mark.parametrize("script", BROKEN, ids=lambda script: script.stem)
def test_the_fault_is_named(script: Path) -> None:
    files = "--socket-path={socket} --blk-file={disk} --wake-socket={wake}"
    command = f"{sys.executable} {script} {files} --log-level=error"
    tool = [sys.executable, "-m", "vhostuser.tools.main", "postcopy", "--quiet", "--json", "--memory=4"]
    done = subprocess.run(
        [*tool, *options_of(script), f"--patience={PATIENCE}", "--start", command],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.returncode, done.stderr) == (1, "")
    (run,) = json.loads(done.stdout)["runs"]
    found = [finding["id"] for finding in run["findings"]]
    assert found, "nothing was found"
    assert found[0] == verdict_of(script)


def test_every_rule_has_a_back_end_that_breaks_it() -> None:
    assert {verdict_of(script) for script in BROKEN} == {rule.id for rule in RULES}
