"""The two ends of a vhost-user connection: a Server and a Client of the front-end's requests, with their state.

A session is fed by a channel: read exactly `wanted` bytes with whatever descriptors come along, call receive(), act on
what it returns, send what finish() or request() returns. It lives as long as its connection; the next connection gets a
new one.
"""

from vhostuser.protocol.catalog import BACKEND, FRONTEND, Row
from vhostuser.protocol.codec import Header
from vhostuser.protocol.codes import DeviceStatus, ProtocolFeature, VirtioFeature
from vhostuser.protocol.codes import FrontendRequest as F
from vhostuser.protocol.errors import RequestRefused
from vhostuser.protocol.exchange import Client, Code, Outgoing, Request, Server
from vhostuser.protocol.payloads import U64, Payload, PostcopyAck
from vhostuser.protocol.postcopy import ACK_IDS, EXCHANGING_BASES, Effect, Postcopy
from vhostuser.protocol.ring import Ring
from vhostuser.protocol.state import State

DEFAULT_SLOTS = 509
"""Memory regions a back-end takes by default: what libvhost-user and rust-vmm offer too."""


class _Negotiated:
    """What both sessions tell about their state."""

    _state: State

    @property
    def features(self) -> int:
        """Negotiated virtio features, as a bit mask; 0 before SET_FEATURES."""
        return self._state.features

    @property
    def protocol_features(self) -> int:
        """Negotiated protocol features, as a bit mask."""
        return self._state.protocol_features

    @property
    def rings(self) -> tuple[Ring, ...]:
        """State of each ring. To be read; `kicked` and messages change it."""
        return self._state.rings

    @property
    def postcopy(self) -> Postcopy:
        """Where the postcopy handshake stands."""
        return self._state.postcopy

    @property
    def suspended(self) -> bool:
        """Are all rings stopped? Section "Suspended device state"."""
        return self._state.suspended

    @property
    def status(self) -> DeviceStatus:
        """The virtio device status (SET_STATUS), NEEDS_RESET among it; 0 where STATUS was not negotiated."""
        return self._state.status | self._state.needs_reset * DeviceStatus.NEEDS_RESET

    def has(self, feature: ProtocolFeature | VirtioFeature) -> bool:
        """Was the feature negotiated?"""
        return self._state.has(feature)


class FrontendRequests(_Negotiated, Server):
    """What answers the front-end's requests, on a state that others may share."""

    def __init__(self, state: State) -> None:
        super().__init__(FRONTEND, state)

    def _find(self, header: Header) -> Row | None:
        """Tell the postcopy acknowledgement from the requests whose ids it borrows."""
        acknowledges = (
            self._state.postcopy in EXCHANGING_BASES
            and header.request in ACK_IDS
            and header.size in PostcopyAck.sizes
            and not header.need_reply
        )
        if acknowledges:
            return FRONTEND[F.POSTCOPY_ACK]
        return super()._find(header) if header.request != F.POSTCOPY_ACK else None


class BackendSession(FrontendRequests):
    """The back-end's end of one connection.

    features: virtio bits to offer, PROTOCOL_FEATURES (bit 30) included. protocol_features: bits to offer. queue_count:
    queues the device has; queue_num: what GET_QUEUE_NUM says instead, where a device counts otherwise. max_slots:
    memory regions it takes. Requests that ask for these are answered by finish(request, None).
    """

    def __init__(
        self,
        features: int,
        protocol_features: int,
        queue_count: int,
        max_slots: int = DEFAULT_SLOTS,
        queue_num: int | None = None,
    ) -> None:
        super().__init__(State(queue_count, features, protocol_features))
        self._answers = {
            F.GET_FEATURES: features,
            F.GET_PROTOCOL_FEATURES: protocol_features,
            F.GET_QUEUE_NUM: queue_count if queue_num is None else queue_num,
            F.GET_MAX_MEM_SLOTS: max_slots,
        }

    def kicked(self, index: int) -> None:
        """Ring `index` was kicked through its descriptor: it is started."""
        self._state.kicked(index)

    @property
    def ready(self) -> bool:
        """May rings be served? With STATUS not before DRIVER_OK."""
        return self._state.ready

    def ask_for_reset(self) -> None:
        """The device cannot go on: GET_STATUS says NEEDS_RESET until it is reset."""
        self._state.needs_reset = True

    def lost(self) -> Effect:
        """The connection is gone; stops all rings. Returns what to do about memory: Effect.REVOKE or Effect.NOTHING."""
        return self._state.lost()

    def channel(self) -> Client:
        """The asking end of the back-end's own channel, for the socket that SET_BACKEND_REQ_FD brought."""
        return Client(BACKEND, self._state)

    def _known(self, request: Request) -> Payload | None:
        if isinstance(request.code, F) and request.code in self._answers:
            return U64(self._answers[request.code])
        if request.code is F.GET_STATUS:
            return U64(self.status)
        return super()._known(request)

    def _refuse(self, request: Request, refusal: RequestRefused) -> Outgoing | None:
        if request.code is F.SET_FEATURES:
            self._state.features_refused = True
            # With a status it is told all the same: FEATURES_OK does not stay.
            if self.has(ProtocolFeature.STATUS) and not self._acks(request.need_reply):
                return None
        return super()._refuse(request, refusal)


class FrontendSession(_Negotiated, Client):
    """The front-end's end of one connection. queue_count: queues it may address.

    What the back-end offers is learnt from the answers to GET_FEATURES and GET_PROTOCOL_FEATURES, and until then counts
    as nothing.
    """

    def __init__(self, queue_count: int = 256) -> None:
        super().__init__(FRONTEND, State(queue_count))
        self._last_memory_message = 0

    @property
    def features_offered(self) -> int:
        """Virtio features that the back-end offers."""
        return self._state.features_offered

    @property
    def protocol_features_offered(self) -> int:
        """Protocol features that the back-end offers."""
        return self._state.protocol_features_offered

    def kicked(self, index: int) -> None:
        """We kicked ring `index` through its descriptor: the back-end starts it."""
        self._state.kicked(index)

    def channel(self) -> Server:
        """The answering end of the back-end's own channel."""
        return Server(BACKEND, self._state)

    def _wire_id(self, code: Code) -> int:
        """As QEMU does it: an acknowledgement goes out under the last memory message's id, and a second one under 0."""
        return self._last_memory_message if code is F.POSTCOPY_ACK else code

    def _settle(self, code: Code, payload: Payload) -> None:
        super()._settle(code, payload)
        if code in ACK_IDS:
            self._last_memory_message = code
