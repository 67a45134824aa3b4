"""The suite finds every fault, each of its cases one or more.

Try the whole suite on a fault that is added: ``VHOSTUSER_BROKEN=all`` with its name behind -k (see ``turns``).
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.conformance.broken import FAULTS
from tests.conformance.broken.bench import tried
from tests.conformance.broken.forkserver import ForkServer
from tests.conformance.turns import MOST, whole
from vhostuser.channel import readable
from vhostuser.conformance.backend_cases import CASES
from vhostuser.conformance.backend_cases.twins import PREFIX, twin_id
from vhostuser.conformance.peer import Peer
from vhostuser.conformance.suite import Case, Unreachable, Verdict, select

OF_THE_MACHINE = ("huge pages", "userfaultfd")
"""Where a case is left out for one of these it could fail, elsewhere."""
WHOLE = whole(name for name, fault in FAULTS.items() if fault.fails)


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    server = ForkServer()
    yield server
    server.close()


async def failures(server: ForkServer, name: str, cases: Sequence[Case[Peer]], patience: float) -> set[str]:
    """Those of the cases that fail. patience: seconds for each answer; long enough only if the machine is not busy."""
    keep = len(cases) == len(CASES)
    results = await tried(server, name, cases, patience=patience, quiet=patience / 14, keep=keep)
    lacks = [result.reason for result in results if any(word in result.reason for word in OF_THE_MACHINE)]
    if lacks and not keep:
        pytest.skip(lacks[0])
    return {result.case.id for result in results if result.verdict is Verdict.FAIL}


def rules(ids: set[str]) -> set[str]:
    """What these cases try; a case and its twin try the same."""
    return {case_id if case_id.startswith(PREFIX) else twin_id(case_id) for case_id in ids}


def _mark(name: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.postcopy] if any("postcopy." in case for case in FAULTS[name].fails) else []


@pytest.mark.timeout(600 if WHOLE else 120)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=_mark(name)) for name, fault in FAULTS.items() if fault.fails]
)
async def test_a_fault_is_found(name: str, server: ForkServer, request: pytest.FixtureRequest) -> None:
    if any(case.endswith(".hugetlb") for case in FAULTS[name].fails):
        request.getfixturevalue("huge_pages")
    wanted = FAULTS[name].cases()
    found: set[str] = set()
    with contextlib.suppress(Unreachable):
        found = await failures(server, name, CASES if name in WHOLE else wanted, 0.7)
    # On a busy machine a fault takes longer to show itself, and what is right may be taken for wrong.
    if missed := [case for case in wanted if case.id not in found]:
        found |= await failures(server, name, missed, 7)
    assert not {case.id for case in wanted} - found
    if len(rules(found)) > MOST:
        found = await failures(server, name, [case for case in CASES if case.id in found], 4)
    assert len(rules(found)) <= MOST


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if not fault.fails])
async def test_a_disk_without_a_fault_passes(name: str, server: ForkServer) -> None:
    results = await tried(server, name, CASES, patience=7, quiet=0.05, keep=True)
    assert not [result.case.id for result in results if result.verdict not in (Verdict.PASS, Verdict.SKIP)]


def test_every_case_can_fail() -> None:
    """A case that fails nowhere proves nothing."""
    shown = {case.id for fault in FAULTS.values() if fault.fails for case in fault.cases()}
    assert not {case.id for case in CASES} - shown


def test_every_fault_names_cases() -> None:
    for fault in FAULTS.values():
        assert all(select(CASES, [wanted], []) for wanted in fault.fails), fault.fails


async def test_a_disk_dies_with_its_server(tmp_path: Path) -> None:
    server, image = ForkServer(), tmp_path / "image"
    image.write_bytes(bytes(512))
    child = server.start(
        [next(iter(FAULTS)), f"--socket-path={tmp_path}/s", f"--blk-file={image}"], tmp_path / "output"
    )
    with os.fdopen(os.pidfd_open(child.pid)) as pidfd:
        server.close()
        await readable(pidfd.fileno())
    assert await child.wait() == -signal.SIGKILL
