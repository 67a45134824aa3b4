"""The whole suite against DPDK's net_vhost, with its waivers."""

from __future__ import annotations

import shutil

import pytest

from tests.conformance.test_our_blk import conform
from vhostuser.tools.peers.run import waivers
from vhostuser.tools.peers.table import PEERS

pytestmark = [pytest.mark.interop, pytest.mark.timeout(280)]


def test_nothing_but_what_is_known() -> None:
    if not shutil.which("dpdk-testpmd"):
        pytest.skip("dpdk-testpmd is not installed")
    (peer,) = (peer for peer in PEERS if peer.name == "dpdk-net-vhost")
    options = ["--device=net", "--keep", "--strict", f"--waive={waivers(peer)}", "--jobs=2", *peer.options]
    done = conform("--start", peer.command, *options, seconds=270)
    new = [line for line in done.stderr.splitlines() if line.startswith(("fail", "error"))]
    assert new == []
    assert done.returncode == 0
