"""Tries a program: the whole suite, strictly, and once more what did not pass.

What belongs here: running ``vhostuser conform`` and reading what it found. What does not: who is tried (``table``),
what is written about it (``page``).
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vhostuser.tools.lab.errors import LabError
from vhostuser.tools.peers.debian import Release, installed
from vhostuser.tools.peers.table import Peer

ROOT = Path(__file__).resolve().parents[2]


class NotHere(Exception):
    """The program is not on this machine; the text says how to get it."""


@dataclass(frozen=True)
class Outcome:
    """What came of it. day: as in 2026-01-31. unsteady: ids of cases that passed one time and not the other."""

    peer: str
    version: str
    day: str
    seconds: float
    cases: list[dict[str, Any]]
    unsteady: list[str]
    idle: list[str]


def waivers(peer: Peer) -> Path:
    """The file with the explanations of what it does wrong."""
    return ROOT / "tests/conformance" / f"{peer.name}.waivers"


def attempt(peer: Peer, releases: dict[str, Release], scratch: Path) -> Outcome:
    """Tries it; takes from some seconds to minutes. Raises NotHere, or LabError if the suite cannot be run."""
    version, command = _program(peer, releases)
    began = time.monotonic()
    first = _conform(peer, command, scratch, keep=peer.keep)
    bad = [case["id"] for case in first["cases"] if case["verdict"] in ("FAIL", "ERROR")]
    second = {case["id"]: case for case in _conform(peer, command, scratch, *bad)["cases"]} if bad else {}
    cases = [second.get(case["id"], case) for case in first["cases"]]
    unsteady = [name for name in bad if second[name]["verdict"] == "PASS"]
    day = time.strftime("%Y-%m-%d", time.gmtime())
    return Outcome(peer.name, version, day, time.monotonic() - began, cases, unsteady, first["idle_waivers"])


def show(peer: Peer, releases: dict[str, Release], cases: Sequence[str]) -> int:
    """Tries these cases, and leaves it to ``vhostuser conform`` to print: its exit status. No failure is waived. Raises
    NotHere."""
    _, command = _program(peer, releases)
    return subprocess.run([*_words(peer, cases), "--start", command], cwd=ROOT, env=_environment()).returncode


def _words(peer: Peer, ids: Sequence[str]) -> list[str]:
    """The command, up to the program that is tried and what becomes of the results."""
    words = [sys.executable, "-m", "vhostuser.tools.main", "conform", peer.side, *ids]
    return [*words, "--strict", f"--device={peer.device}", f"--jobs={peer.jobs}", *peer.options]


def _program(peer: Peer, releases: dict[str, Release]) -> tuple[str, str]:
    """Its version, and the command that starts it."""
    if not peer.package:
        return "this tree", peer.command.replace("python ", f"{sys.executable} ", 1)
    if peer.release:
        release = releases[peer.release]
        return release.version(peer.package), release.command(peer.command)
    version = installed(peer.package)
    if not version:
        raise NotHere(f"{peer.title} is not installed: apt-get install {peer.package}")
    return version, peer.command


def _conform(peer: Peer, command: str, scratch: Path, *ids: str, keep: bool = False) -> dict[str, Any]:
    result = scratch / "result.json"
    result.unlink(missing_ok=True)
    words = [*_words(peer, ids), "--quiet"]
    if waivers(peer).exists():
        words.append(f"--waive={waivers(peer)}")
    if keep:
        words.append("--keep")
    done = subprocess.run(
        [*words, "--start", command, f"--json={result}"], capture_output=True, text=True, cwd=ROOT, env=_environment()
    )
    if not result.exists():
        raise LabError(f"{peer.title}: {done.stderr.strip()} ({shlex.quote(command)})")
    told: dict[str, Any] = json.loads(result.read_text())
    return told


def _environment() -> dict[str, str]:
    """Our own programs are found without an activated environment."""
    return os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
