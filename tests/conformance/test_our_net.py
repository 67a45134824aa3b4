"""The whole suite, strictly, against our own network device."""

from __future__ import annotations

import sys

import pytest

from tests.conformance.test_our_blk import conform

NET = f"{sys.executable} -m vhostuser.tools.net --socket-path={{socket}} --end=sink --log-level=error"


@pytest.mark.timeout(240)
def test_our_network_device_conforms_strictly() -> None:
    done = conform("--start", NET, "--device=net", "--keep", "--strict", seconds=240)
    assert done.returncode == 0, done.stderr
