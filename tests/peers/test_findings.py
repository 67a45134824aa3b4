"""Findings in programs of other releases of Debian: that their commands show them, where they are unpacked."""

from __future__ import annotations

import shlex

import pytest

from tests.docs.blocks import ROOT, Block, blocks
from vhostuser.tools.lab.image import cache_directory
from vhostuser.tools.peers.command import main
from vhostuser.tools.peers.debian import Release
from vhostuser.tools.peers.table import PEERS

PAGE = "docs/findings.md"
SHOWN = [block for block in blocks(PAGE, (ROOT / PAGE).read_text()) if block.text.startswith("tools/results ")]


@pytest.mark.interop
@pytest.mark.timeout(120)
@pytest.mark.parametrize("block", SHOWN, ids=str)
def test_a_finding_is_shown(block: Block, capfd: pytest.CaptureFixture[str]) -> None:
    """Every case that the command names fails."""
    _, only, name, *cases = shlex.split(block.text)
    (peer,) = (peer for peer in PEERS if peer.name == name)
    if not Release(peer.release, cache_directory() / "debian").has(peer.package):
        pytest.skip(f"not unpacked: tools/results --only {name}")
    assert main([only, name, *cases]) == 1
    told = capfd.readouterr().err
    assert [case for case in cases if f"{case}:" not in told] == []


def test_there_are_some() -> None:
    assert len(SHOWN) == 2
