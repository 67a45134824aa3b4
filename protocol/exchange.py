"""Requests and answers on one socket: a Server for the end that answers, a Client for the end that asks.

Both are driven by the catalog and serve either direction: the back-end is the server of the front-end's requests, the
front-end that of the back-end's. What a fulfilled request changes is in state.py. Descriptors are opaque here: counted,
and handed on.

What a server makes of a request that is not to be fulfilled (also docs/messages.md):

- Wrong framing (version, reply or reserved flag, size, number of descriptors, content that contradicts itself):
  RemoteProtocolError at once. The two ends no longer agree where a message ends or whose descriptors these are.
- An unknown request, or one whose feature was not negotiated: RemoteProtocolError whose `answer` is a nack where one
  was asked for.
- An objection of rules.py (feature bits never offered, no such queue, ...) or a RequestRefused of a handler: the
  refusal is told by the message's own reply, or by a nack where one was asked for. Where it cannot be told, a message
  on which nothing depends is dropped; for any other RemoteProtocolError, since the peer would go on in the belief that
  it succeeded.
"""

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vhostuser.protocol.catalog import Row, size_words
from vhostuser.protocol.codec import HEADER_SIZE, Frame, Header, Reader, encode
from vhostuser.protocol.codes import NEED_REPLY, REPLY, VERSION, BackendRequest, FrontendRequest, ProtocolFeature
from vhostuser.protocol.errors import LocalProtocolError, ProtocolError, RemoteProtocolError, RequestRefused
from vhostuser.protocol.payloads import U64, Empty, Payload
from vhostuser.protocol.postcopy import Effect
from vhostuser.protocol.state import State

Code = FrontendRequest | BackendRequest

_ACK = U64(0)
_NACK = U64(1)
_REPLY_ACK = "VHOST_USER_PROTOCOL_F_REPLY_ACK"


class Outgoing(NamedTuple):
    """Bytes to send, and descriptors to send with the first of them. The sender of `fds` still owns them."""

    data: bytes
    fds: tuple[int, ...] = ()


class Reply(NamedTuple):
    """A handler's answer in the message's own layout. The handler keeps the ownership of `fds`."""

    payload: Payload
    fds: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """A request to be fulfilled, or to be refused where `refusal` says so.

    fds: the object that receive() was given, untouched. row: the catalog's row in its variant of this moment. effect:
    what postcopy asks for before the answer. refusal: the protocol's own objection; no handler is to see the request
    then, and finish() refuses it whatever outcome it is given.
    """

    code: Code
    payload: Payload
    fds: Collection[int]
    need_reply: bool
    row: Row
    effect: Effect = Effect.NOTHING
    refusal: RequestRefused | None = None


