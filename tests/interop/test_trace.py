"""A live migration by postcopy through tracers: QEMU and back-ends notice nothing, and every message is known."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from vhostuser.tools.lab import backend as lab_backend
from vhostuser.tools.lab.backend import BackendProcess
from vhostuser.tools.lab.bench import Bench
from vhostuser.tools.lab.machine import Hardware
from vhostuser.tools.lab.observation import observe_postcopy
from vhostuser.tools.lab.workload import Disk, fill_md5, fill_memory

pytestmark = [pytest.mark.interop, pytest.mark.postcopy, pytest.mark.timeout(180)]

HARDWARE = Hardware()


async def tracer(bench: Bench, backend: BackendProcess, image: Path) -> tuple[BackendProcess, Path]:
    """A tracer before a back-end, and its transcript."""
    transcript = backend.socket.with_suffix(".trace")
    return await bench.backend(image, command=lab_backend.tracer(backend.socket, transcript)), transcript


def messages(transcript: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in transcript.read_text().splitlines()]
    return [line for line in lines if line["event"] == "message"]


async def test_a_postcopy_migration_through_tracers(bench: Bench) -> None:
    image = bench.disk(64)
    disk = Disk(bench.guest, image)
    before, after = await bench.backend(image), await bench.backend(image)
    (near, sent), (far, received) = await tracer(bench, before, image), await tracer(bench, after, image)
    source = await bench.machine(HARDWARE, near)
    await bench.guest.booted()
    fill = await fill_memory(bench.guest, 96)
    migration = bench.migration(source, await bench.destination(HARDWARE, far), postcopy=True)
    async with disk.read_throughout():
        await disk.hold_dirty(8)
        await migration.start()
        await migration.switch()
        flushed = bench.guest.run("sync", within=120)
        seen, _ = await asyncio.gather(observe_postcopy(migration, after, faults=20, requests=20), flushed)
    assert seen.bases
    assert not seen.wrong_bases
    assert await fill_md5(bench.guest) == fill
    assert await disk.guest_md5(0, 64) == disk.md5(0, 64)
    for transcript in (sent, received):
        assert not [line for line in messages(transcript) if line["violations"]]
    passed = messages(received)
    handshake = [line["message"] for line in passed if line["kind"] == "request" and "POSTCOPY" in line["message"]]
    assert handshake == ["POSTCOPY_ADVISE", "POSTCOPY_LISTEN", "POSTCOPY_ACK", "POSTCOPY_END"]
    (advised,) = [line for line in passed if line["message"] == "POSTCOPY_ADVISE" and line["kind"] == "reply"]
    assert [what["kind"] for what in advised["fds"]] == ["userfaultfd"]
