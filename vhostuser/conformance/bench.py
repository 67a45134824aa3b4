"""Where cases about back-ends are tried: what this back-end offers, and a fresh one for every case.

What belongs here: which needs are met, a case's surroundings from beginning to end. What does not: what a case does
(``peer``), processes (``subject``).
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from vhostuser.conformance.peer import Peer
from vhostuser.conformance.subject import Subject, command_of
from vhostuser.conformance.suite import Unreachable
from vhostuser.frontend import Frontend
from vhostuser.protocol import ProtocolFeature, VhostUserError, VirtioFeature
from vhostuser.uffd import NotPermitted, Userfaultfd

_BLK_RO, _BLK_MQ = 5, 12


class Device(Enum):
    """What kind of device the back-end is."""

    BLK = "blk"
    NET = "net"
    GENERIC = "generic"


class Need(Enum):
    """What a case may need beside features."""

    RINGS = "a device whose requests this suite knows (--device)"
    BLK = "a block device (--device=blk)"
    WRITABLE = "a block device that may be written to"
    TWO_RINGS = "a device with two rings or more"
    PROCESS = "a back-end that this suite may kill (--start)"
    SAME_MACHINE = "the right to look into the back-end's /proc"
    USERFAULTFD = "a userfaultfd that handles kernel faults (root, or access to /dev/userfaultfd)"


@dataclass(frozen=True)
class Settings:
    """Where the back-end is and how long to wait, in seconds.

    command: a template for ``command_of``; empty: it listens on ``path`` already. patience: for an answer. quiet: how
    long to look on where nothing may happen.
    """

    path: Path | None
    command: str = ""
    device: Device = Device.BLK
    patience: float = 3.0
    quiet: float = 0.05


@dataclass(frozen=True)
class Survey:
    """What the back-end offers and how many rings it has; looked up once."""

    features: int = 0
    protocol_features: int = 0
    queues: int = 1

    def offers(self, feature: ProtocolFeature | VirtioFeature) -> bool:
        """Is this feature among what is offered?"""
        bits = self.protocol_features if isinstance(feature, ProtocolFeature) else self.features
        return bool(bits & feature.mask)


class BackendBench:
    """A ``suite.Bench`` for one back-end. Call ``survey`` first."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.survey = Survey()

    async def look(self) -> Survey:
        """Asks the back-end what it offers. Raises Unreachable also for one that cannot say that much."""
        async with self._subject() as subject:
            try:
                async with await subject.connect() as frontend:
                    self.survey = await _look(frontend)
            except (VhostUserError, ConnectionError) as error:
                raise Unreachable(f"the back-end does not say what it offers: {error}") from None
        return self.survey

    def lacks(self, needs: Sequence[Enum]) -> str:
        for need in needs:
            if isinstance(need, ProtocolFeature | VirtioFeature) and not self.survey.offers(need):
                return f"{need.name} is not offered"
            if isinstance(need, Need) and not self._has(need):
                return f"needs {need.value}"
        return ""

    def _has(self, need: Need) -> bool:
        device, features = self.settings.device, self.survey.features
        match need:
            case Need.RINGS:
                return device is not Device.GENERIC
            case Need.BLK:
                return device is Device.BLK
            case Need.WRITABLE:
                return device is Device.BLK and not features >> _BLK_RO & 1
            case Need.TWO_RINGS:
                return self.survey.queues > 1
            case Need.PROCESS | Need.SAME_MACHINE:
                return bool(self.settings.command)
            case Need.USERFAULTFD:
                return _userfaultfd()

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[Peer]:
        """A peer on a connection of its own, with ``--start`` to a process of its own."""
        settings = self.settings
        async with self._subject() as subject:
            peer = Peer(
                await subject.connect(), subject, settings.patience, settings.quiet, net=settings.device is Device.NET
            )
            try:
                yield peer
            finally:
                peer.close()
            await subject.survived(settings.quiet)

    @contextlib.asynccontextmanager
    async def _subject(self) -> AsyncIterator[Subject]:
        with tempfile.TemporaryDirectory(prefix="conform-") as name:
            directory = Path(name)
            path: Path | None = self.settings.path
            command: Sequence[str] = ()
            if self.settings.command:
                path, command = command_of(self.settings.command, directory)
            assert path is not None
            subject = Subject(path, command, patience=self.settings.patience, directory=directory)
            try:
                yield subject
            finally:
                await subject.close()


async def _look(frontend: Frontend) -> Survey:
    features = await frontend.get_features()
    if not features & VirtioFeature.PROTOCOL_FEATURES.mask:
        return Survey(features)
    protocol = await frontend.get_protocol_features()
    if not protocol & ProtocolFeature.MQ.mask:
        return Survey(features, protocol)
    return Survey(features, protocol, await frontend.get_queue_num())


def _userfaultfd() -> bool:
    try:
        Userfaultfd.probe()
    except NotPermitted:
        return False
    return True
