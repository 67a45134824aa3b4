"""What both ends agree on: features, rings, the postcopy handshake. Everything that changes it is in this file.

It does not know which end it belongs to, nor how a message arrived: a request that has been fulfilled is applied once,
by the end that fulfilled it after its answer was made, by the end that sent it when the answer has come.
"""

from vhostuser.protocol.catalog import Gate, Row, When
from vhostuser.protocol.codes import SHMEM_IN_DRAFTS, BackendRequest, DeviceStatus, ProtocolFeature, VirtioFeature
from vhostuser.protocol.codes import FrontendRequest as F
from vhostuser.protocol.payloads import U64, Payload, VringFd, VringState
from vhostuser.protocol.postcopy import EXCHANGING_BASES, HANDSHAKE, INPUTS, LOST, Effect, Postcopy
from vhostuser.protocol.ring import Ring, RingEvent


class State:
    """One connection's agreements. Features are bit masks: offered by the back-end, then negotiated."""

    def __init__(self, queue_count: int, features_offered: int = 0, protocol_features_offered: int = 0) -> None:
        self.features_offered = features_offered
        self.features = 0
        self.protocol_features_offered = protocol_features_offered
        self.protocol_features = 0
        self.rings = tuple(Ring() for _ in range(queue_count))
        self.postcopy = Postcopy.IDLE
        self.status = DeviceStatus(0)
        """As the driver wrote it, without the bit that is the device's (NEEDS_RESET)."""
        self.needs_reset = False
        self.features_refused = False
        """The last SET_FEATURES was refused: FEATURES_OK does not stay (virtio 1.3, 3.1.1)."""

    def has(self, feature: ProtocolFeature | VirtioFeature) -> bool:
        """Was it negotiated?"""
        bits = self.protocol_features if isinstance(feature, ProtocolFeature) else self.features
        return bool(bits & feature.mask)

    def offers(self, feature: ProtocolFeature | VirtioFeature) -> bool:
        """Did the back-end offer it?"""
        protocol = isinstance(feature, ProtocolFeature)
        return bool((self.protocol_features_offered if protocol else self.features_offered) & feature.mask)

    @property
    def suspended(self) -> bool:
        """Are all rings stopped? Then the back-end writes no guest memory, notifies nobody and sends no requests."""
        return not any(ring.started for ring in self.rings)

    @property
    def ready(self) -> bool:
        """May rings be served at all? "The device MUST NOT consume buffers [...] before DRIVER_OK" (virtio 1.3, 2.1.2).

        Without STATUS a back-end hears of no DRIVER_OK, and the first kick stands for it. So it does where FEATURES_OK
        came without DRIVER, which no driver says: QEMU does, of its own, and for devices whose last ring it does not
        know (vhost-user-rng and -fs of 7.2) says nothing more.
        """
        if not self.has(ProtocolFeature.STATUS):
            return True
        of_driver = self.status & DeviceStatus.DRIVER or not self.status & DeviceStatus.FEATURES_OK
        return not self.features_refused and not (of_driver and not self.status & DeviceStatus.DRIVER_OK)

    def missing(self, gate: Gate) -> str:
        """The feature that `gate` asks for and this connection lacks, in words; empty if the gate is open."""
        for feature in gate.features:
            if not (self.offers(feature) if gate.offered else self.has(feature)):
                return f"{feature.name} was not {'offered' if gate.offered else 'negotiated'}{self._draft(feature)}"
        return ""

    def _draft(self, feature: ProtocolFeature | VirtioFeature) -> str:
        """What a peer may mean that counts bits as drafts of the specification did."""
        old = [bit for bit in SHMEM_IN_DRAFTS if self.has(bit)] if feature is ProtocolFeature.SHMEM else []
        return f" (bit {int(old[0])} was, which was SHMEM in drafts; it is {int(feature)})" if old else ""

    def row(self, row: Row) -> Row:
        """The variant of `row` that is in force now."""
        for variant in row.variants:
            if self._holds(variant.when):
                return variant.row
        return row

    def _holds(self, when: When) -> bool:
        if when is When.POSTCOPY:
            return self.postcopy in EXCHANGING_BASES
        return self.has(ProtocolFeature.LOG_SHMFD if when is When.LOG_SHMFD else ProtocolFeature.XEN_MMAP)

    def effect(self, code: F | BackendRequest) -> Effect:
        """What postcopy asks of the back-end for this message."""
        if not isinstance(code, F) or code not in HANDSHAKE[self.postcopy]:
            return Effect.NOTHING
        return HANDSHAKE[self.postcopy][code].effect

    def apply(self, code: F | BackendRequest, payload: Payload) -> None:
        """A request has been fulfilled: change what it changes."""
        # The codes of the two directions are equal as integers; back-end requests change nothing here.
        if not isinstance(code, F):
            return
        if code in INPUTS:
            self.postcopy = HANDSHAKE[self.postcopy][code].next
        self._change(code, payload)

    def _change(self, code: F, payload: Payload) -> None:
        match code, payload:
            case F.SET_FEATURES, U64(value):
                self.features = value
                self.features_refused = False
                # With the bit set nothing happens to the rings: toggling LOG_ALL must not halt a device.
                if not self.has(VirtioFeature.PROTOCOL_FEATURES):
                    self._every_ring(RingEvent.ENABLE)
            case F.SET_PROTOCOL_FEATURES, U64(value):
                self.protocol_features = value
            case F.RESET_OWNER, _:
                self._every_ring(RingEvent.DISABLE)
            case F.RESET_DEVICE, _:
                self._every_ring(RingEvent.RESET)
                self._set_status(0)
            case F.SET_STATUS, U64(value):
                self._set_status(value)
            case _:
                self._change_ring(code, payload)

    def _change_ring(self, code: F, payload: Payload) -> None:
        match code, payload:
            case F.SET_VRING_ENABLE, VringState(index, num):
                self.rings[index].apply(RingEvent.ENABLE if num else RingEvent.DISABLE)
            case F.GET_VRING_BASE, VringState(index):
                self.rings[index].apply(RingEvent.STOP)
            case F.VRING_KICK, VringState(index):
                self.rings[index].apply(RingEvent.KICK)
            case F.SET_VRING_KICK, VringFd(index, has_fd=False):
                self.rings[index].apply(RingEvent.POLL)

    def learn(self, code: F | BackendRequest, reply: Payload) -> None:
        """The front-end has the answer to its question."""
        if not isinstance(code, F):
            return
        match code, reply:
            case F.GET_FEATURES, U64(value):
                self.features_offered = value
            case F.GET_PROTOCOL_FEATURES, U64(value):
                self.protocol_features_offered = value

    def _set_status(self, value: int) -> None:
        keeps = ~(DeviceStatus.NEEDS_RESET | self.features_refused * DeviceStatus.FEATURES_OK)
        self.status = DeviceStatus(value & keeps)
        if not value:
            self.needs_reset = False
            self._every_ring(RingEvent.STOP)

    def _every_ring(self, event: RingEvent) -> None:
        for ring in self.rings:
            ring.apply(event)

    def kicked(self, index: int) -> None:
        """The kick descriptor of ring `index` became readable."""
        self.rings[index].apply(RingEvent.KICK)

    def lost(self) -> Effect:
        """The connection is gone. Returns what the back-end has to do about its memory: REVOKE or NOTHING."""
        step = HANDSHAKE[self.postcopy][LOST]
        self.postcopy = step.next
        self._every_ring(RingEvent.RESET)
        return step.effect
