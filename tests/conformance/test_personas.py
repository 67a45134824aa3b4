"""The personas say what the recorded front-ends have said, in the same order."""

import json
from pathlib import Path
from typing import Any

import pytest

from vhostuser.conformance.backend_cases.personas import CASES, PERSONAS
from vhostuser.conformance.persona import Feature, Lay, Persona, Say
from vhostuser.protocol import NEED_REPLY, ProtocolFeature
from vhostuser.protocol import FrontendRequest as F

RECORDINGS = sorted(Path(__file__).with_name("recordings").glob("*.jsonl"))
WITH_FD = {F.SET_BACKEND_REQ_FD, F.SET_VRING_CALL, F.SET_VRING_ERR, F.SET_VRING_KICK, F.ADD_MEM_REG, F.SET_INFLIGHT_FD}
WITH_FD |= {F.SET_MEM_TABLE}
RINGS = {"SET_VRING_NUM", "SET_VRING_BASE", "GET_VRING_BASE", "SET_VRING_ADDR", "SET_VRING_ENABLE"}
RINGS |= {"SET_VRING_KICK", "SET_VRING_CALL", "SET_VRING_ERR"}

Told = tuple[str, bool, int, int | None, Any]
"""Name, need_reply, descriptors, ring, and the number that tells habits apart."""


def recorded(request: dict[str, Any]) -> Told:
    name, payload = request["message"], request["payload"]
    number: Any = None
    match name:
        case "SET_VRING_NUM" | "SET_VRING_ENABLE":
            number = payload["num"]
        case "GET_CONFIG":
            number = payload["offset"], payload["size"], payload["flags"]
        case "GET_INFLIGHT_FD":
            number = payload["queue_size"]
        case "SET_STATUS":
            number = payload["value"]
    ring = payload["index"] if name in RINGS else None
    return name, bool(request["flags"] & NEED_REPLY), len(request["fds"]), ring, number


def said(persona: Persona, protocol_features: int) -> list[Told]:
    told: list[Told] = []
    size = 0

    def has(feature: Feature) -> bool:
        assert isinstance(feature, ProtocolFeature)
        return bool(protocol_features & feature.mask)

    for step, ring in persona.script(has, range(persona.queues)):
        if isinstance(step, Lay):
            size = step.size
        if isinstance(step, Say):
            number = size if step.code is F.SET_VRING_NUM else step.value
            number = None if step.code in (F.SET_FEATURES, F.ADD_MEM_REG) else number
            asks = step.asks and has(ProtocolFeature.REPLY_ACK)
            name = step.code.name
            told.append((name, asks, int(step.code in WITH_FD), ring if name in RINGS else None, number))
    return told


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_a_persona_says_what_was_recorded(path: Path) -> None:
    requests = [json.loads(line) for line in path.read_text().splitlines()]
    negotiated = next(item["payload"]["value"] for item in requests if item["message"] == "SET_PROTOCOL_FEATURES")
    persona = PERSONAS[path.stem]
    assert said(persona, negotiated) == [recorded(request) for request in requests]
    assert negotiated & ~persona.protocol_features == 0, "what the real one took, the persona would take too"


def test_there_are_recordings_and_a_case_for_each_persona() -> None:
    assert [path.stem for path in RECORDINGS] == ["dpdk", "qemu-10", "qemu-7"]
    assert [case.id for case in CASES.cases] == [f"personas.{name}" for name in PERSONAS]
