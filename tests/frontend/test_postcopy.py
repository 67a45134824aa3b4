"""Postcopy's messages from the destination's end, with our back-end and with ones that answer wrongly."""

import asyncio
import os
import select
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest

import vhostuser.faultserver
import vhostuser.frontend
from tests.frontend.test_calls import negotiated
from tests.runtime.echo import Echo
from vhostuser.device import Device
from vhostuser.driverqueue import DriverQueue
from vhostuser.frontend import DRIVABLE, DRIVABLE_PROTOCOL, Frontend, FrontendRing, PostcopyClient, SharedMemory
from vhostuser.protocol import (
    U64,
    LocalProtocolError,
    MemoryRegion,
    MemoryTable,
    Payload,
    Postcopy,
    ProtocolFeature,
    RemoteProtocolError,
    SingleRegion,
    VirtioFeature,
)
from vhostuser.protocol import FrontendRequest as F
from vhostuser.testing.pair import Pair
from vhostuser.testing.peer import Answer, Expect, ScriptedPeer, Step
from vhostuser.uffd import NotPermitted, Userfaultfd

PAGE = 4096
SIZE = 1 << 20
SLOTS = ProtocolFeature.CONFIGURE_MEM_SLOTS.mask


class Nothing(Device):
    virtio_id = 63


@pytest.fixture
def permitted() -> None:
    try:
        Userfaultfd.probe()
    except NotPermitted as error:
        pytest.skip(str(error))


@pytest.fixture
async def memory(no_leaks: None) -> AsyncIterator[SharedMemory]:
    with SharedMemory((0, 2 * PAGE), (1 << 32, PAGE)) as memory:
        yield memory


@pytest.mark.postcopy
@pytest.mark.parametrize("slots", [False, True], ids=["table", "slots"])
async def test_two_back_ends_share_one_memory(
    permitted: None, memory: SharedMemory, pairs: Callable[..., Pair], slots: bool
) -> None:
    """Each has its userfaultfd and tells where it has mapped each region."""
    ends: list[tuple[Pair, PostcopyClient]] = []
    for pair in (pairs(Nothing()), pairs(Nothing())):
        await pair.frontend.negotiate(protocol_features=DRIVABLE_PROTOCOL & ~(0 if slots else SLOTS))
        client = await PostcopyClient.advise(pair.frontend)
        await client.listen()
        await client.share(memory)
        mapped = pair.backend.connections[0].memory.regions
        assert client.regions == tuple((r.guest, r.host, r.size, PAGE) for r in mapped)
        await client.acknowledge()
        ends.append((pair, client))
        assert not select.select([client.uffd], [], [], 0)[0], "nobody has touched anything yet"
    for pair, client in ends:
        await client.end()
        assert pair.frontend.session.postcopy is Postcopy.IDLE
        client.close()
        client.close()
    assert [os.fstat(fd).st_blocks for fd in memory.fds] == [0, 0], "nobody has filled a page"


@pytest.mark.postcopy
async def test_a_region_comes_and_goes_in_postcopy(
    permitted: None, memory: SharedMemory, pairs: Callable[..., Pair]
) -> None:
    pair = pairs(Nothing())
    await pair.frontend.negotiate()
    with await PostcopyClient.advise(pair.frontend) as client:
        await client.listen()
        await client.share(memory)
        await client.acknowledge()
        added = await client.add(memory.add(1 << 40, PAGE))
        assert client.regions[-1] == added
        await client.remove(memory.regions[-1])
        memory.remove(memory.regions[-1])
        await client.acknowledge()
        assert [region.guest for region in client.regions] == [0, 1 << 32]
        await client.end()


def based(memory: SharedMemory, **changes: int) -> tuple[MemoryRegion, ...]:
    """An answer whose last region says something else."""
    first, last = memory.table().regions
    return (first, replace(last, **changes))


WRONG: dict[str, dict[str, int]] = {
    "another guest address": {"guest": 0},
    "another size": {"size": 2 * PAGE},
    "no address": {"user": 0},
    "an address within a page": {"user": PAGE + 8},
}


@pytest.mark.parametrize("wrong", WRONG)
async def test_a_wrong_answer_to_the_table_is_an_error(
    memory: SharedMemory, frontend: Frontend, peer: ScriptedPeer, wrong: str
) -> None:
    answer = MemoryTable(based(memory, **WRONG[wrong]))
    client = await advised(frontend, peer, Expect(F.SET_MEM_TABLE, memory.table(), fds=2), answer)
    with client, pytest.raises(RemoteProtocolError, match="SET_MEM_TABLE"):
        await client.share(memory, by_slots=False)
    assert client.regions == ()


