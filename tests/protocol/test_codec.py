"""Framing: header first, payload after it, descriptors with the first byte, nothing read past the end."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostuser.protocol import HEADER_SIZE, U64, Header, LocalProtocolError, RemoteProtocolError, encode
from vhostuser.protocol.codec import Frame, Reader

MESSAGE = encode(8, 1, U64(5))


def admit_all(header: Header, fds: int) -> None:
    pass


@given(cuts=st.lists(st.integers(1, 20), min_size=1))
def test_a_message_in_pieces_is_the_same_message(cuts: list[int]) -> None:
    """Some front-ends write header and payload one by one, and a stream socket may cut anywhere."""
    reader = Reader(admit_all)
    left, frame = MESSAGE, None
    fds: tuple[int, ...] = (3, 4)
    sizes = iter(cuts)
    while left:
        size = min(next(sizes, 20), reader.wanted)
        assert frame is None
        frame = reader.feed(left[:size], fds)
        left, fds = left[size:], ()
    assert frame == Frame(Header(8, 1, 8), MESSAGE[HEADER_SIZE:], (3, 4))
    assert reader.wanted == HEADER_SIZE


def test_wanted_never_reaches_past_the_message() -> None:
    """The kernel would glue the next message's bytes, and its descriptors, to this one's."""
    reader = Reader(admit_all)
    assert reader.wanted == HEADER_SIZE
    reader.feed(MESSAGE[:5], ())
    assert reader.wanted == HEADER_SIZE - 5
    reader.feed(MESSAGE[5:12], ())
    assert reader.wanted == 8
    reader.feed(MESSAGE[12:13], ())
    assert reader.wanted == 7


def test_a_message_without_payload_ends_with_its_header() -> None:
    assert Reader(admit_all).feed(encode(3, 1), ()) == Frame(Header(3, 1, 0), b"", ())


@pytest.mark.parametrize("data", [b"", bytes(HEADER_SIZE + 1)])
def test_a_channel_that_read_nothing_or_too_much_is_told(data: bytes) -> None:
    with pytest.raises(LocalProtocolError):
        Reader(admit_all).feed(data, ())


@pytest.mark.parametrize("start", [1, 11, 12, 19])
def test_descriptors_in_mid_message_are_an_error(start: int) -> None:
    reader = Reader(admit_all)
    for first, last in ((0, min(start, 12)), (12, start)):
        if first < last:
            reader.feed(MESSAGE[first:last], ())
    with pytest.raises(RemoteProtocolError, match="first byte"):
        reader.feed(MESSAGE[start : start + 1], (7,))


def test_the_descriptors_object_is_handed_over_untouched() -> None:
    """It is the channel's, even when it is empty."""

    class Owned(tuple[int, ...]):
        pass

    fds = Owned()
    reader = Reader(admit_all)
    reader.feed(MESSAGE[:12], fds)
    frame = reader.feed(MESSAGE[12:], ())
    assert frame is not None
    assert frame.fds is fds


def test_a_header_is_judged_once_and_before_its_payload_is_asked_for() -> None:
    judged: list[tuple[Header, int]] = []
    reader = Reader(lambda header, fds: judged.append((header, fds)))
    reader.feed(MESSAGE[:11], (1,))
    assert not judged
    reader.feed(MESSAGE[11:12], ())
    assert judged == [(Header(8, 1, 8), 1)]
    reader.feed(MESSAGE[12:], ())
    assert len(judged) == 1


def test_end_of_file_between_messages_is_clean() -> None:
    reader = Reader(admit_all)
    reader.eof()
    reader.feed(encode(3, 1), ())
    reader.eof()


@pytest.mark.parametrize("size", range(1, len(MESSAGE)))
def test_end_of_file_inside_a_message_is_the_peers_fault(size: int) -> None:
    reader = Reader(admit_all)
    reader.feed(MESSAGE[: min(size, 12)], ())
    if size > 12:
        reader.feed(MESSAGE[12:size], ())
    with pytest.raises(RemoteProtocolError, match=f"{(12 if size < 12 else 20) - size} bytes of a message missing"):
        reader.eof()


REQUEST_FLAGS = {0x1, 0x9}


@pytest.mark.parametrize("flags", [*range(16), 0x11, 0x19, 0x80000001])
def test_flags_of_requests_and_replies(flags: int) -> None:
    """Version 1, no reserved bits; a reply's flags are exactly 0x5 (QEMU rejects 0xd)."""
    header = Header(1, flags, 0)
    for check, good in ((header.check_request, flags in REQUEST_FLAGS), (header.check_reply, flags == 0x5)):
        if good:
            check()
        else:
            with pytest.raises(RemoteProtocolError):
                check()
