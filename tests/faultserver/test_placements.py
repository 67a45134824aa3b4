"""Every way of placing a page: proven on this kernel, and refused where the kernel, the memory or a client lacks it."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any

import pytest

from tests.bench import torn
from tests.faultserver.conftest import HUGE, MIB, PAGE, Bed, content, good, pages, until
from vhostuser import faultserver as module
from vhostuser.faultserver import CallableSource, Placement, Unsupported, WakePolicy
from vhostuser.uffd import Feature, Mode, Userfaultfd

BOTH = Mode.MISSING | Mode.MINOR
ALL = Feature(sum(Feature))


def has(feature: Feature) -> None:
    if feature not in Userfaultfd.probe():
        pytest.skip(f"this kernel has no {feature.name}")


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Callable[[Feature], None]:
    """Makes the kernel seem to lack features."""

    def without(lacking: Feature) -> None:
        monkeypatch.setattr(Userfaultfd, "probe", staticmethod(lambda device_fd=-1: ALL & ~lacking))

    return without


# ---- COPY


@pytest.mark.parametrize("placement", [Placement.COPY, Placement.CONTINUE])
def test_huge_pages(bed: Bed, huge_pages: None, placement: Placement) -> None:
    memory = bed.memory((0, 4 * HUGE), hugetlb=True)
    server = bed.server(memory, placement=placement)
    process, client = bed.client(server, memory, mode=BOTH if placement is Placement.CONTINUE else Mode.MISSING)
    process.read(pages(2, size=HUGE), [(HUGE + 3 * PAGE, PAGE)])
    assert good(process.answers(2))
    assert server.stats().received == 2
    assert client.stats().woken == 2
    server.prefetch()
    assert server.wait(10)
    process.read([(0, 4 * HUGE)])
    assert good(process.answers(1))


def test_a_page_that_somebody_else_has_placed_is_noticed(bed: Bed) -> None:
    """A touch in memory that is not watched yet puts zeros there, which stay: this is how one learns of it."""
    memory = bed.memory()
    server = bed.server(memory, events=256)
    process = bed.process(memory, mode=Mode.MINOR)
    process.read(pages(5))
    assert [answer.wrong for answer in process.answers(1)] == [[5 * PAGE]]
    server.prefetch()
    assert server.wait(10)
    assert server.stats().present == 1
    assert [e.guest for e in server.events() if e.kind is module.EventKind.PRESENT] == [5 * PAGE]


@pytest.mark.parametrize("placement", [Placement.COPY, Placement.CONTINUE])
def test_a_page_that_was_punched_out_again_holds_zeros(bed: Bed, placement: Placement) -> None:
    """By a balloon, or by the kernel, which takes back clean pages of zeros. Nobody must fault for ever."""
    memory = bed.memory()
    server = bed.server(memory, placement=placement)
    process, _ = bed.client(server, memory, mode=BOTH if placement is Placement.CONTINUE else Mode.MISSING)
    process.read(pages(3))
    assert good(process.answers(1))
    with mmap.mmap(memory.fds[0], 64 * PAGE) as file:
        file.madvise(mmap.MADV_REMOVE, 3 * PAGE, PAGE)
    own = bed.threads(memory)
    process.read(pages(3), pages(4))
    own.read(pages(3))
    assert sorted(answer.wrong for answer in process.answers(2)) == [[], [3 * PAGE]]
    assert own.answers()[0].wrong == [3 * PAGE]
    assert memory.map.read(3 * PAGE, PAGE) == bytes(PAGE)
    assert server.stats().placed == 2


# ---- ZEROPAGE


def test_zeros(bed: Bed) -> None:
    memory = bed.memory()
    server = bed.server(memory, placement=Placement.ZEROPAGE)
    process, _ = bed.client(server, memory)
    process.read(pages(1))
    assert [answer.wrong for answer in process.answers(1)] == [[PAGE]], "anything but zeros would be wrong here"
    assert memory.map.read(PAGE, PAGE) == bytes(PAGE)
    assert server.stats().received == 1


def test_a_source_may_say_that_pages_are_zero(bed: Bed) -> None:
    memory = bed.memory()

    class Zeros(CallableSource):
        def run(self, feed: Any, number: int) -> None:
            while (ask := feed.next(most=4 * PAGE)) is not None:
                feed.place(ask.guest, ask.length)

    server = bed.server(memory, Zeros(content))
    server.prefetch()
    assert server.wait(10)
    assert server.stats().zero == 64
    assert memory.map.read(0, 64 * PAGE) == bytes(64 * PAGE)


def test_zeros_into_huge_pages_are_copied(bed: Bed, huge_pages: None) -> None:
    memory = bed.memory((0, 2 * HUGE), hugetlb=True)
    server = bed.server(memory, CallableSource(lambda guest, length: bytes(length)))
    assert server._supply._feed.place(0, 2 * HUGE) == 2
    assert memory.map.read(HUGE, HUGE) == bytes(HUGE)


def test_zeropage_is_refused_on_hugetlbfs(bed: Bed, huge_pages: None) -> None:
    with pytest.raises(Unsupported, match="ZEROPAGE does not know hugetlbfs; take COPY"):
        bed.server(bed.memory((0, HUGE), hugetlb=True), placement=Placement.ZEROPAGE)


# ---- CONTINUE


def test_continue_serves_processes_with_minor_faults_and_our_own_threads(bed: Bed) -> None:
    memory = bed.memory((0, MIB))
    server = bed.server(memory, placement=Placement.CONTINUE)
    process, client = bed.client(server, memory, mode=BOTH)
    process.read(pages(5), pages(6))
    assert good(process.answers(2))
    server.prefetch()
    assert server.wait(10)
    own = bed.threads(memory)
    own.read([(0, MIB)])
    process.read([(0, MIB)])
    assert good(own.answers())
    assert good(process.answers(1))
    assert client.stats().faults >= MIB // PAGE, "every page is mapped for it when it first asks"
    assert client.stats().refused == 0


@pytest.mark.parametrize("order", ["before", "after"])
def test_minor_faults_can_be_asked_for_through_the_descriptor(bed: Bed, order: str) -> None:
    """A back-end registers for missing pages alone, before or after we do; it stays with what we asked for."""
    memory = bed.memory()
    server = bed.server(memory, placement=Placement.CONTINUE)
    process = bed.process(memory, Mode.MISSING)
    client = server.add_client("back-end", process.uffd, process.regions, mode=BOTH, register=True)
    if order == "after":
        Userfaultfd(process.uffd).register(process.regions[0].host, process.regions[0].size, Mode.MISSING)
    server.prefetch()
    assert server.wait(10)
    process.read(pages(*range(64)))
    assert good(process.answers(1))
    assert client.stats().faults == 64


def test_continue_for_everybody_leaves_nobody_to_fault(bed: Bed) -> None:
    """BROADCAST maps the pages for all clients, asked or not."""
    memory = bed.memory()
    server = bed.server(memory, placement=Placement.CONTINUE, wake=WakePolicy.BROADCAST)
    process, client = bed.client(server, memory, mode=BOTH)
    server.prefetch()
    assert server.wait(10)
    until(lambda: client.stats().wakes == 64, "the last page is mapped")
    process.read(pages(*range(64)))
    assert good(process.answers(1))
    assert client.stats().faults == 0


def test_continue_is_refused_for_a_client_that_could_see_half_a_page(bed: Bed) -> None:
    memory = bed.memory()
    server = bed.server(memory, placement=Placement.CONTINUE)
    process = bed.process(memory)
    with pytest.raises(Unsupported, match=r"registered MISSING and MINOR, .* take COPY"):
        server.add_client("blind", process.uffd, process.regions)


def test_continue_is_refused_by_an_old_kernel_and_without_files(bed: Bed, kernel: Callable[[Feature], None]) -> None:
    with pytest.raises(Unsupported, match="writes into the memory's files, and this memory has none"):
        bed.server(bed.private(), CallableSource(content), placement=Placement.CONTINUE)
    kernel(Feature.MINOR_SHMEM)
    with pytest.raises(Unsupported, match=r"Linux 5\.14; take COPY"):
        bed.server(bed.memory(), placement=Placement.CONTINUE)


# ---- MOVE


@pytest.mark.parametrize("placement", [Placement.MOVE, Placement.COPY])
def test_private_memory(bed: Bed, placement: Placement) -> None:
    has(Feature.MOVE)
    memory = bed.private((0, MIB))
    server = bed.server(memory, placement=placement)
    own = bed.threads(memory)
    own.read(pages(7), pages(7), pages(9))
    assert good(own.answers())
    assert server.stats().placed == 2
    server.prefetch()
    assert server.wait(10)
    assert memory.map.read(0, MIB) == content(0, MIB)


def test_move_is_refused_for_shared_memory_other_processes_and_old_kernels(
    bed: Bed, kernel: Callable[[Feature], None]
) -> None:
    memory = bed.memory()
    with pytest.raises(Unsupported, match="this one lies in files; take COPY"):
        bed.server(memory, placement=Placement.MOVE)
    server = bed.server(bed.private(), CallableSource(content), placement=Placement.MOVE)
    process = bed.process(memory)
    with pytest.raises(Unsupported, match="no other process has"):
        server.add_client("other", process.uffd, process.regions)
    kernel(Feature.MOVE)
    with pytest.raises(Unsupported, match=r"Linux 6\.8; take COPY"):
        bed.server(bed.private(), CallableSource(content), placement=Placement.MOVE)


# ---- POISON


def test_a_deadline_turns_waiting_into_an_error_for_all_who_wait(bed: Bed) -> None:
    has(Feature.POISON)
    memory = bed.memory()
    server = bed.server(memory, deadline=0.2)
    first, _ = bed.client(server, memory)
    second, _ = bed.client(server, memory)
    server.pause()
    own = bed.threads(memory)
    for reader in (first, second, own):
        reader.read(pages(4))
    answers = first.answers(1) + second.answers(1) + own.answers()
    assert [answer.lost for answer in answers] == [[4 * PAGE]] * 3
    assert server.stats().lost == 1


def test_what_is_lost_stays_lost_and_the_rest_goes_on(bed: Bed) -> None:
    """Also for a client that did not wait then; bytes that come later are dropped."""
    has(Feature.POISON)
    memory = bed.memory()
    server = bed.server(memory, CallableSource(content, threads=1), deadline=0.2)
    early, _ = bed.client(server, memory)
    server.pause()
    early.read(pages(4))
    assert early.answers(1)[0].lost == [4 * PAGE]
    server.resume()
    late, _ = bed.client(server, memory)
    late.read(pages(4), pages(5))
    assert sorted(answer.lost for answer in late.answers(2)) == [[], [4 * PAGE]]
    server.prefetch()
    assert server.wait(10)
    assert server.complete
    assert (server.stats().received, server.stats().lost) == (63, 1)
    assert server._supply._feed.place(4 * PAGE, content(4 * PAGE, PAGE)) == 0
    early.read(pages(4))
    assert early.answers(1)[0].lost == [4 * PAGE]


def test_a_deadline_is_refused_where_nothing_can_end_a_wait(bed: Bed, kernel: Callable[[Feature], None]) -> None:
    kernel(Feature.POISON)
    with pytest.raises(Unsupported, match=r"UFFDIO_POISON, which came with Linux 6\.6; without it waits have no end"):
        bed.server(bed.memory(), deadline=1)
    with pytest.raises(Unsupported, match="missing pages stay missing"):
        bed.server(bed.memory()).poison(0, PAGE)


# ---- never half a page


@pytest.mark.parametrize("placement", [Placement.COPY, Placement.CONTINUE])
def test_no_process_reads_half_a_page(bed: Bed, placement: Placement) -> None:
    """A look; tests/bench/torn.py reads a million pages in each way."""
    assert torn.read_while_placed(bed, placement, size=32 * MIB, processes=2) == 16384


def test_no_thread_of_ours_reads_half_a_page_that_was_moved(bed: Bed) -> None:
    has(Feature.MOVE)
    assert torn.read_while_placed(bed, Placement.MOVE, size=32 * MIB, processes=0) == 8192