@pytest.mark.parametrize("wrong", WRONG)
async def test_a_wrong_answer_to_a_region_is_an_error(
    memory: SharedMemory, frontend: Frontend, peer: ScriptedPeer, wrong: str
) -> None:
    region = memory.regions[1]
    answer = SingleRegion(based(memory, **WRONG[wrong])[1])
    client = await advised(frontend, peer, Expect(F.ADD_MEM_REG, SingleRegion(region.describe()), fds=1), answer)
    with client, pytest.raises(RemoteProtocolError, match="ADD_MEM_REG"):
        await client.add(region)


async def test_memory_is_not_shared_before_listening(
    memory: SharedMemory, frontend: Frontend, peer: ScriptedPeer
) -> None:
    """It would be an ordinary table, whose memory the back-end may touch at once."""
    await negotiated(frontend, peer)
    script = peer.follow(Expect(F.POSTCOPY_ADVISE), Answer(fds=(0,)))
    client, _ = await asyncio.gather(PostcopyClient.advise(frontend), script)
    with client:
        for sharing in (client.share(memory), client.add(memory.regions[0])):
            with pytest.raises(LocalProtocolError, match="before POSTCOPY_LISTEN"):
                await sharing


async def advised(frontend: Frontend, peer: ScriptedPeer, expect: Expect, answer: Payload) -> PostcopyClient:
    """A client that listens, and a peer that will answer the next message so."""
    await negotiated(frontend, peer)
    start: tuple[Step, ...] = (
        *(Expect(F.POSTCOPY_ADVISE), Answer(fds=(0,))),
        *(Expect(F.POSTCOPY_LISTEN), Answer(U64(0))),
    )
    script = asyncio.ensure_future(peer.follow(*start, expect, Answer(answer)))
    client = await PostcopyClient.advise(frontend)
    await client.listen()
    script.add_done_callback(lambda script: script.result())
    return client


class Shared:
    """Two of our back-ends on one memory that has holes; what was there is in ``source``, the driver's rings too."""

    def __init__(self, pairs: list[Pair]) -> None:
        self.pairs = pairs
        self.source = SharedMemory((0, SIZE))
        self.memory: SharedMemory | None = None
        self.rings: list[FrontendRing] = []
        for number, _ in enumerate(pairs):
            self.rings.append(FrontendRing(0, DriverQueue(self.source.map, number * PAGE * 4, 8)))
            at = (64 + number) * PAGE
            self.source.write(at, b"back-end %d" % number)
            self.rings[-1].queue.offer([(at, 10)], [(at + 16 * PAGE, 10)])
            self.rings[-1].queue.publish()

    async def run(self, memory: SharedMemory) -> None:
        """Starts every ring and collects every answer."""
        self.memory = memory
        for pair, ring in zip(self.pairs, self.rings, strict=True):
            ring.queue.move(memory.map)
            await pair.frontend.start_ring(ring, memory)
            ring.kick()
        for number, ring in enumerate(self.rings):
            assert await asyncio.to_thread(ring.queue.wait, ring.call_fd, timeout=10)
            assert await asyncio.to_thread(ring.queue.take) == (0, 10)
            answer = await asyncio.to_thread(memory.read, (80 + number) * PAGE, 10)
            assert answer == b"BACK-END %d" % number

    def close(self) -> None:
        for ring in self.rings:
            ring.close()
        self.source.close()
        if self.memory is not None:
            self.memory.close()


@pytest.mark.postcopy
async def test_the_destination_of_the_page_works(permitted: None, no_leaks: None, pairs: Callable[..., Pair]) -> None:
    """The snippet of docs/postcopy.md with two back-ends; every byte came from the source, none from a hole."""
    page = (Path(__file__).parents[2] / "docs" / "postcopy.md").read_text()
    snippet = page[page.index("## The other side") :].split("```python\n")[1].split("```")[0]
    shared = Shared([pairs(Echo()), pairs(Echo())])
    for pair in shared.pairs:
        await pair.frontend.negotiate(DRIVABLE & ~VirtioFeature.RING_EVENT_IDX.mask)
    names = {**vars(vhostuser.faultserver), **vars(vhostuser.frontend)}
    names |= {"asyncio": asyncio, "size": SIZE, "image_fd": shared.source.fds[0], "run_the_rings": shared.run}
    names |= {"back_ends": {str(number): pair.frontend for number, pair in enumerate(shared.pairs)}, "clients": []}
    body = "".join(f"    {line}\n" for line in snippet.splitlines())
    exec(f"async def run():\n{body}    return server\n", names)
    server = await asyncio.wait_for(names["run"](), 30)
    assert server.complete
    assert sum(client.stats().faults for client in server.clients) > 0, "back-ends have waited for pages"
    server.close()
    for client in names["clients"]:
        client.close()
    for pair in shared.pairs:
        await pair.close()
    shared.close()