class Server:
    """Receives requests and decides what goes back. One request at a time: finish() it before the next is read."""

    def __init__(self, rows: Mapping[int, Row], state: State) -> None:
        self._rows = rows
        self._state = state
        self._row: Row | None = None
        self._current: Request | None = None
        self._reader = Reader(self._admit)

    @property
    def wanted(self) -> int:
        """Bytes to read next, at most; 0 while a request waits for finish()."""
        return 0 if self._current else self._reader.wanted

    def receive(self, data: bytes, fds: Collection[int] = ()) -> Request | None:
        """Take 1 to `wanted` bytes and the descriptors that came with them; a Request once it is complete.

        The descriptors stay the caller's: on RemoteProtocolError it closes those of this message and the connection.
        """
        if self._current:
            raise LocalProtocolError(self._current.code, "finish() this request before the next one is read")
        frame = self._reader.feed(data, fds)
        if frame is None:
            return None
        self._current = self._open(frame)
        return self._current

    def eof(self) -> None:
        """The peer closed its end. Returns if that was between two messages, else raises RemoteProtocolError."""
        self._reader.eof()

    def finish(self, request: Request, outcome: Reply | RequestRefused | None = None) -> Outgoing | None:
        """Close `request` with its outcome: the bytes to send, or None where nothing is sent.

        outcome: a Reply for messages with a reply of their own; None for plain success; a RequestRefused. Raises
        RemoteProtocolError for a refusal that must be known and cannot be told, LocalProtocolError for an outcome that
        does not fit the message; the request then stays open.
        """
        if request is not self._current:
            raise LocalProtocolError(request.code, "is not the request that waits to be finished")
        refusal = request.refusal or (outcome if isinstance(outcome, RequestRefused) else None)
        if refusal is not None:
            self._current = None
            return self._refuse(request, refusal)
        assert not isinstance(outcome, RequestRefused)
        answer = self._answer(request, outcome)
        # A SET_PROTOCOL_FEATURES that asks for an ack gets it if REPLY_ACK held before it or holds from now on.
        acks = self._acks(request.need_reply)
        self._state.apply(request.code, request.payload)
        self._current = None
        if not request.row.reply and (acks or self._acks(request.need_reply)):
            return _send(request.code, Reply(_ACK))
        return answer

    # Receiving

    def _admit(self, header: Header, fds: int) -> None:
        """Judge a header before its payload is read."""
        header.check_request()
        row = self._find(header)
        if row is None:
            raise self._unusable(header, header.request, "unknown request")
        if missing := self._state.missing(row.gate):
            raise self._unusable(header, row.code, missing, row.clause)
        row = self._state.row(row)
        _check_size(row, header.size, row.request)
        _check_fds(row, fds, row.fds)
        self._row = row

    def _find(self, header: Header) -> Row | None:
        return self._rows.get(header.request)

    def _unusable(self, header: Header, code: int, reason: str, clause: str = "") -> RemoteProtocolError:
        nack = encode(header.request, VERSION | REPLY, _NACK) if self._acks(header.need_reply) else b""
        return RemoteProtocolError(code, reason, clause=clause, answer=nack)

    def _open(self, frame: Frame) -> Request:
        row = self._row
        assert row is not None
        payload = _unpack(row, row.request, frame)
        _check_fds(row, len(frame.fds), _fd_bounds(payload, row.fds))
        objection = next((why for rule in row.rules if (why := rule(self._state, payload))), "")
        return Request(
            code=row.code,
            payload=payload,
            fds=frame.fds,
            need_reply=frame.header.need_reply,
            row=row,
            effect=self._state.effect(row.code),
            refusal=RequestRefused(objection) if objection else None,
        )

    # Answering

    def _acks(self, need_reply: bool) -> bool:
        return need_reply and self._state.has(ProtocolFeature.REPLY_ACK)

    def _answer(self, request: Request, outcome: Reply | None) -> Outgoing | None:
        """The reply in the message's own layout; None where it has none."""
        row = request.row
        if not row.reply:
            if outcome is not None:
                raise LocalProtocolError(request.code, "has no reply of its own, expected None or RequestRefused")
            return None
        if outcome is None:
            known = self._known(request)
            if known is None:
                raise LocalProtocolError(request.code, f"needs a reply of {row.reply[0].__name__}")
            return _send(request.code, Reply(known))
        _check_reply(request, outcome)
        return _send(request.code, outcome)

    def _known(self, request: Request) -> Payload | None:
        """The reply that needs no handler."""
        return request.row.done

    def _refuse(self, request: Request, refusal: RequestRefused) -> Outgoing | None:
        row = request.row
        if row.refusal:
            return _send(request.code, Reply(row.refusal.make(request.payload)))
        if not row.reply and self._acks(request.need_reply):
            return _send(request.code, Reply(_NACK))
        if row.silent:
            return None
        raise RemoteProtocolError(
            request.code, f"refused, with no way to tell: {refusal.reason}", clause=row.clause
        ) from refusal


def _send(code: Code, reply: Reply) -> Outgoing:
    return Outgoing(encode(code, VERSION | REPLY, reply.payload), reply.fds)


def _check_reply(request: Request, reply: Reply) -> None:
    row = request.row
    if type(reply.payload) is not row.reply[0]:
        raise LocalProtocolError(row.code, f"reply of {type(reply.payload).__name__}, expected {row.reply[0].__name__}")
    # A reply in the request's own layout has the request's own size: GET_CONFIG, memory tables.
    if type(reply.payload) is type(request.payload):
        size, asked = (len(encode(row.code, 0, payload)) - HEADER_SIZE for payload in (reply.payload, request.payload))
        if size != asked:
            raise LocalProtocolError(row.code, f"reply of {size} bytes, expected {asked} as asked", clause=row.clause)
    if row.refusal and row.refusal.told(request.payload, reply.payload, len(reply.fds)):
        raise LocalProtocolError(row.code, f"{reply.payload} refuses; give finish() a RequestRefused instead")
    _check_fds(row, len(reply.fds), _fd_bounds(reply.payload, row.reply_fds), LocalProtocolError)


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """The answer to a request. refused: the peer said no, and payload says how. fds: as receive() was given them."""

    code: Code
    request: Payload
    payload: Payload
    fds: Collection[int]
    refused: bool


