"""The public test kit: what it promises, and that its leak checks see leaks."""

import asyncio
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vhostuser.device import Device
from vhostuser.frontend import DRIVABLE, Frontend, SharedMemory
from vhostuser.protocol import U64, Header, ProtocolFeature, VirtioFeature, VringState
from vhostuser.protocol import FrontendRequest as F
from vhostuser.testing import leaks
from vhostuser.testing.pair import Pair
from vhostuser.testing.peer import Answer, Expect, ScriptedPeer, ScriptFailed, Send, asking
from vhostuser.virtqueue import Request

ROOT = Path(__file__).parents[2]
FEATURES = Expect(F.GET_FEATURES)


class Reverse(Device):
    """Answers backwards."""

    virtio_id = 63
    queues = 2

    async def handle(self, request: Request) -> None:
        request.write(request.read()[::-1])


# ---- pairs


@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize("event_idx", [False, True])
async def test_a_pair_is_ready_for_requests(
    no_leaks: None, no_mappings: None, pairs: Callable[..., Pair], indirect: bool, event_idx: bool
) -> None:
    pair = pairs(Reverse())
    without = 0 if event_idx else VirtioFeature.RING_EVENT_IDX.mask
    await pair.set_up(rings=2, indirect=indirect, features=DRIVABLE & ~without)
    assert pair.memory is not None
    for ring in pair.rings:
        pair.memory.write(1 << 20, b"abc")
        ring.queue.offer(readable=[(1 << 20, 3)], writable=[(2 << 20, 3)])
        assert ring.queue.publish()
        ring.kick()
        while not (returned := ring.queue.take()) and not ring.queue.arm():
            await ring.called()
        assert returned in ((0, 3), None)
        assert pair.memory.read(2 << 20, 3) == b"cba"
    await pair.close()
    await pair.close()


async def test_a_pair_may_share_any_memory(
    pairs: Callable[..., Pair], guest_memory: Callable[..., SharedMemory]
) -> None:
    memory = guest_memory((0, 1 << 20), (1 << 32, 1 << 20), sealed=True)
    pair = pairs(Reverse())
    await pair.set_up(memory=memory)
    assert [r.guest for r in pair.backend.connections[0].memory.regions] == [0, 1 << 32]


# ---- scripts


async def test_a_script_that_is_followed(scripted_backend: tuple[Frontend, ScriptedPeer]) -> None:
    frontend, peer = scripted_backend
    script = peer.follow(FEATURES, Answer(U64(7)), Expect(F.SET_OWNER, need_reply=False, fds=0))
    features, _, _ = await asyncio.gather(frontend.get_features(), frontend.set_owner(), script)
    assert features == 7


WRONG = {
    "request 1": Expect(F.SET_OWNER),
    "payload empty": Expect(F.GET_FEATURES, U64(1)),
    "need_reply False": Expect(F.GET_FEATURES, need_reply=True),
    "0 descriptors": Expect(F.GET_FEATURES, fds=1),
    "a request": Expect(F.GET_FEATURES, reply=True),
}


@pytest.mark.parametrize("words", WRONG)
async def test_another_message_is_named_with_its_step(
    scripted_backend: tuple[Frontend, ScriptedPeer], words: str
) -> None:
    frontend, peer = scripted_backend
    asking = asyncio.ensure_future(frontend.get_features())
    with pytest.raises(ScriptFailed, match=rf"step 0, .*: came: .*{words}"):
        await peer.follow(WRONG[words])
    asking.cancel()


async def test_silence_and_the_end_of_the_stream_are_failures(scripted_backend: tuple[Frontend, ScriptedPeer]) -> None:
    frontend, peer = scripted_backend
    peer._timeout = 0.01
    with pytest.raises(ScriptFailed, match=r"nothing came for 0\.01 s"):
        await peer.follow(FEATURES)
    with pytest.raises(ScriptFailed, match="nothing came"):
        await peer.closed()
    frontend.close()
    with pytest.raises(ScriptFailed, match="was closed"):
        await peer.receive()
    await peer.closed()


