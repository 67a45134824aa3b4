"""When rings run: the whole table of started and enabled. Section "Ring states"."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from vhostuser.conformance.bench import Need
from vhostuser.conformance.lane import Lane
from vhostuser.conformance.peer import Peer
from vhostuser.conformance.suite import Theme
from vhostuser.protocol import VirtioFeature

CASES: Theme[Peer] = Theme("ring", "Ring states")
RINGS, BIT_30 = Need.RINGS, VirtioFeature.PROTOCOL_FEATURES

# ---- the table: from each state, each event, and whether the ring is processed then

Step = Callable[[Lane], Awaitable[object]]


async def _kick(lane: Lane) -> None:
    lane.kick()
    await lane.kick_seen()  # or it and the kick behind the offer might be one


async def _enable(lane: Lane) -> None:
    await lane.enable()


async def _disable(lane: Lane) -> None:
    await lane.enable(False)


async def _stop(lane: Lane) -> None:
    await lane.stop()


async def _again(lane: Lane) -> None:
    """Sets the ring up again from where it stood, as after a stop; leaves it as enabled as it is."""
    await lane.start(enable=False)


STEPS: dict[str, Step] = {"kick": _kick, "enable": _enable, "disable": _disable, "stop": _stop, "again": _again}

TABLE: dict[str, tuple[str, bool]] = {
    # name: the events, of which the last follows an offer; is the request served?
    "initial": ("", False),
    "stopped-disabled": ("disable", False),
    "stopped-enabled": ("enable", False),
    "started-disabled": ("kick", False),
    "started-enabled": ("enable kick", True),
    "kick-then-enable": ("kick enable", True),
    "enable-disable": ("enable kick disable", False),
    "enable-disable-enable": ("enable kick disable enable", True),
    "disable-before-start": ("enable disable kick", False),
    "disabled-stays-disabled": ("kick disable", False),
    "stop-of-running": ("enable kick stop", False),
    "stop-of-disabled": ("kick stop", False),
    "stop-then-enable": ("kick stop enable", False),
    "stop-keeps-enabled": ("enable kick stop again kick", True),
    "stop-keeps-disabled": ("kick stop again kick", False),
    "disable-while-stopped": ("enable kick stop disable again kick", False),
    "enable-while-stopped": ("kick stop enable again kick", True),
    "twice-enabled": ("enable enable kick", True),
    "twice-kicked": ("enable kick kick", True),
    "twice-stopped": ("enable kick stop stop again kick", True),
    "twice-disabled": ("enable kick disable disable enable", True),
    "stop-before-kick": ("enable stop again kick", True),
}
"""Started and enabled are independent, both false at first: what each sequence of events comes to."""


def _add(name: str, events: str, served: bool) -> None:
    words = f"after {events.replace(' ', ', ')}" if events else "as it was set up"
    disabled = not served and _started(events)
    left = "left alone (a network device drops what is sent)" if disabled else "left alone"
    rule = f"A ring {words} is {'processed' if served else left}."
    # Most back-ends look once when they are given the kick descriptor, and no front-end has come to harm by it.
    add = CASES.should if name == "stopped-enabled" else CASES.must

    @add(f"state.{name}", rule, RINGS, BIT_30)
    async def _(peer: Peer) -> None:
        lane = await peer.lane(enable=False)
        for event in events.split():
            await STEPS[event](lane)
        lane.offer()
        if _started(events):
            lane.kick()
        await (lane.served() if served else lane.without_effect() if disabled else lane.idle())


def _started(events: str) -> bool:
    """Is a ring started after these? If not, a kick would start it."""
    return events.rfind("kick") > events.rfind("stop")


for _name, (_events, _served) in TABLE.items():
    _add(_name, _events, _served)
