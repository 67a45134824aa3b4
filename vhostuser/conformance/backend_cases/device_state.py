"""The device's own state on its way out of a back-end and into another. Section "Migrating back-end state".

What belongs here: rules about the channel, its end, and the check. What does not: what the bytes mean, which is the
device's affair: a state that was saved is the only one that must be taken.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress

from vhostuser.conformance.bench import Need
from vhostuser.conformance.peer import Peer
from vhostuser.conformance.suite import Skipped, Theme, check, equal
from vhostuser.frontend import Frontend
from vhostuser.protocol import (
    DeviceStateTransfer,
    FrontendRequest,
    ProtocolFeature,
    RequestRefused,
    TransferDirection,
)

F = FrontendRequest
CASES: Theme[Peer] = Theme("state", "Migrating back-end state")
DEVICE, RINGS = ProtocolFeature.DEVICE_STATE, Need.RINGS
SAVE, LOAD = TransferDirection.SAVE, TransferDirection.LOAD
SET = F.SET_DEVICE_STATE_FD.clause
_PIPE = 4096


async def _channel(peer: Peer, direction: TransferDirection, *, filled: bool = False) -> int:
    """Our end of a channel on which the state begins to move: of a pipe, or of what the back-end prefers.

    filled: there is no room in the pipe for what is saved, before a page of zeros is read.
    """
    read, write = peer.pipe()
    if filled:
        fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, _PIPE)
        await peer.write(write, bytes(_PIPE))
    ours, theirs = (read, write) if direction is SAVE else (write, read)
    os.set_blocking(theirs, True)  # what QEMU gives, and what a back-end may read and write without looking
    preferred = await peer.frontend.set_device_state_fd(direction, theirs)
    peer.drop(theirs)
    if preferred is None:
        return ours
    peer.drop(ours)
    return peer.keep(preferred)


async def _rest(peer: Peer, channel: int) -> bytes:
    """What comes until the end of the channel."""
    state = b""
    while piece := await peer.read(channel):
        state += piece
    return state


async def _save(peer: Peer) -> bytes:
    return await _rest(peer, await _channel(peer, SAVE))


async def _saved(peer: Peer) -> bytes:
    """A state that can be loaded, and a connection on which that has yet to be done. Raises Skipped."""
    await peer.negotiate()
    state = await _save(peer)
    await peer.frontend.check_device_state()
    if not state:
        raise Skipped("the device has a state of no bytes")
    await _anew(peer)
    await _load(peer, state)
    if not await _checks(peer):
        raise Skipped("the device does not take what it has saved, see state.load")
    await _anew(peer)
    return state


async def _anew(peer: Peer) -> Frontend:
    await peer.again()
    return await peer.negotiate()


async def _load(peer: Peer, *pieces: bytes) -> None:
    channel = await _channel(peer, LOAD)
    with suppress(BrokenPipeError):  # it may have seen enough
        for piece in pieces:
            await peer.write(channel, piece)
    peer.drop(channel)


async def _checks(peer: Peer) -> bool:
    """Is CHECK_DEVICE_STATE done?"""
    return (await peer.react(F.CHECK_DEVICE_STATE)).body == bytes(8)


async def _is_refused(peer: Peer, *pieces: bytes) -> None:
    """Loading this must be refused, when it begins or by the check."""
    with suppress(RequestRefused):
        await _load(peer, *pieces)
        check(not await _checks(peer), "an error from CHECK_DEVICE_STATE", "success")


# ---- saving


@CASES.must("save", "The state is written until the end of the channel, and checks.", DEVICE)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    await _save(peer)
    await peer.frontend.check_device_state()


@CASES.must("reply", "The reply has bit 8 just where no descriptor comes along, and no error.", DEVICE, section=SET)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    _, write = peer.pipe()
    reaction = await peer.react(F.SET_DEVICE_STATE_FD, DeviceStateTransfer(SAVE), (write,))
    equal("the reply", reaction.body.hex(), (0 if reaction.fds else 0x100).to_bytes(8, "little").hex())


@CASES.must("twice", "A second migration can be made after the first.", DEVICE)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    for _ in range(2):
        await _save(peer)
        await peer.frontend.check_device_state()


@CASES.must("slow-reader", "While the state waits for its reader the front-end is answered.", DEVICE)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    channel = await _channel(peer, SAVE, filled=True)
    await peer.frontend.get_features()
    await peer.frontend.get_features()
    await _rest(peer, channel)
    await peer.frontend.check_device_state()


@CASES.must("reader-gone", "A state whose reader has gone does not check, and ends no process (SIGPIPE).", DEVICE)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    if not await _save(peer):
        raise Skipped("the device has a state of no bytes")
    await _anew(peer)
    channel = await _channel(peer, SAVE, filled=True)
    peer.drop(channel)
    check(not await _checks(peer), "an error from CHECK_DEVICE_STATE", "success")
    await peer.answers()


# ---- loading


@CASES.must("load", "A state that was saved can be loaded, and checks.", DEVICE)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    state = await _save(peer)
    await _anew(peer)
    await _load(peer, state)
    await peer.frontend.check_device_state()


@CASES.must("in-pieces", "A state may come byte by byte.", DEVICE)
async def _(peer: Peer) -> None:
    state = await _saved(peer)
    channel = await _channel(peer, LOAD)
    for number in range(min(len(state), 64)):
        await peer.write(channel, state[number : number + 1])
        await peer.frontend.get_features()
    await peer.write(channel, state[64:])
    peer.drop(channel)
    await peer.frontend.check_device_state()


@CASES.should("loaded", "What was loaded is what is saved next.", DEVICE)
async def _(peer: Peer) -> None:
    state = await _saved(peer)
    await _load(peer, state)
    await peer.frontend.check_device_state()
    check(await _save(peer) == state, "the state that was loaded", "another")


@CASES.must("slow-writer", "While the state is on its way the front-end is answered.", DEVICE)
async def _(peer: Peer) -> None:
    state = await _saved(peer)
    channel = await _channel(peer, LOAD)
    await peer.frontend.get_features()
    await peer.frontend.get_features()
    await peer.write(channel, state)
    peer.drop(channel)
    await peer.frontend.check_device_state()


@CASES.must("cut-off", "A state that ends too early does not check.", DEVICE)
async def _(peer: Peer) -> None:
    state = await _saved(peer)
    await _is_refused(peer, state[: len(state) // 2])


@CASES.must("empty", "A channel that is closed at once has brought no state.", DEVICE)
async def _(peer: Peer) -> None:
    await _saved(peer)
    await _is_refused(peer)


@CASES.should("too-long", "A state with something behind its end does not check.", DEVICE)
async def _(peer: Peer) -> None:
    state = await _saved(peer)
    await _is_refused(peer, state, b"\xa5" * 16)


@CASES.should("nonsense", "Bytes that nobody saved do not check.", DEVICE)
async def _(peer: Peer) -> None:
    state = await _saved(peer)
    await _is_refused(peer, bytes(byte ^ 0xA5 for byte in state))


@CASES.must("after-failure", "A state may be loaded after one that was of no use.", DEVICE)
async def _(peer: Peer) -> None:
    state = await _saved(peer)
    await _is_refused(peer, state[: len(state) // 2])
    await _load(peer, state)
    await peer.frontend.check_device_state()


@CASES.must("left", "A front-end that leaves in the middle of a state does no harm.", DEVICE)
async def _(peer: Peer) -> None:
    state = await _saved(peer)
    channel = await _channel(peer, LOAD)
    await peer.write(channel, state[: len(state) // 2])
    await _anew(peer)
    peer.drop(channel)
    await _load(peer, state)
    await peer.frontend.check_device_state()


@CASES.must("descriptors", "Transfers leave no descriptor behind.", DEVICE)
async def _(peer: Peer) -> None:
    state = await _saved(peer)
    before = peer.open_fds()
    for _ in range(10):
        await _save(peer)
        await peer.frontend.check_device_state()
        await _load(peer, state)
        await peer.frontend.check_device_state()
    check(peer.open_fds() <= before + 1, f"{before} descriptors", f"{peer.open_fds()} after 20 transfers")


# ---- when, and what there is not


async def _while_running(peer: Peer, direction: TransferDirection) -> None:
    lane = await peer.lane()
    await lane.works()
    read, write = peer.pipe()
    await peer.refuses(F.SET_DEVICE_STATE_FD, DeviceStateTransfer(direction), (write if direction is SAVE else read,))
    await lane.works()


@CASES.must("running", "While a ring runs no state is saved.", DEVICE, RINGS)
async def _(peer: Peer) -> None:
    await _while_running(peer, SAVE)


@CASES.must("load-running", "While a ring runs no state is loaded.", DEVICE, RINGS)
async def _(peer: Peer) -> None:
    await _while_running(peer, LOAD)


@CASES.must("goes-on", "A device whose state was saved goes on, as after a migration that has failed.", DEVICE, RINGS)
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    await lane.works()
    await lane.stop()
    await _save(peer)
    await peer.frontend.check_device_state()
    await lane.start()
    await lane.works()


@CASES.must("direction", "A direction that there is not is refused.", DEVICE, section=SET)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    _, write = peer.pipe()
    await peer.refuses(F.SET_DEVICE_STATE_FD, DeviceStateTransfer(2), (write,))


@CASES.must("phase", "A phase that there is not is refused.", DEVICE, section=SET)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    _, write = peer.pipe()
    await peer.refuses(F.SET_DEVICE_STATE_FD, DeviceStateTransfer(SAVE, 1), (write,))


@CASES.should("check-alone", "A check without a transfer is answered.", DEVICE)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    reaction = await peer.react(F.CHECK_DEVICE_STATE)
    check(len(reaction.body) == 8, "a u64", str(reaction))
