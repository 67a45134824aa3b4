"""What rings tell the front-end by messages: calls and errors, where INBAND_NOTIFICATIONS was negotiated.

What belongs here: how many of them are under way, what becomes of one that cannot be sent now, and all the ways in
which a broken ring is told. What does not: eventfds (``ring``), the channel and when it may be used
(``announcements``).

"Too many messages on the sockets can cause the sending application(s) to block" (In-band notifications): so the next
call of a ring waits for the answer to the one before, and stands for all that were wanted meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from functools import partial

from vhostuser.announcements import Announcements
from vhostuser.backend_channel import Answered
from vhostuser.protocol import BackendRequest, BackendSession, ProtocolFeature, RequestRefused, VringState
from vhostuser.ring import Ring

_Message = tuple[BackendRequest, int]


class RingMessages:
    """Of one connection. Control thread only; nothing here waits."""

    def __init__(self, session: BackendSession, announcements: Announcements) -> None:
        self._session = session
        self._announcements = announcements
        self._due: set[_Message] = set()
        self._out: set[_Message] = set()

    def negotiated(self, rings: Iterable[Ring], protocol_features: int) -> None:
        """From here rings without a word about their calls have them sent as messages, or no longer."""
        in_band = bool(protocol_features & ProtocolFeature.INBAND_NOTIFICATIONS.mask)
        if in_band != self._session.has(ProtocolFeature.INBAND_NOTIFICATIONS):
            for ring in rings:
                ring.call_in_band(partial(self.call, ring.index) if in_band else None)

    def call(self, index: int) -> None:
        """Ring ``index`` has something for the driver."""
        self._say((BackendRequest.VRING_CALL, index))

    def broke(self, ring: Ring) -> None:
        """The ring cannot go on. To the driver that is a device that needs a reset (virtio 1.3, 2.1.2)."""
        if not ring.signal_err() and self._session.has(ProtocolFeature.INBAND_NOTIFICATIONS):
            self._say((BackendRequest.VRING_ERR, ring.index))
        if self._session.has(ProtocolFeature.STATUS):
            self._session.ask_for_reset()
            self._announcements.config_changed()

    def _say(self, message: _Message) -> None:
        self._due.add(message)
        self.send_due()

    def send_due(self) -> None:
        """Tries again what could not be sent: there was no channel yet, or the device was suspended."""
        for code, index in sorted(self._due - self._out):
            try:
                answered = self._announcements.request(code, VringState(index))
            except RequestRefused:
                return
            self._due.discard((code, index))
            self._out.add((code, index))
            answered.add_done_callback(partial(self._answered, (code, index)))

    def _answered(self, message: _Message, answered: asyncio.Future[Answered]) -> None:
        self._out.discard(message)
        if answered.cancelled() or answered.exception() is not None:
            self._due.add(message)  # until something changes: at once it would be refused again
        else:
            self.send_due()
