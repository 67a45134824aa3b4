"""Nothing is left behind: descriptors and mappings are counted over a thousand rounds."""

import asyncio
import gc
import os
import threading

from tests.runtime.echo import Echo, answer, ask
from vhostuser.dataplane import new_event_loop
from vhostuser.device import Device
from vhostuser.protocol import FrontendRequest, Inflight
from vhostuser.testing.leaks import open_fds, shared_mappings
from vhostuser.testing.pair import connect
from vhostuser.uffd import NotPermitted, Userfaultfd

ROUNDS = 500  # on each of the two event loops


async def one_round(device: Device) -> None:
    """Connect, configure everything that brings descriptors, use the ring, leave."""
    pair = connect(device)
    await pair.set_up(rings=2)
    payload, fds = await pair.frontend.request(FrontendRequest.GET_INFLIGHT_FD, Inflight(0, 0, 2, 64))
    await pair.frontend.request(FrontendRequest.SET_INFLIGHT_FD, payload, tuple(fds))
    fds.close()
    await ask(pair, b"hello")
    assert await answer(pair) == b"HELLO"
    try:
        Userfaultfd.probe()
        _, fds = await pair.frontend.request(FrontendRequest.POSTCOPY_ADVISE)
        fds.close()
    except NotPermitted:
        pass
    await pair.close()


async def test_five_hundred_rounds_on_each_loop_leave_no_descriptor_no_mapping_and_no_thread() -> None:
    new_event_loop().close()
    device = Echo()
    await one_round(device)
    gc.collect()  # what earlier tests have left
    # Not the kernel's count of threads: one that was joined may take a moment more to end there.
    before = (len(open_fds()), shared_mappings().total(), threading.active_count())
    for _ in range(ROUNDS):
        await one_round(device)
    assert (len(open_fds()), shared_mappings().total(), threading.active_count()) == before


async def test_half_configured_connections_leave_nothing() -> None:
    """Cut after every number of bytes of a negotiation with descriptors on the way."""
    device = Echo()
    await one_round(device)
    gc.collect()
    before = (len(open_fds()), shared_mappings().total())
    table = bytes.fromhex("05000000 01000000 28000000 01000000 00000000")
    for cut in range(1, len(table)):
        pair = connect(device)
        fd = os.memfd_create("leak", os.MFD_CLOEXEC)
        await pair.frontend.send_raw(table[:cut], (fd,))
        os.close(fd)
        await asyncio.sleep(0)
        await pair.close()
    assert (len(open_fds()), shared_mappings().total()) == before
