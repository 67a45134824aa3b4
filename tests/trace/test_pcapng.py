"""Packets and the dissector: what Wireshark reads is what was sent, for every message of the catalog."""

import csv
import io
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.protocol.samples import CASES, PAYLOADS
from vhostuser.protocol import REPLY, U64, VERSION, Empty, Header, MemoryTable, Payload, PostcopyAck, XenMemoryTable
from vhostuser.protocol import FrontendRequest as F
from vhostuser.protocol import ProtocolFeature as P
from vhostuser.protocol.catalog import BACKEND, FRONTEND, Row
from vhostuser.protocol.witness import Complaint, Message, RingState, Side, Wire
from vhostuser.tools.trace import dissector, pcapng
from vhostuser.tools.trace.events import Descriptor, Event, Notice, Passed, Sighting

pytestmark = pytest.mark.skipif(not shutil.which("tshark"), reason="tshark is not installed")
BEGAN = 1_700_000_000_000_000_000
NUMBER, ALL = "frame.number", "|"


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dissector") / "vhost-user.lua"
    path.write_text(dissector.script())
    return path


def read(script: Path, events: Iterable[Event], *names: str) -> list[dict[str, str]]:
    """What tshark finds in packets of these events: fields of each, several values joined."""
    data = bytearray()
    write = pcapng.writer(data.extend, BEGAN)
    for event in events:
        write(event)
    wanted = [argument for name in (NUMBER, "_ws.expert.message", *names) for argument in ("-e", name)]
    command = ["tshark", "-r-", "-n", "-X", f"lua_script:{script}", "-Tfields", "-Eheader=y", f"-Eaggregator={ALL}"]
    home = {"HOME": str(script.parent), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([*command, *wanted], input=data, env=home, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return list(csv.DictReader(io.StringIO(done.stdout.decode()), delimiter="\t", quoting=csv.QUOTE_NONE))


def passed(message: Message, *fds: Descriptor, latency: int | None = None, faults: tuple[str, ...] = ()) -> Passed:
    data = message.header.pack() + message.body
    return Passed(Sighting(1000, 1, message.wire, message.sender, data, fds, 0, 7, faults), message, latency)


# ---- every message, in each of its forms


@dataclass(frozen=True)
class Form:
    """A message with one of the payloads that it can have."""

    row: Row
    kind: type[Payload]
    reply: bool

    def message(self, payload: Payload) -> Message:
        wire = Wire.BACKEND if self.row.from_backend else Wire.MAIN
        flags = VERSION | REPLY if self.reply else VERSION
        body = payload.pack()
        # The acknowledgement of postcopy comes under another message's id.
        code = self.row.code or F.SET_MEM_TABLE
        header = Header(int(code), flags, len(body))
        return Message(wire, wire.asker.other if self.reply else wire.asker, header, body, 0, self.row, payload)


def forms() -> Iterator[Form]:
    for case in CASES:
        yield from (Form(case.row, kind, False) for kind in case.row.request)
        yield from (Form(case.row, kind, True) for kind in case.row.reply or (U64,))


FORMS = list(dict.fromkeys(forms()))


def snake(name: str) -> str:
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).lstrip("_")


def expected(payload: Payload) -> Iterator[tuple[str, Any]]:
    if not isinstance(payload, PostcopyAck):
        yield from _values(f"vhostuser.{snake(type(payload).__name__)}", payload)


def _values(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Payload):
        for field in fields(value):  # type: ignore[arg-type]
            yield from _values(f"{prefix}.{field.name}", getattr(value, field.name))
    elif isinstance(value, tuple):
        for item in value:
            yield from _values(prefix, item)
    else:
        yield prefix, value


def same(seen: str, value: Any) -> bool:
    if isinstance(value, bytes):
        return seen.replace(":", "") == value.hex()
    return seen in (str(value), str(int(value))) or (seen.startswith("0x") and int(seen, 16) == value)


def drawn(form: Form) -> st.SearchStrategy[Payload]:
    """One of this kind; a table without regions looks the same for all kinds of tables."""
    strategy = PAYLOADS[form.kind]
    if issubclass(form.kind, MemoryTable | XenMemoryTable):
        return strategy.filter(lambda table: table.regions)  # type: ignore[attr-defined]
    return strategy


@settings(max_examples=4, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(payloads=st.tuples(*(drawn(form) for form in FORMS)))
def test_every_field_of_every_message_is_read(script: Path, payloads: tuple[Payload, ...]) -> None:
    wanted = [list(expected(payload)) for payload in payloads]
    names = sorted({name for found in wanted for name, _ in found})
    events = [passed(form.message(payload)) for form, payload in zip(FORMS, payloads, strict=True)]
    found = read(script, events, "vhostuser.name", "vhostuser.payload", "vhostuser.body", *names)
    assert len(found) == len(FORMS)
    for form, fields_wanted, seen in zip(FORMS, wanted, found, strict=True):
        assert seen["vhostuser.name"] == str(form.row)
        assert not seen["_ws.expert.message"]
        for name in {name for name, _ in fields_wanted}:
            values = [value for other, value in fields_wanted if other == name and value != b""]
            shown = seen[name].split(ALL) if seen[name] else []
            assert len(values) == len(shown) and all(map(same, shown, values)), (form, name, shown, values)
        strange = [name for name in names if seen[name] and name not in dict(fields_wanted)]
        assert not strange, (form, strange)


def test_every_row_has_its_forms() -> None:
    assert {form.row.code for form in FORMS} == {row.code for row in (*FRONTEND.values(), *BACKEND.values())}
    assert set(PAYLOADS) == {form.kind for form in FORMS}


# ---- what the tracer adds


def test_features_have_names(script: Path) -> None:
    wanted = U64(P.PAGEFAULT.mask | P.MQ.mask | 1 << 63)
    offer = Message(
        Wire.MAIN, Side.BACKEND, Header(F.GET_PROTOCOL_FEATURES, 5, 8), wanted.pack(), 0,
        FRONTEND[F.GET_PROTOCOL_FEATURES], wanted,
    )  # fmt: skip
    (seen,) = read(script, [passed(offer)], "vhostuser.bit", "_ws.col.Info")
    assert seen["vhostuser.bit"] == "MQ|PAGEFAULT|bit63"
    assert seen["_ws.col.Info"] == "GET_PROTOCOL_FEATURES reply: MQ PAGEFAULT bit63"


def test_an_acknowledgement_has_no_features(script: Path) -> None:
    row = FRONTEND[F.SET_FEATURES]
    ack = Message(Wire.MAIN, Side.BACKEND, Header(F.SET_FEATURES, 5, 8), U64(1).pack(), 0, row, U64(1), refused=True)
    (seen,) = read(script, [passed(ack)], "vhostuser.bit", "vhostuser.u64.value", "vhostuser.refused")
    assert (seen["vhostuser.bit"], seen["vhostuser.u64.value"]) == ("", "1")
    assert seen["vhostuser.refused"] in ("1", "True")


def test_descriptors_violations_rings_and_faults(script: Path) -> None:
    """And header, flags, channel, sender, times: all that the text shows."""
    row = FRONTEND[F.SET_VRING_ENABLE]
    message = Message(
        Wire.MAIN, Side.FRONTEND, Header(F.SET_VRING_ENABLE, 9, 0), b"", 2, row,
        complaints=(Complaint("Ring states", "what a rule, has"),), rings=(RingState(3, False, True, True),),
    )  # fmt: skip
    fds = Descriptor("memfd", 4096, "sealed shrink"), Descriptor("eventfd")
    names = [f"vhostuser.{name}" for name in ("fd.kind", "fd.size", "fd.detail", "violation", "violation.section")]
    names += [f"vhostuser.{name}" for name in ("ring", "fault", "from", "channel", "held", "flags.need_reply", "size")]
    (seen,) = read(script, [passed(message, *fds, faults=("corrupted",))], *names, "frame.time_epoch")
    shown = [seen[name] for name in names]
    assert shown[:5] == ["memfd|eventfd", "4096", "sealed shrink", "what a rule, has", "Ring states"]
    assert shown[5:10] == ["ring 3: starts when kicked, enabled", "corrupted", "front-end", "main", "7"]
    assert shown[10] in ("1", "True")
    assert shown[11] == "0"
    assert "what a rule, has (see Ring states)" in seen["_ws.expert.message"]
    assert "on purpose: corrupted" in seen["_ws.expert.message"]
    assert seen["frame.time_epoch"] == "1700000000.000001000"


def test_an_answer_leads_to_its_request(script: Path) -> None:
    row = FRONTEND[F.SET_OWNER]
    asked = Message(Wire.MAIN, Side.FRONTEND, Header(F.SET_OWNER, 9, 0), b"", 0, row, Empty(), awaits=True)
    between = Notice(5, 1, "no packet")
    answered = Message(Wire.MAIN, Side.BACKEND, Header(F.SET_OWNER, 5, 8), bytes(8), 0, row, U64(0), asked)
    events: list[Event] = [passed(asked), between, passed(answered, latency=123)]
    first, second = read(script, events, "vhostuser.answers", "vhostuser.latency")
    assert (first["vhostuser.answers"], first["vhostuser.latency"]) == ("", "")
    assert (second["vhostuser.answers"], second["vhostuser.latency"]) == ("1", "123")


def test_what_nobody_knows_is_shown_in_bytes(script: Path) -> None:
    unknown = Message(Wire.MAIN, Side.FRONTEND, Header(99, 1, 3), b"abc", 0)
    wrong = Message(Wire.MAIN, Side.FRONTEND, Header(F.SET_OWNER, 1, 3), b"abc", 0, FRONTEND[F.SET_OWNER])
    found = read(script, [passed(unknown), passed(wrong)], "vhostuser.name", "vhostuser.body")
    assert [(seen["vhostuser.name"], seen["vhostuser.body"]) for seen in found] == [
        ("request 99", "616263"),
        ("SET_OWNER", "616263"),
    ]


def test_a_message_that_is_longer_than_what_was_kept(script: Path) -> None:
    """Its size is told, nothing breaks."""
    long = Message(Wire.MAIN, Side.FRONTEND, Header(99, 1, 1 << 30), bytes(65536), 0)
    (seen,) = read(script, [passed(long)], "vhostuser.size", "frame.len")
    assert seen["vhostuser.size"] == str(1 << 30)
    assert int(seen["frame.len"]) > 1 << 30
