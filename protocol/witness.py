"""A third party on the wire: says of each message that passes what it is, what it answers and which rule it breaks.

What belongs here: pairing answers with requests, judging both ends by the rules that their own sessions follow, ring
state as the messages tell it. What does not: bytes on their way, time, what a descriptor is, how it is shown (tools).

Whoever looks on must never give up: what a session would close the connection for is a complaint here, and the next
message is judged as if nothing had happened, except that the objectionable one has changed nothing.
"""

from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, NamedTuple

from vhostuser.protocol.catalog import BACKEND, FRONTEND, Row
from vhostuser.protocol.codec import HEADER_SIZE, Header
from vhostuser.protocol.codes import FrontendRequest as F
from vhostuser.protocol.codes import ProtocolFeature
from vhostuser.protocol.errors import RemoteProtocolError
from vhostuser.protocol.exchange import Client, Request, Server
from vhostuser.protocol.payloads import U64, Payload, VringFd, VringState
from vhostuser.protocol.session import FrontendRequests
from vhostuser.protocol.state import State

MOST_QUEUES: Final = 256
"""A vring index in SET_VRING_KICK has eight bits."""

LARGEST_BODY: Final = 1 << 16
"""Bytes of a payload that are kept to be judged: no message comes near."""

_FRAMING: Final = "Message Specification, Header"


class Side(Enum):
    """Who sends."""

    FRONTEND = "front-end"
    BACKEND = "back-end"

    @property
    def other(self) -> "Side":
        return Side.BACKEND if self is Side.FRONTEND else Side.FRONTEND


class Wire(Enum):
    """The two sockets of a connection."""

    MAIN = "main"
    BACKEND = "backend"

    @property
    def asker(self) -> Side:
        """Whose requests go over it."""
        return Side.FRONTEND if self is Wire.MAIN else Side.BACKEND


class Complaint(NamedTuple):
    """A rule that was broken. section: heading of the specification."""

    section: str
    reason: str


@dataclass(frozen=True, slots=True)
class RingState:
    """A ring as the messages tell it. armed: it has a kick descriptor, whose kicks a witness does not see."""

    index: int
    started: bool
    armed: bool
    enabled: bool

    def __str__(self) -> str:
        life = "started" if self.started else "starts when kicked" if self.armed else "stopped"
        return f"ring {self.index}: {life}, {'enabled' if self.enabled else 'disabled'}"


@dataclass(frozen=True, slots=True, eq=False)
class Message:
    """One message, judged.

    row: the catalog's, None for an unknown id. payload: None where the body fits no layout. answers: the request whose
    reply this is. awaits: an answer is to come. refused: this answer says no. rings: those whose state it has changed.
    """

    wire: Wire
    sender: Side
    header: Header
    body: bytes
    fds: int
    row: Row | None = None
    payload: Payload | None = None
    answers: "Message | None" = None
    awaits: bool = False
    refused: bool = False
    complaints: tuple[Complaint, ...] = ()
    rings: tuple[RingState, ...] = ()

    @property
    def is_request(self) -> bool:
        return self.sender is self.wire.asker

    @property
    def name(self) -> str:
        """The catalog's name, or "request 99"."""
        return str(self.row) if self.row else f"request {self.header.request}"


@dataclass(slots=True)
class _Found:
    """What judging one message brought to light; becomes a Message."""

    row: Row | None = None
    payload: Payload | None = None
    answers: Message | None = None
    awaits: bool = False
    refused: bool = False
    complaints: list[Complaint] = field(default_factory=list)

    def complain(self, error: RemoteProtocolError) -> None:
        self.complaints.append(Complaint(error.clause or _FRAMING, error.reason))


class _Pending(NamedTuple):
    """A request that waits for its answer. judge: pairs the answer; None where the request was objectionable."""

    message: Message
    judge: Client | None


