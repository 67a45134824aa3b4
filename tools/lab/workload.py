"""What a guest does while it is watched, and how it is known that it did it right.

``fill`` is memory that nobody touches but the migration. The commands are for the guest's shell, the expectations are
computed on the host from the image file.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

from vhostuser.tools.lab.errors import LabError
from vhostuser.tools.lab.guest import Guest

MIB = 1 << 20

# Buffered, and from an empty page cache: pages just allocated for the disk's data are the ones that a migration has
# not brought yet, and the back-end is the first to touch them.
_READ = """\
rm -f /tmp/stop
echo 64 >/sys/block/vda/queue/read_ahead_kb
while [ ! -e /tmp/stop ]; do
    echo 3 >/proc/sys/vm/drop_caches
    dd if=/dev/vda bs=64k count=$(({mebibytes} * 16)) 2>/dev/null | md5sum
done"""

_WRITE = """\
rm -f /tmp/stop
n=0
while [ ! -e /tmp/stop ]; do
    n=$((n + 1))
    slot=$(({first} + n % {count}))
    dd if=/dev/urandom of=/tmp/chunk bs=256k count=4 2>/dev/null
    dd if=/tmp/chunk of=/dev/vda bs=1M seek=$slot conv=notrunc,fsync 2>/dev/null || exit 1
    echo "$slot $(md5sum </tmp/chunk)"
done"""


class Disk:
    """The guest's `/dev/vda`, seen from both sides: ``image`` is the host's file, of ``mebibytes``.

    Its first part, up to ``writable``, is read and never written; the rest is written.
    """

    def __init__(self, guest: Guest, image: Path, *, writable: int | None = None) -> None:
        self.guest = guest
        self.image = image
        self.mebibytes = image.stat().st_size // MIB
        #: MiB: what is below is only read, the rest is written. The default is the middle.
        self.writable = self.mebibytes // 2 if writable is None else writable

    def md5(self, first: int, count: int) -> str:
        """The checksum of ``count`` MiB of the image from MiB ``first`` on."""
        with self.image.open("rb") as file:
            file.seek(first * MIB)
            return hashlib.md5(file.read(count * MIB)).hexdigest()

    async def guest_md5(self, first: int, count: int) -> str:
        """The same from the guest, which may have it in its page cache."""
        output = await self.guest.run(f"dd if=/dev/vda bs=1M skip={first} count={count} 2>/dev/null | md5sum")
        return output.split()[0]

    @contextlib.asynccontextmanager
    async def read_throughout(self) -> AsyncIterator[None]:
        """Read the first part again and again as long as the context lasts.

        Left without an exception, it raises ``LabError`` if one reading was wrong or there was none.
        """
        expected = self.md5(0, self.writable)
        async with self._throughout(_READ.format(mebibytes=self.writable)) as lines:
            yield
        wrong = [line for line in lines if line.split()[0] != expected]
        if wrong or not lines:
            raise LabError(f"{len(wrong)} of {len(lines)} readings of the disk are wrong")

    @contextlib.asynccontextmanager
    async def write_throughout(self) -> AsyncIterator[None]:
        """Write the second part, chunk by chunk with a flush after each, as long as the context lasts.

        Left without an exception, it raises ``LabError`` if the image does not hold what was last written.
        """
        count = self.mebibytes - self.writable
        async with self._throughout(_WRITE.format(first=self.writable, count=count)) as lines:
            yield
        last = {int(slot): md5 for slot, md5, _ in (line.split() for line in lines)}
        wrong = [slot for slot, md5 in last.items() if self.md5(slot, 1) != md5]
        if wrong or not last:
            raise LabError(f"{len(wrong)} of {len(last)} chunks of the image are not what the guest wrote: {wrong}")

    @contextlib.asynccontextmanager
    async def _throughout(self, script: str) -> AsyncIterator[list[str]]:
        """Run a script that ends on `/tmp/stop`; its lines of output are in the list once the context is left."""
        lines: list[str] = []
        running = asyncio.create_task(self.guest.run(script, within=600))
        try:
            yield lines
            await self.guest.run("touch /tmp/stop")
            lines += (await running).splitlines()
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    async def hold_dirty(self, mebibytes: int) -> None:
        """Write so much of ``fill`` to the second part, into the guest's page cache only: ``sync`` sends it."""
        await self.guest.run(
            "echo 0 >/proc/sys/vm/dirty_writeback_centisecs; echo 90 >/proc/sys/vm/dirty_background_ratio;"
            f"dd if=/tmp/fill of=/dev/vda bs=1M seek={self.writable} count={mebibytes} conv=notrunc"
        )


async def fill_memory(guest: Guest, mebibytes: int) -> str:
    """Fill so much of the guest's memory with random bytes (`/tmp/fill`); returns their checksum."""
    await guest.run(f"dd if=/dev/urandom of=/tmp/fill bs=1M count={mebibytes}")
    return await fill_md5(guest)


async def fill_md5(guest: Guest, mebibytes: int | None = None) -> str:
    """The checksum of what ``fill_memory`` wrote, or of its first MiB, as it is in the guest's memory now."""
    count = "" if mebibytes is None else f"count={mebibytes}"
    return (await guest.run(f"dd if=/tmp/fill bs=1M {count} 2>/dev/null | md5sum")).split()[0]
