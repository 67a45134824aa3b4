"""The catalog is complete, free of contradictions, and the documentation is made from it."""

from itertools import combinations
from pathlib import Path

import pytest

from tests.protocol.samples import CASES, Case, F, P, V
from vhostuser.protocol import BACKEND, FRONTEND, MAX_FDS, U64, feature_names, protocol_feature_names
from vhostuser.protocol.catalog import table

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


def test_a_log_in_shared_memory_is_answered_with_success() -> None:
    (variant,) = FRONTEND[F.SET_LOG_BASE].variants
    assert variant.row.done == U64(0)


def test_the_message_table_is_current() -> None:
    path = Path(__file__).parents[2] / "docs" / "messages.md"
    assert path.read_text() == table(), (
        "run: python -c 'from vhostuser.protocol.catalog import table; print(table(), end=\"\")' > docs/messages.md"
    )
