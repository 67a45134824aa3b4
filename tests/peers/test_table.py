"""Who is tried, and with which explanations."""

from __future__ import annotations

from pathlib import Path

import pytest

from vhostuser.conformance.backend_cases import CASES as BACKEND_CASES
from vhostuser.conformance.bench import Device
from vhostuser.conformance.frontend_cases import CASES as FRONTEND_CASES
from vhostuser.conformance.subject import command_of
from vhostuser.conformance.suite import select
from vhostuser.conformance.waivers import Waivers
from vhostuser.tools.peers.run import waivers
from vhostuser.tools.peers.table import PEERS, Peer


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_commands_are_whole(peer: Peer, tmp_path: Path) -> None:
    """What tools/results hands to vhostuser conform is what that takes."""
    path, words = command_of(peer.command, tmp_path)
    assert any(str(path) in word for word in words)
    assert Device(peer.device)


@pytest.mark.parametrize("peer", [peer for peer in PEERS if waivers(peer).exists()], ids=lambda peer: peer.name)
def test_explanations_are_about_cases_that_exist(peer: Peer) -> None:
    cases = BACKEND_CASES if peer.side == "backend" else FRONTEND_CASES
    patterns = [pattern for pattern, _ in Waivers.parse(waivers(peer).read_text()).lines]
    assert [pattern for pattern in patterns if not select(cases, [pattern], [])] == []


def test_our_own_programs_need_no_explanations() -> None:
    assert [peer.name for peer in PEERS if not waivers(peer).exists()] == ["vhostuser-blk", "vhostuser-net"]