class _Sent(NamedTuple):
    """A request that waits for its answer."""

    row: Row
    payload: Payload


class Client:
    """Sends requests and pairs answers with them, oldest first. Any number may be outstanding."""

    def __init__(self, rows: Mapping[int, Row], state: State) -> None:
        self._rows = rows
        self._state = state
        self._sent: deque[_Sent] = deque()
        self._reader = Reader(self._admit)

    @property
    def outstanding(self) -> int:
        """Answers still to come."""
        return len(self._sent)

    @property
    def wanted(self) -> int:
        """Bytes to read next, at most."""
        return self._reader.wanted

    def replies(self, code: Code) -> bool:
        """Does a request of this code have a reply of its own now, whatever need_reply says?"""
        return bool(self._state.row(self._rows[code]).reply)

    def request(
        self,
        code: Code,
        payload: Payload | None = None,
        fds: Sequence[int] = (),
        need_reply: bool = False,
    ) -> Outgoing:
        """The bytes of a request. Without an answer to come, what it changes is changed at once, else when that comes.

        need_reply asks for an ack; without REPLY_ACK only messages with a reply of their own may have it, and some have
        it always or never (Row.asks). Raises LocalProtocolError for whatever the peer would have to reject.
        """
        payload = payload or Empty()
        row = self._check(code, payload, fds)
        need_reply = need_reply if row.asks is None else row.asks
        if need_reply and not row.reply and not self._state.has(ProtocolFeature.REPLY_ACK):
            raise LocalProtocolError(code, "need_reply without REPLY_ACK would wait for ever", clause=_REPLY_ACK)
        flags = VERSION | (NEED_REPLY if need_reply else 0)
        data = encode(self._wire_id(code), flags, payload)
        if row.reply or need_reply:
            self._sent.append(_Sent(row, payload))
        else:
            self._settle(row.code, payload)
        return Outgoing(data, tuple(fds))

    def overhear(self, request: Request) -> bool:
        """Take `request`, which somebody else sent, for one of our own. Is an answer to come?

        For a witness of a connection. The request has no refusal.
        """
        answered = bool(request.row.reply) or (request.need_reply and self._acked(request))
        if answered:
            self._sent.append(_Sent(request.row, request.payload))
        else:
            self._settle(request.code, request.payload)
        return answered

    def _acked(self, request: Request) -> bool:
        # As in Server.finish: the message that brings REPLY_ACK may ask for an ack itself.
        match request.code, request.payload:
            case FrontendRequest.SET_PROTOCOL_FEATURES, U64(value) if value & ProtocolFeature.REPLY_ACK.mask:
                return True
        return self._state.has(ProtocolFeature.REPLY_ACK)

    def receive(self, data: bytes, fds: Collection[int] = ()) -> Answer | None:
        """Take 1 to `wanted` bytes and the descriptors that came with them; an Answer once it is complete."""
        frame = self._reader.feed(data, fds)
        return self._pair(frame) if frame else None

    def eof(self) -> None:
        """The peer closed its end. Raises RemoteProtocolError if an answer is missing."""
        self._reader.eof()
        if self._sent:
            row = self._sent[0].row
            raise RemoteProtocolError(row.code, "closed without an answer", clause=row.clause)

    def _check(self, code: Code, payload: Payload, fds: Sequence[int]) -> Row:
        row = self._rows.get(code)
        if row is None or row.code is not code:
            raise LocalProtocolError(code, "is not a request of this channel")
        if missing := self._state.missing(row.gate):
            raise LocalProtocolError(code, missing, clause=row.clause)
        row = self._state.row(row)
        if type(payload) is not row.request[0]:
            raise LocalProtocolError(code, f"payload {type(payload).__name__}, expected {row.request[0].__name__}")
        _check_fds(row, len(fds), _fd_bounds(payload, row.fds), LocalProtocolError)
        for rule in row.rules:
            if why := rule(self._state, payload):
                raise LocalProtocolError(code, why, clause=row.clause)
        return row

    def _wire_id(self, code: Code) -> int:
        return code

    def _admit(self, header: Header, fds: int) -> None:
        """Judge the header of an answer before its payload is read."""
        if not self._sent:
            raise RemoteProtocolError(header.request, "a reply that nobody asked for")
        row = self._sent[0].row
        header.check_reply()
        if header.request != row.code:
            raise RemoteProtocolError(row.code, f"reply to request {header.request}", clause=row.clause)
        _check_size(row, header.size, _expected(row))
        _check_fds(row, fds, (0, row.reply_fds[1]))

    def _pair(self, frame: Frame) -> Answer:
        sent = self._sent[0]
        row, fds = sent.row, len(frame.fds)
        payload = _unpack(row, _expected(row), frame)
        refused = _refuses(sent, payload, fds)
        _check_fds(row, fds, (0, 0) if refused else _fd_bounds(payload, row.reply_fds))
        if not refused:
            self._check_echo(sent, payload)
            self._settle(row.code, sent.payload)
            self._state.learn(row.code, payload)
        self._sent.popleft()
        return Answer(row.code, sent.payload, payload, frame.fds, refused)

    def _check_echo(self, sent: _Sent, payload: Payload) -> None:
        asked, got = len(sent.payload.pack()), len(payload.pack())
        if type(payload) is type(sent.payload) and got != asked:
            raise RemoteProtocolError(
                sent.row.code, f"reply of {got} bytes, expected {asked} as asked", clause=sent.row.clause
            )

    def _settle(self, code: Code, payload: Payload) -> None:
        """The request counts as fulfilled."""
        self._state.apply(code, payload)