async def test_a_scripted_front_end_drives_a_device(
    no_leaks: None, scripted_frontend: Callable[..., ScriptedPeer]
) -> None:
    peer = scripted_frontend(Reverse())
    acks = ProtocolFeature.REPLY_ACK.mask
    await peer.follow(
        *(Send(F.GET_PROTOCOL_FEATURES), Expect(F.GET_PROTOCOL_FEATURES, reply=True)),
        *(asking(Send(F.SET_PROTOCOL_FEATURES, U64(acks))), Expect(F.SET_PROTOCOL_FEATURES, U64(0), reply=True)),
        *(asking(Send(F.SET_VRING_NUM, VringState(0, 64))), Expect(F.SET_VRING_NUM, U64(0), reply=True)),
        *(asking(Send(F.SET_VRING_NUM, VringState(9, 64))), Expect(F.SET_VRING_NUM, U64(1), reply=True)),
        Send(F.SET_OWNER, b"a payload that it cannot have"),
    )
    await peer.closed()


# ---- leaks


def test_an_open_descriptor_is_named() -> None:
    fd = -1
    with pytest.raises(AssertionError, match=r"descriptors left open: .*memfd:forgotten"), leaks.no_open_fds():
        fd = os.memfd_create("forgotten")
    os.close(fd)


def test_a_mapping_is_named_while_somebody_refers_to_it() -> None:
    memory = SharedMemory()
    with pytest.raises(AssertionError, match=r"files left mapped: .*memfd:guest"), leaks.no_mappings():
        memory.add(0, 4096)
    memory.close()
    with leaks.no_mappings():
        cycle: list[object] = [SharedMemory((0, 4096))]
        cycle.append(cycle)
        cycle[0].close()  # type: ignore[attr-defined]
        del cycle


# ---- the example and the page


def test_the_example_runs_as_its_author_runs_it(tmp_path: Path) -> None:
    """In a directory of its own, without any configuration."""
    source = (ROOT / "examples" / "test_ramdisk.py").read_text()
    assert len([line for line in source.splitlines() if line.strip()]) < 40
    assert "3 passed" in run_in(tmp_path, "ramdisk.py", "test_ramdisk.py")


def test_the_small_devices_run_as_their_author_runs_them(tmp_path: Path) -> None:
    said = run_in(tmp_path, "echo.py", "keyboard.py", "notebook.py", "rng.py", "test_devices.py")
    assert "passed" in said
    assert "skipped" not in said


def run_in(directory: Path, *names: str) -> str:
    """The output of pytest on the last of these examples, all of them copied to a directory of their own."""
    for name in names:
        shutil.copy(ROOT / "examples" / name, directory)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", names[-1]]
    done = subprocess.run(
        command, cwd=directory, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_page_names_every_fixture() -> None:
    page = (ROOT / "docs" / "testing.md").read_text()
    plugin = (ROOT / "vhostuser" / "testing" / "plugin.py").read_text()
    for name in re.findall(r"fixture\n(?:async )?def (\w+)", plugin):
        assert f"`{name}`" in page, name


def snippet(word: str) -> str:
    """The page's snippet with this word in it, as the body of a coroutine."""
    page = (ROOT / "docs" / "testing.md").read_text()
    (found,) = [each for each in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL) if word in each]
    return "async def run():\n" + "".join(f"    {line}\n" for line in found.splitlines())


async def test_the_snippet_about_rings_runs(pairs: Callable[..., Pair]) -> None:
    pair = pairs(Reverse())
    await pair.set_up()
    names: dict[str, Any] = {"ring": pair.rings[0], "queue": pair.rings[0].queue}
    exec(snippet("queue.offer"), names)
    await asyncio.wait_for(names["run"](), 5)


async def test_the_snippet_about_raw_messages_runs(scripted_backend: tuple[Frontend, ScriptedPeer]) -> None:
    frontend, peer = scripted_backend
    names: dict[str, Any] = {"frontend": frontend, "F": F, "Header": Header, "fd": 0}
    exec(snippet("send_raw"), names)
    running = asyncio.ensure_future(names["run"]())
    assert (await peer.receive()).body == b"abc"
    await peer.follow(FEATURES, Answer(U64(0)))
    await asyncio.wait_for(running, 5)


async def test_the_snippet_about_scripts_runs(scripted_backend: tuple[Frontend, ScriptedPeer]) -> None:
    async def your_code(frontend: Frontend) -> None:
        await frontend.get_features()
        await frontend.set_features(0)

    names: dict[str, Any] = {"scripted_backend": scripted_backend, "your_code": your_code, "asyncio": asyncio}
    names |= {"F": F, "Expect": Expect, "Answer": Answer, "U64": U64}
    exec(snippet("peer.follow"), names)
    await asyncio.wait_for(names["run"](), 5)
