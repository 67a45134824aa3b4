"""The catalog is complete, free of contradictions, and the documentation is made from it."""

from itertools import combinations
from pathlib import Path

import pytest

from tests.docs.test_site import script
from tests.protocol.samples import CASES, Case
from vhostuser.protocol import BACKEND, FRONTEND, MAX_FDS, U64, feature_names, protocol_feature_names
from vhostuser.protocol import BackendRequest as B
from vhostuser.protocol import FrontendRequest as F
from vhostuser.protocol import ProtocolFeature as P
from vhostuser.protocol import VirtioFeature as V

every_message = pytest.mark.parametrize("case", CASES, ids=str)


def test_every_request_of_the_specification_has_a_row() -> None:
    assert set(FRONTEND) == set(range(45))  # 0 is the postcopy acknowledgement
    assert set(BACKEND) == set(range(1, 11))
    assert all(row.code == number for rows in (FRONTEND, BACKEND) for number, row in rows.items())


def test_every_protocol_feature_has_a_name() -> None:
    assert [int(feature) for feature in P] == list(range(23))


def test_features_print_as_names_and_unknown_bits_as_numbers() -> None:
    assert feature_names(V.VERSION_1.mask | V.LOG_ALL.mask | 1 << 63 | 1) == "bit0 LOG_ALL VERSION_1 bit63"
    assert protocol_feature_names(P.MQ.mask | 1 << 40) == "MQ bit40"
    assert feature_names(0) == "none"


def test_a_feature_is_a_bit_number_and_its_mask_another() -> None:
    assert V.PROTOCOL_FEATURES == 30
    assert V.PROTOCOL_FEATURES.mask == 1 << 30


@every_message
def test_a_size_means_one_payload_only(case: Case) -> None:
    """Payloads are told apart by their size alone."""
    for kinds in (case.row.request, case.row.reply):
        for one, other in combinations(kinds, 2):
            assert not set(one.sizes) & set(other.sizes)


@every_message
def test_descriptors_fit_a_message(case: Case) -> None:
    for least, most in (case.row.fds, case.row.reply_fds):
        assert 0 <= least <= most <= MAX_FDS


@every_message
def test_a_row_answers_in_one_way(case: Case) -> None:
    row = case.row
    assert not (row.reply and row.silent), "a reply cannot be left out"
    assert row.reply or not (row.refusal or row.done or row.reply_fds[1]), "there is no reply to say it with"
    assert row.done is None or type(row.done) is row.reply[0]


def test_requests_that_reply_whatever_need_reply_says() -> None:
    """The specification's list, and those whose text describes a reply."""
    replying = {row.code for row in FRONTEND.values() if row.reply}
    assert replying == {
        F.GET_FEATURES, F.GET_VRING_BASE, F.GET_PROTOCOL_FEATURES, F.GET_QUEUE_NUM, F.IOTLB_MSG, F.GET_CONFIG,
        F.CREATE_CRYPTO_SESSION, F.POSTCOPY_ADVISE, F.POSTCOPY_LISTEN, F.POSTCOPY_END, F.GET_INFLIGHT_FD,
        F.GET_MAX_MEM_SLOTS, F.GET_STATUS, F.GET_SHARED_OBJECT, F.SET_DEVICE_STATE_FD, F.CHECK_DEVICE_STATE,
        F.GET_SHMEM_CONFIG,
    }  # fmt: skip