def _refuses(sent: _Sent, payload: Payload, fds: int) -> bool:
    if sent.row.refusal:
        return sent.row.refusal.told(sent.payload, payload, fds)
    return not sent.row.reply and isinstance(payload, U64) and payload != _ACK


def _expected(row: Row) -> tuple[type[Payload], ...]:
    # QEMU takes an ack of any size; an empty one can only mean that it was done.
    return row.reply or (U64, Empty)


def _unpack(row: Row, kinds: tuple[type[Payload], ...], frame: Frame) -> Payload:
    kind = next(kind for kind in kinds if len(frame.body) in kind.sizes)
    try:
        payload = kind.unpack(frame.body)
    except ValueError as error:
        hint = _hint(row, len(frame.body)) if kinds is row.request else ""
        raise RemoteProtocolError(row.code, f"{error}{hint}", clause=row.clause) from None
    return payload


def _check_size(row: Row, size: int, kinds: tuple[type[Payload], ...]) -> None:
    if any(size in kind.sizes for kind in kinds):
        return
    expected = " or ".join(size_words(kind.sizes) for kind in kinds)
    reason = f"payload of {size} bytes, expected {expected}{_hint(row, size)}"
    raise RemoteProtocolError(row.code, reason, clause=row.clause)


def _hint(row: Row, size: int) -> str:
    """Under which condition a request of this size would be right."""
    others = [(when, other.request) for when, other in row.variants if other.request != row.request]
    whens = [when.value for when, kinds in others if any(size in kind.sizes for kind in kinds)]
    return f" (it would be right if {whens[0]})" if whens else ""


def _fd_bounds(payload: Payload, bounds: tuple[int, int]) -> tuple[int, int]:
    """Where the row leaves a choice the content decides. A memory table sent back as a reply has none."""
    count = payload.fd_count()
    return bounds if count is None or bounds[0] == bounds[1] else (count, count)


def _check_fds(row: Row, count: int, bounds: tuple[int, int], error: type[ProtocolError] = RemoteProtocolError) -> None:
    least, most = bounds
    if not least <= count <= most:
        expected = str(most) if least == most else f"{least} to {most}"
        raise error(row.code, f"{count} descriptors, expected {expected}", clause=row.clause)
