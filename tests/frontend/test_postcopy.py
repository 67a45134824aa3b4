"""Postcopy's messages from the destination's end, with our back-end and with ones that answer wrongly."""

import asyncio
import os
import select
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest

from tests.frontend.test_calls import negotiated
from vhostuser.device import Device
from vhostuser.frontend import Frontend, PostcopyClient, SharedMemory
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
)
from vhostuser.protocol import FrontendRequest as F
from vhostuser.testing.pair import Pair
from vhostuser.testing.peer import Answer, Expect, ScriptedPeer, Step
from vhostuser.uffd import NotPermitted, Userfaultfd

PAGE = 4096
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
        await pair.frontend.negotiate(protocol_features=~0 if slots else ~SLOTS)
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