GATES = {
    # Offered is enough, by the text or for the sake of front-ends in the field.
    F.GET_PROTOCOL_FEATURES: ("offered", V.PROTOCOL_FEATURES),
    F.SET_PROTOCOL_FEATURES: ("offered", V.PROTOCOL_FEATURES),
    F.GET_QUEUE_NUM: ("offered", P.MQ),
    F.SET_VRING_ENABLE: ("offered", V.PROTOCOL_FEATURES),
    F.SEND_RARP: ("offered", P.RARP),
    F.NET_SET_MTU: ("offered", P.MTU, V.NET_F_MTU),
    F.SET_BACKEND_REQ_FD: ("offered", P.BACKEND_REQ),
    F.POSTCOPY_ADVISE: ("offered", P.PAGEFAULT),
    F.POSTCOPY_LISTEN: ("offered", P.PAGEFAULT),
    F.POSTCOPY_ACK: ("offered", P.PAGEFAULT),
    F.RESET_DEVICE: ("offered", P.RESET_DEVICE),
    F.IOTLB_MSG: ("negotiated", V.ACCESS_PLATFORM),
    F.SET_VRING_ENDIAN: ("negotiated", P.CROSS_ENDIAN),
    F.GET_CONFIG: ("negotiated", P.CONFIG),
    F.SET_CONFIG: ("negotiated", P.CONFIG),
    F.CREATE_CRYPTO_SESSION: ("negotiated", P.CRYPTO_SESSION),
    F.CLOSE_CRYPTO_SESSION: ("negotiated", P.CRYPTO_SESSION),
    F.GET_INFLIGHT_FD: ("negotiated", P.INFLIGHT_SHMFD),
    F.SET_INFLIGHT_FD: ("negotiated", P.INFLIGHT_SHMFD),
    F.VRING_KICK: ("negotiated", P.INBAND_NOTIFICATIONS),
    F.GET_MAX_MEM_SLOTS: ("negotiated", P.CONFIGURE_MEM_SLOTS),
    F.ADD_MEM_REG: ("negotiated", P.CONFIGURE_MEM_SLOTS),
    F.REM_MEM_REG: ("negotiated", P.CONFIGURE_MEM_SLOTS),
    F.SET_STATUS: ("negotiated", P.STATUS),
    F.GET_STATUS: ("negotiated", P.STATUS),
    F.GET_SHARED_OBJECT: ("negotiated", P.SHARED_OBJECT),
    F.SET_DEVICE_STATE_FD: ("negotiated", P.DEVICE_STATE),
    F.CHECK_DEVICE_STATE: ("negotiated", P.DEVICE_STATE),
    F.GET_SHMEM_CONFIG: ("negotiated", P.SHMEM),
}
BACKEND_GATES = {
    B.IOTLB_MSG: V.ACCESS_PLATFORM,
    B.CONFIG_CHANGE_MSG: P.CONFIG,
    B.VRING_HOST_NOTIFIER_MSG: P.HOST_NOTIFIER,
    B.VRING_CALL: P.INBAND_NOTIFICATIONS,
    B.VRING_ERR: P.INBAND_NOTIFICATIONS,
    B.SHARED_OBJECT_ADD: P.SHARED_OBJECT,
    B.SHARED_OBJECT_REMOVE: P.SHARED_OBJECT,
    B.SHARED_OBJECT_LOOKUP: P.SHARED_OBJECT,
    B.SHMEM_MAP: P.SHMEM,
    B.SHMEM_UNMAP: P.SHMEM,
}


@every_message
def test_every_extension_stands_behind_its_feature(case: Case) -> None:
    """Written out from the specification, but for POSTCOPY_END (see its row), so that a gate left open shows."""
    gate = case.row.gate
    if case.row.from_backend:
        assert (gate.offered, gate.features) == (False, (BACKEND_GATES[B(case.row.code)],))
    elif case.row.code in GATES:
        how, *features = GATES[F(case.row.code)]
        assert (gate.offered, list(gate.features)) == (how == "offered", features)
    else:
        assert not gate.features


def test_a_log_in_shared_memory_is_answered_with_success() -> None:
    (variant,) = FRONTEND[F.SET_LOG_BASE].variants
    assert variant.row.done == U64(0)


def test_the_message_table_is_current() -> None:
    path = Path(__file__).parents[2] / "docs" / "messages.md"
    assert path.read_text() == script("messages").page(), "run: python docs/messages.py"
