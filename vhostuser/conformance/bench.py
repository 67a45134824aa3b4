"""Where cases about back-ends are tried: what this back-end offers, and a fresh one for every case.

What belongs here: which needs are met, a case's surroundings from beginning to end. What does not: what a case does
(``peer``), processes (``subject``).
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from vhostuser.conformance.frames import NetFeature
from vhostuser.conformance.nic import loops
from vhostuser.conformance.peer import Peer
from vhostuser.conformance.subject import Subject
from vhostuser.conformance.suite import Unreachable, Violation
from vhostuser.frontend import Frontend
from vhostuser.protocol import ProtocolFeature, VhostUserError, VirtioFeature
from vhostuser.uffd import NotPermitted, Userfaultfd

_BLK_RO, _BLK_DISCARD, _BLK_WRITE_ZEROES = 5, 13, 14


class Device(Enum):
    """What kind of device the back-end is."""

    BLK = "blk"
    NET = "net"
    GENERIC = "generic"


class Need(Enum):
    """What a case may need beside features."""

    RINGS = "a device whose requests this suite knows (--device), or a ring that returns any (--ring)"
    BLK = "a block device (--device=blk)"
    WRITABLE = "a block device that may be written to"
    DISCARD = "a block device that offers DISCARD"
    WRITE_ZEROES = "a block device that offers WRITE_ZEROES"
    NET = "a network device (--device=net)"
    LOOP = "a network device whose frames come back as they were sent, such as vhostuser-net --end=loopback"
    TWO_PAIRS = "a network device with two queue pairs or more, all of which return their frames"
    TWO_RINGS = "a device with two rings or more"
    BOTH_RINGS = "a device with two rings or more, whose requests this suite knows (--device)"
    NO_RING_255 = "a device with fewer than 256 rings"
    PROCESS = "a back-end that this suite may kill (--start)"
    USERFAULTFD = "a userfaultfd that handles kernel faults (root, or access to /dev/userfaultfd)"


@dataclass(frozen=True)
class Settings:
    """Where the back-end is and how long to wait, in seconds.

    command: a template for ``command_of``; empty: it listens on ``path`` already. keep: go on with the same process
    after a case that passed. patience: for an answer. quiet: how long to look on where nothing may happen. loops: a
    network device's frames come back; if it is not known that they do, that is tried. ring: of a device that this suite
    does not know, the ring that returns whatever it is given.
    """

    path: Path | None
    command: str = ""
    keep: bool = False
    device: Device = Device.BLK
    patience: float = 3.0
    quiet: float = 0.05
    loops: bool = False
    ring: int | None = None


@dataclass(frozen=True)
class Survey:
    """What the back-end offers and how many rings it has; looked up once. once: it ends when its front-end has gone.
    loops: a network device's frames come back."""

    features: int = 0
    protocol_features: int = 0
    queues: int = 1
    once: bool = False
    loops: bool = False

    def offers(self, feature: ProtocolFeature | VirtioFeature | NetFeature) -> bool:
        """Is this feature among what is offered?"""
        bits = self.protocol_features if isinstance(feature, ProtocolFeature) else self.features
        return bool(bits & feature.mask)


class BackendBench:
    """A ``suite.Bench`` for one back-end. Call ``look`` first, and ``close`` at the end."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.survey = Survey()
        self._kept: list[Subject] = []

    async def look(self) -> Survey:
        """Asks the back-end what it offers. Raises Unreachable also for one that cannot say that much."""
        subject = self._subject()
        try:
            async with await subject.connect() as frontend:
                survey = await _look(frontend)
            self.survey = replace(survey, once=await subject.leaves())
        except (VhostUserError, ConnectionError) as error:
            raise Unreachable(f"the back-end does not say what it offers: {error}") from None
        finally:
            await subject.close()
        if self.settings.device is Device.NET:
            self.survey = replace(self.survey, loops=self.settings.loops or await self._loops())
        return self.survey

    async def _loops(self) -> bool:
        """A back-end with which this goes wrong in any way returns nothing; which way is for the cases to find."""
        try:
            async with self.open() as peer:
                return await loops(peer)
        except (Violation, VhostUserError, TimeoutError, ConnectionError):
            return False

    def _subject(self) -> Subject:
        settings = self.settings
        return Subject(settings.path, settings.command, patience=settings.patience, once=self.survey.once)

    async def close(self) -> None:
        """Ends the processes that were kept."""
        while self._kept:
            await self._kept.pop().close()

    def lacks(self, needs: Sequence[Enum]) -> str:
        for need in needs:
            if isinstance(need, NetFeature) and not self._has(Need.NET):
                return f"needs {Need.NET.value}"
            if isinstance(need, ProtocolFeature | VirtioFeature | NetFeature) and not self.survey.offers(need):
                return f"{need.name} is not offered"
            if isinstance(need, Need) and not self._has(need):
                return f"needs {need.value}"
        return ""

    def _has(self, need: Need) -> bool:
        device = self.settings.device
        match need:
            case Need.RINGS:
                return device is not Device.GENERIC or self.settings.ring is not None
            case Need.NET | Need.LOOP | Need.TWO_PAIRS:
                return self._network_has(need)
            case Need.BLK | Need.WRITABLE | Need.DISCARD | Need.WRITE_ZEROES:
                return self._disk_has(need)
            case Need.TWO_RINGS:
                return self.survey.queues > 1
            case Need.BOTH_RINGS:
                return self.survey.queues > 1 and device is not Device.GENERIC
            case Need.NO_RING_255:
                # What a network device tells are pairs.
                return self.survey.queues * (2 if device is Device.NET else 1) < 256
            case Need.PROCESS:
                return bool(self.settings.command)
            case Need.USERFAULTFD:
                return _userfaultfd()

    def _disk_has(self, need: Need) -> bool:
        features = self.survey.features
        bits = {Need.DISCARD: _BLK_DISCARD, Need.WRITE_ZEROES: _BLK_WRITE_ZEROES}
        offered = bool(features >> bits[need] & 1) if need in bits else True
        read_only = need is Need.WRITABLE and bool(features >> _BLK_RO & 1)
        return self.settings.device is Device.BLK and offered and not read_only

    def _network_has(self, need: Need) -> bool:
        if self.settings.device is not Device.NET:
            return False
        loops = need is Need.NET or self.survey.loops
        return loops and (need is not Need.TWO_PAIRS or self.survey.queues > 1)

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[Peer]:
        """A peer on a connection of its own, to a process of its own if we start it and do not keep it."""
        settings = self.settings
        subject = self._kept.pop() if self._kept else self._subject()
        try:
            net = settings.device is Device.NET
            frontend = await subject.connect()
            peer = Peer(frontend, subject, settings.patience, settings.quiet, net=net, ring=settings.ring)
            try:
                yield peer
            finally:
                peer.close()
            await subject.survived(settings.quiet)
        except BaseException:
            await subject.close()
            raise
        if settings.keep and subject.lives:
            self._kept.append(subject)
        else:
            await subject.close()


async def _look(frontend: Frontend) -> Survey:
    features = await frontend.get_features()
    if not features & VirtioFeature.PROTOCOL_FEATURES.mask:
        return Survey(features)
    protocol = await frontend.get_protocol_features()
    if not protocol & ProtocolFeature.MQ.mask:
        return Survey(features, protocol)
    await frontend.set_protocol_features(ProtocolFeature.MQ.mask)
    return Survey(features, protocol, await frontend.get_queue_num())


def _userfaultfd() -> bool:
    try:
        Userfaultfd.probe()
    except NotPermitted:
        return False
    return True
