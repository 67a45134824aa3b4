"""A process that shares guest memory and has a userfaultfd of its own, as a back-end has.

    python client.py FD

FD is a SOCK_SEQPACKET socket. The first message names the regions and the mode, their files come with it; the answer is
where they are mapped here, and the userfaultfd. Then each message is a list of reads to do, each list on a thread of
its own; each thread answers when it has done its list. A message "exit" ends the process.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
from dataclasses import dataclass

from vhostuser.memory import GuestMemory, MemoryLost, Region
from vhostuser.protocol import MemoryRegion
from vhostuser.uffd import Mode, Userfaultfd


def content(guest: int, length: int) -> bytes:
    """What every test memory holds at ``guest``, a multiple of 4096: each 8 bytes of a small page hold its number plus
    one, so that neither zeros nor a page that is half written can pass for it."""
    return b"".join((guest // 4096 + n + 1).to_bytes(8, "little") * 512 for n in range(length // 4096))


@dataclass
class Answer:
    """What came of a list of reads."""

    job: int
    wrong: list[int]
    """Guest addresses of small pages that did not hold what they should, at the moment when they were read."""
    lost: list[int]
    """Reads that ended in an error: poisoned or revoked memory."""


def wrong_pages(guest: int, data: bytes) -> list[int]:
    expected = content(guest, len(data))
    if data == expected:
        return []
    pages = range(0, len(data), 4096)
    return [guest + at for at in pages if data[at : at + 4096] != expected[at : at + 4096]]


def read_all(memory: GuestMemory, job: int, reads: list[list[int]]) -> Answer:
    """Reads (guest address, bytes) one after the other; each may wait for its pages."""
    answer = Answer(job, [], [])
    for guest, length in reads:
        try:
            answer.wrong += wrong_pages(guest, memory.read(guest, length))
        except MemoryLost:
            answer.lost.append(guest)
    return answer


def share(sock: socket.socket) -> tuple[GuestMemory, Userfaultfd]:
    """The first message and its answer."""
    message, fds, _, _ = socket.recv_fds(sock, 1 << 16, 64)
    hello = json.loads(message)
    regions = [
        Region.map(fd, MemoryRegion(guest, size, 1 << 44 | guest, offset), hidden=True)
        for fd, (guest, size, offset) in zip(fds, hello["regions"], strict=True)
    ]
    uffd = Userfaultfd.open()
    for region in regions:
        region.no_huge()
        uffd.register(region.base, region.length, Mode(hello["mode"]))
        region.reveal()
    socket.send_fds(sock, [json.dumps([region.host for region in regions]).encode()], [uffd.fileno()])
    return GuestMemory(regions), uffd


def main(sock: socket.socket) -> None:
    memory, uffd = share(sock)

    def work(job: int, reads: list[list[int]]) -> None:
        sock.send(json.dumps(vars(read_all(memory, job, reads))).encode())

    while (message := sock.recv(1 << 20)) and message != b"exit":
        order = json.loads(message)
        for job, reads in order:
            threading.Thread(target=work, args=(job, reads), daemon=True).start()
    uffd.close()


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
