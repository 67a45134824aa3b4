"""One socket on a loop: when it is watched."""

import asyncio
import socket

from vhostuser.channel import Channel


async def test_bytes_that_nobody_waits_for_do_not_wake_the_loop_again_and_again(no_leaks: None) -> None:
    ours, theirs = socket.socketpair()
    channel, loop = Channel(ours), asyncio.get_running_loop()
    for byte in (b"a", b"b"):
        waiting = asyncio.ensure_future(channel.receive(1))
        await asyncio.sleep(0)
        theirs.send(byte + b"-")
        assert (await asyncio.wait_for(waiting, 5))[0] == byte
        for _ in range(5):
            await asyncio.sleep(0)
        assert not loop.remove_reader(ours)
        assert (await channel.receive(1))[0] == b"-"
    channel.close()
    theirs.close()
