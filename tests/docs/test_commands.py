"""Commands and snippets of the documentation that need more than a shell: what marks name when nothing else does it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT


@pytest.mark.interop
@pytest.mark.timeout(280)
def test_the_demo(tmp_path: Path) -> None:
    """What tools/demo runs once it has set up an environment of its own; with as little memory as it takes. Traced, and
    the trace drawn, as docs/trace.md has it."""
    assert '"vhostuser.tools.lab.demo"' in (ROOT / "tools/demo").read_text()
    command = [sys.executable, "-m", "vhostuser.tools.lab.demo", "--memory=256", f"--trace={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=270)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "checksum of the disk                           equal" in done.stdout
    draw = [sys.executable, "-m", "vhostuser.tools.main", "trace", f"--draw={tmp_path / 'destination.json'}"]
    picture = subprocess.run(draw, capture_output=True, text=True, check=True).stdout
    for phase in ("advised", "listening", "awaiting ack", "pages missing", "ring 0"):
        assert f">{phase}<" in picture
