"""What a third party makes of the messages on a connection."""

import pytest

from vhostuser.protocol import (
    NEED_REPLY,
    REPLY,
    U64,
    VERSION,
    MemoryRegion,
    MemoryTable,
    Payload,
    PostcopyAck,
    ProtocolFeature,
    VirtioFeature,
    VringFd,
    VringState,
    encode,
)
from vhostuser.protocol import BackendRequest as B
from vhostuser.protocol import FrontendRequest as F
from vhostuser.protocol.witness import Message, Side, Wire, Witness

OFFER = VirtioFeature.PROTOCOL_FEATURES.mask | VirtioFeature.VERSION_1.mask
PROTOCOL = ProtocolFeature.REPLY_ACK.mask | ProtocolFeature.PAGEFAULT.mask | ProtocolFeature.CONFIG.mask
TABLE = MemoryTable((MemoryRegion(0, 4096, 1 << 32, 0),))


class Connection:
    """Says messages to a witness."""

    def __init__(self) -> None:
        self.witness = Witness()

    def ask(
        self, code: int, payload: Payload | None = None, *, fds: int = 0, need: bool = False, wire: Wire = Wire.MAIN
    ) -> Message:
        flags = VERSION | (NEED_REPLY if need else 0)
        return self.witness.hear(wire, wire.asker, encode(code, flags, payload), range(fds))

    def reply(self, code: int, payload: Payload | None = None, *, fds: int = 0, wire: Wire = Wire.MAIN) -> Message:
        return self.witness.hear(wire, wire.asker.other, encode(code, VERSION | REPLY, payload), range(fds))


@pytest.fixture
def said() -> Connection:
    """A connection that has negotiated everything."""
    connection = Connection()
    connection.ask(F.GET_FEATURES)
    connection.reply(F.GET_FEATURES, U64(OFFER))
    connection.ask(F.GET_PROTOCOL_FEATURES)
    connection.reply(F.GET_PROTOCOL_FEATURES, U64(PROTOCOL))
    connection.ask(F.SET_PROTOCOL_FEATURES, U64(PROTOCOL))
    connection.ask(F.SET_FEATURES, U64(OFFER))
    return connection


def test_an_answer_is_paired_with_its_request() -> None:
    said = Connection()
    asked = said.ask(F.GET_FEATURES)
    assert asked.awaits
    assert said.witness.waiting() == (asked,)
    answer = said.reply(F.GET_FEATURES, U64(OFFER))
    assert answer.answers is asked
    assert answer.payload == U64(OFFER)
    assert not answer.complaints
    assert said.witness.waiting() == ()


def test_features_that_were_never_offered_are_told(said: Connection) -> None:
    (complaint,) = said.ask(F.SET_FEATURES, U64(OFFER | 1 << 31)).complaints
    assert complaint.section == "VHOST_USER_SET_FEATURES"
    assert "bit31" in complaint.reason


def test_a_request_whose_feature_was_not_negotiated_is_told(said: Connection) -> None:
    asked = said.ask(F.GET_MAX_MEM_SLOTS)
    assert "CONFIGURE_MEM_SLOTS was not negotiated" in asked.complaints[0].reason
    assert asked.awaits


def test_a_tracer_says_what_a_peer_may_mean_that_is_of_another_draft(said: Connection) -> None:
    old = PROTOCOL | ProtocolFeature.GPA_ADDRESSES.mask
    said.ask(F.GET_PROTOCOL_FEATURES)
    said.reply(F.GET_PROTOCOL_FEATURES, U64(old))
    said.ask(F.SET_PROTOCOL_FEATURES, U64(old))
    asked = said.ask(F.GET_SHMEM_CONFIG)
    assert "(bit 21 was, which was SHMEM in drafts; it is 22)" in asked.complaints[0].reason


@pytest.mark.parametrize(("fds", "wrong"), [(0, True), (1, False), (2, True)])
def test_descriptors_are_counted(said: Connection, fds: int, wrong: bool) -> None:
    assert bool(said.ask(F.SET_MEM_TABLE, TABLE, fds=fds).complaints) is wrong


def test_descriptors_behind_the_first_byte_are_told(said: Connection) -> None:
    message = said.witness.hear(Wire.MAIN, Side.FRONTEND, encode(F.SET_OWNER, VERSION), (), 1)
    assert [complaint.reason for complaint in message.complaints] == [
        "descriptors must come with the first byte of a message"
    ]


def test_need_reply_counts_once_reply_ack_was_negotiated(said: Connection) -> None:
    assert said.ask(F.SET_OWNER, need=True).awaits
    assert said.reply(F.SET_OWNER, U64(1)).refused
    assert not Connection().ask(F.SET_OWNER, need=True).awaits


