"""Messages as they stand on the wire, legal or not: for tests of peers.

What belongs here: cutting the stream into header, body and descriptors, and nothing else. What does not: what a legal
message is (``protocol``), who waits for it (``frontend.requests``, ``testing``).
"""

from __future__ import annotations

from typing import NamedTuple

from vhostuser.channel import Channel, Fds
from vhostuser.protocol import HEADER_SIZE, Header


class RawMessage(NamedTuple):
    """A message as it came. fds: all that came with any part of it, the receiver's to close."""

    header: Header
    body: bytes
    fds: Fds


async def receive_message(channel: Channel) -> RawMessage | None:
    """The next message, whatever it is; None at the end of the stream.

    Where the stream ends in the middle of a message, ``len(body) < header.size``; an incomplete header counts as the
    end.
    """
    head, fds = await _exactly(channel, HEADER_SIZE)
    if len(head) < HEADER_SIZE:
        fds.close()
        return None
    header = Header.unpack(head)
    try:
        body, more = await _exactly(channel, header.size)
    except BaseException:
        fds.close()
        raise
    fds.extend(more)
    return RawMessage(header, body, fds)


async def _exactly(channel: Channel, count: int) -> tuple[bytes, Fds]:
    data, fds = b"", Fds()
    try:
        while len(data) < count:
            more, came = await channel.receive(count - len(data))
            fds.extend(came)
            if not more:
                break
            data += more
    except BaseException:
        fds.close()
        raise
    return data, fds