class _Line:
    """One of the two sockets."""

    def __init__(self, rows: Mapping[int, Row], state: State) -> None:
        self._rows = rows
        self._state = state
        self.pending: deque[_Pending] = deque()
        self._judge: Client | None = None

    def request(self, header: Header, body: bytes, fds: Collection[int]) -> _Found:
        found = _Found()
        self._judge = None
        try:
            request = self._open(header, body, fds)
        except RemoteProtocolError as error:
            found.complain(error)
            self._guess(found, header, body)
            return found
        found.row, found.payload = request.row, request.payload
        if request.refusal is not None:
            found.complaints.append(Complaint(request.row.clause, request.refusal.reason))
            found.awaits = self._due(request.row, header)
        else:
            self._judge = Client(self._rows, self._state)
            found.awaits = self._judge.overhear(request)
        return found

    def sent(self, message: Message) -> None:
        """The request that was judged last is on its way."""
        if message.awaits:
            self.pending.append(_Pending(message, self._judge))

    def _open(self, header: Header, body: bytes, fds: Collection[int]) -> Request:
        server = FrontendRequests(self._state) if self._rows is FRONTEND else Server(self._rows, self._state)
        request = server.receive(header.pack(), fds) or server.receive(body)
        assert request is not None
        return request

    def _guess(self, found: _Found, header: Header, body: bytes) -> None:
        """What a message may have been meant for that no session would take."""
        found.row = self._rows.get(header.request)
        if found.row is not None:
            found.payload = _read(found.row.request, body)
        found.awaits = self._due(found.row, header)

    def _due(self, row: Row | None, header: Header) -> bool:
        return bool(row and row.reply) or (header.need_reply and self._state.has(ProtocolFeature.REPLY_ACK))

    def reply(self, header: Header, body: bytes, fds: Collection[int]) -> _Found:
        found = _Found()
        waiting = self._asked(header, found)
        if waiting is None:
            found.row = self._rows.get(header.request)
            found.complaints.append(Complaint(_FRAMING, "a reply that nobody asked for"))
            return found
        found.row, found.answers = waiting.message.row, waiting.message
        if waiting.judge is not None:
            self._pair(waiting.judge, header, body, fds, found)
        if found.row is not None and found.payload is None:
            found.payload = _read(found.row.reply or (U64,), body)
        return found

    def _asked(self, header: Header, found: _Found) -> _Pending | None:
        """The oldest request of this id; those before it were passed over."""
        if not any(pending.message.header.request == header.request for pending in self.pending):
            return None
        while (oldest := self.pending.popleft()).message.header.request != header.request:
            found.complaints.append(Complaint(_section(oldest.message), f"{oldest.message.name} was never answered"))
        return oldest

    def _pair(self, judge: Client, header: Header, body: bytes, fds: Collection[int], found: _Found) -> None:
        try:
            answer = judge.receive(header.pack(), fds) or judge.receive(body)
        except RemoteProtocolError as error:
            found.complain(error)
            return
        assert answer is not None
        found.payload, found.refused = answer.payload, answer.refused


def _section(message: Message) -> str:
    return message.row.clause if message.row else _FRAMING


def _read(kinds: Iterable[type[Payload]], body: bytes) -> Payload | None:
    for kind in kinds:
        if len(body) in kind.sizes:
            try:
                return kind.unpack(body)
            except ValueError:
                continue
    return None


class Witness:
    """Of one connection, both its sockets. Messages are told in the order in which they were passed on."""

    def __init__(self) -> None:
        self._state = State(MOST_QUEUES)
        self._lines = {Wire.MAIN: _Line(FRONTEND, self._state), Wire.BACKEND: _Line(BACKEND, self._state)}
        self._rings: dict[int, RingState] = {}
        self._armed: set[int] = set()

    def hear(self, wire: Wire, sender: Side, data: bytes, fds: Sequence[int] = (), late_fds: int = 0) -> Message:
        """Judge the message in `data`, a header and its payload, and the descriptors that came with its first byte.

        late_fds: how many came with later bytes. A payload above LARGEST_BODY may be cut off there.
        """
        header, body = Header.unpack(data[:HEADER_SIZE]), data[HEADER_SIZE:]
        line = self._lines[wire]
        asks = sender is wire.asker
        found = line.request(header, body, fds) if asks else line.reply(header, body, fds)
        if late_fds:
            found.complaints.append(Complaint(_FRAMING, "descriptors must come with the first byte of a message"))
        message = Message(
            wire, sender, header, body, len(fds) + late_fds, found.row, found.payload, found.answers, found.awaits,
            found.refused, tuple(found.complaints), self._changes(wire, found),
        )  # fmt: skip
        if asks:
            line.sent(message)
        return message

    def waiting(self) -> tuple[Message, ...]:
        """Requests without their answers, oldest first on each socket."""
        return tuple(pending.message for line in self._lines.values() for pending in line.pending)

    def rings(self) -> tuple[RingState, ...]:
        """Of the rings that messages have named."""
        return tuple(self._rings[index] for index in sorted(self._rings))

    def _changes(self, wire: Wire, found: _Found) -> tuple[RingState, ...]:
        if wire is not Wire.MAIN or found.row is None or found.row.code not in _ABOUT_RINGS:
            return ()
        if found.awaits or found.refused:
            return ()
        asked = found.answers.payload if found.answers else found.payload
        if isinstance(asked, VringState | VringFd) and asked.index < MOST_QUEUES and not found.complaints:
            self._name(found.row.code, asked)
        if found.row.code is F.RESET_DEVICE or (found.row.code is F.SET_STATUS and asked == U64(0)):
            self._armed.clear()
        now = {index: self._look(index) for index in self._rings}
        changed = tuple(state for index, state in now.items() if state != self._rings[index])
        self._rings = now
        return changed

    def _name(self, code: object, named: VringState | VringFd) -> None:
        self._rings.setdefault(named.index, RingState(named.index, False, False, False))
        if code is F.SET_VRING_KICK and isinstance(named, VringFd) and named.has_fd:
            self._armed.add(named.index)
        elif code in (F.SET_VRING_KICK, F.GET_VRING_BASE):
            self._armed.discard(named.index)

    def _look(self, index: int) -> RingState:
        ring = self._state.rings[index]
        return RingState(index, ring.started, index in self._armed, ring.enabled)


_ABOUT_RINGS: Final = frozenset(
    {
        F.SET_FEATURES,
        F.SET_VRING_KICK,
        F.SET_VRING_ENABLE,
        F.GET_VRING_BASE,
        F.VRING_KICK,
        F.RESET_OWNER,
        F.RESET_DEVICE,
        F.SET_STATUS,
    }
)