def test_a_message_that_brings_reply_ack_may_ask_for_an_ack() -> None:
    said = Connection()
    said.ask(F.GET_FEATURES)
    said.reply(F.GET_FEATURES, U64(OFFER))
    said.ask(F.GET_PROTOCOL_FEATURES)
    said.reply(F.GET_PROTOCOL_FEATURES, U64(PROTOCOL))
    assert said.ask(F.SET_PROTOCOL_FEATURES, U64(PROTOCOL), need=True).awaits


def test_the_flags_of_an_answer_are_judged(said: Connection) -> None:
    said.ask(F.GET_FEATURES)
    data = encode(F.GET_FEATURES, VERSION | REPLY | NEED_REPLY, U64(OFFER))
    answer = said.witness.hear(Wire.MAIN, Side.BACKEND, data)
    assert "expected exactly 0x5" in answer.complaints[0].reason
    assert answer.payload == U64(OFFER)
    assert said.witness.waiting() == ()


def test_an_answer_that_nobody_asked_for_is_told(said: Connection) -> None:
    assert "nobody asked" in said.reply(F.GET_QUEUE_NUM, U64(1)).complaints[0].reason


def test_requests_that_were_passed_over_are_told(said: Connection) -> None:
    said.ask(F.GET_FEATURES)
    said.ask(F.GET_PROTOCOL_FEATURES)
    answer = said.reply(F.GET_PROTOCOL_FEATURES, U64(PROTOCOL))
    assert [complaint.reason for complaint in answer.complaints] == ["GET_FEATURES was never answered"]


@pytest.mark.parametrize("code", [99, 0xFFFFFFFF])
def test_unknown_messages_are_told_and_forgotten(said: Connection, code: int) -> None:
    message = said.ask(code, U64(5))
    assert message.name == f"request {code}"
    assert message.payload is None
    assert message.complaints
    assert not said.ask(F.SET_OWNER).complaints


def test_what_is_objectionable_changes_nothing(said: Connection) -> None:
    assert said.ask(F.POSTCOPY_LISTEN).complaints[0].reason == "POSTCOPY_ADVISE must come first"
    assert said.reply(F.POSTCOPY_LISTEN, U64(0)).answers
    assert not said.ask(F.SET_MEM_TABLE, TABLE, fds=1).awaits


def test_ring_states_are_told_as_they_change(said: Connection) -> None:
    assert [str(ring) for ring in said.ask(F.SET_VRING_KICK, VringFd(0), fds=1).rings] == [
        "ring 0: starts when kicked, disabled"
    ]
    (enabled,) = said.ask(F.SET_VRING_ENABLE, VringState(0, 1)).rings
    assert str(enabled) == "ring 0: starts when kicked, enabled"
    assert not said.ask(F.SET_VRING_ENABLE, VringState(0, 1)).rings
    assert not said.ask(F.GET_VRING_BASE, VringState(0)).rings
    (stopped,) = said.reply(F.GET_VRING_BASE, VringState(0, 7)).rings
    assert str(stopped) == "ring 0: stopped, enabled"
    (polled,) = said.ask(F.SET_VRING_KICK, VringFd(0, has_fd=False)).rings
    assert polled.started


def test_a_postcopy_handshake_is_understood(said: Connection) -> None:
    said.ask(F.POSTCOPY_ADVISE)
    assert not said.reply(F.POSTCOPY_ADVISE, fds=1).complaints
    said.ask(F.POSTCOPY_LISTEN, need=True)
    said.reply(F.POSTCOPY_LISTEN, U64(0))
    assert said.ask(F.SET_MEM_TABLE, TABLE, fds=1).awaits
    assert said.reply(F.SET_MEM_TABLE, TABLE).payload == TABLE
    acknowledged = said.ask(F.SET_MEM_TABLE, PostcopyAck())
    assert acknowledged.name == "POSTCOPY_ACK"
    assert not acknowledged.complaints
    said.ask(F.POSTCOPY_END, need=True)
    assert not said.reply(F.POSTCOPY_END, U64(0)).complaints


def test_the_back_ends_channel_is_followed_too(said: Connection) -> None:
    asked = said.ask(B.CONFIG_CHANGE_MSG, need=True, wire=Wire.BACKEND)
    assert asked.name == "BACKEND_CONFIG_CHANGE_MSG"
    assert asked.sender is Side.BACKEND
    assert said.reply(B.CONFIG_CHANGE_MSG, U64(0), wire=Wire.BACKEND).answers is asked
