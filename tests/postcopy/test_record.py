"""The record of memory that a lost migration left with holes: whose it is, how long it counts, what it survives."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vhostuser.record import MemoryRecord

PAGES = 4


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "vhost.sock.memory"


@pytest.fixture
def memory(page_size: int) -> Iterator[Callable[[], int]]:
    """Makes files of guest memory without any page."""
    made: list[int] = []

    def make() -> int:
        huge = os.MFD_HUGETLB | os.MFD_HUGE_2MB if page_size > 4096 else 0
        made.append(os.memfd_create("guest", os.MFD_CLOEXEC | huge))
        os.ftruncate(made[-1], PAGES * page_size)
        return made[-1]

    yield make
    for fd in made:
        os.close(fd)


def fill(fd: int, page: int, page_size: int) -> None:
    """Gives the file one page."""
    os.posix_fallocate(fd, page * page_size, page_size)


def test_memory_counts_until_its_last_hole_is_filled(path: Path, memory: Callable[[], int], page_size: int) -> None:
    fd = memory()
    record = MemoryRecord(path)
    record.add([fd])
    for page in range(PAGES):
        assert record.holds(fd)
        assert MemoryRecord(path).holds(fd), "a restarted process says the same"
        fill(fd, page, page_size)
    assert not record.holds(fd)


def test_memory_seen_whole_is_forgotten_for_good(path: Path, memory: Callable[[], int], page_size: int) -> None:
    """A balloon may make new holes, which belong to nobody's migration."""
    fd, other = memory(), memory()
    record = MemoryRecord(path)
    record.add([fd, other])
    for page in range(PAGES):
        fill(fd, page, page_size)
    assert not record.holds(fd)
    os.ftruncate(fd, 0)
    os.ftruncate(fd, PAGES * page_size)
    assert not record.holds(fd)
    assert record.holds(other)
    assert MemoryRecord(path).holds(other)


def test_other_memory_does_not_count(path: Path, memory: Callable[[], int]) -> None:
    record = MemoryRecord(path)
    record.add([memory()])
    assert not record.holds(memory())


def test_a_duplicate_is_the_same_memory(path: Path, memory: Callable[[], int]) -> None:
    fd = memory()
    record = MemoryRecord(path)
    record.add([fd])
    duplicate = os.dup(fd)
    assert record.holds(duplicate)
    os.close(duplicate)


def test_an_inode_number_used_again_does_not_count(path: Path, memory: Callable[[], int], page_size: int) -> None:
    """Numbers start anew at boot, and may come back for a file of another size."""
    fd = memory()
    MemoryRecord(path).add([fd])
    for position, value in ((0, "another boot"), (3, PAGES * page_size + 4096)):
        rows = json.loads(path.read_text())
        rows[0][position] = value
        changed = path.with_name("changed")
        changed.write_text(json.dumps(rows))
        assert not MemoryRecord(changed).holds(fd)


def test_forgetting_removes_the_file(path: Path, memory: Callable[[], int]) -> None:
    record = MemoryRecord(path)
    record.forget()
    record.add([memory()])
    assert path.exists()
    record.forget()
    assert list(path.parent.iterdir()) == []


def test_removing_the_file_forgets_while_the_process_runs(
    path: Path, memory: Callable[[], int], caplog: pytest.LogCaptureFixture
) -> None:
    """The cure where a hole is nobody's business any more and nobody says so."""
    first, second = memory(), memory()
    for made_before in (False, True):
        record = MemoryRecord(path)
        record.add([first])
        if made_before:
            record = MemoryRecord(path)
        assert record.holds(first)
        path.unlink()
        assert not record.holds(first)
        assert "was removed" in caplog.text
        record.add([second])
        assert record.holds(second)
        assert not record.holds(first)
        path.unlink()


def test_memory_removed_by_hand_does_not_come_back_with_the_next(path: Path, memory: Callable[[], int]) -> None:
    first, second = memory(), memory()
    record = MemoryRecord(path)
    record.add([first])
    path.unlink()
    record.add([second])
    assert not record.holds(first)
    assert record.holds(second)


def test_a_new_record_replaces_the_old_one_in_one_step(
    path: Path, memory: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in between, the process leaves the old record whole."""
    first, second = memory(), memory()
    record = MemoryRecord(path)
    record.add([first])

    def killed(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        record.add([second])
    restarted = MemoryRecord(path)
    assert restarted.holds(first)
    assert not restarted.holds(second)


def test_a_record_that_cannot_be_written_is_said(
    memory: Callable[[], int], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    fd = memory()
    record = MemoryRecord(tmp_path / "missing" / "record")
    record.add([fd])
    assert "cannot be written" in caplog.text
    assert record.holds(fd), "this process knows all the same"


GARBAGE = st.binary(max_size=200) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
).map(lambda value: json.dumps(value).encode())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(content=GARBAGE)
def test_garbage_counts_as_an_empty_record(path: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    path.write_bytes(content)
    fd = os.memfd_create("guest", os.MFD_CLOEXEC)
    os.ftruncate(fd, 4096)
    record = MemoryRecord(path)
    assert not record.holds(fd)
    record.add([fd])
    assert MemoryRecord(path).holds(fd)
    os.close(fd)


def test_deep_garbage_counts_as_an_empty_record(path: Path) -> None:
    path.write_text("[" * 100_000)
    MemoryRecord(path).forget()
