"""Features and what is said of them."""

from __future__ import annotations

from typing import Any

from tests.conformance.broken.registry import fault, number
from vhostuser.protocol import (
    FrontendRequest,
    VirtioFeature,
)
from vhostuser.protocol.state import State

F = FrontendRequest


@fault("features.stable")
def forgets_what_it_offered() -> None:
    number(F.GET_FEATURES, lambda session, value: value & ~(1 << 9) if session.features else value)


@fault("features.protocol-stable")
def forgets_what_protocol_it_offered() -> None:
    number(F.GET_PROTOCOL_FEATURES, lambda session, value: value & ~4096 if session.protocol_features else value)


@fault("features.protocol-known")
def offers_what_does_not_exist() -> None:
    number(F.GET_PROTOCOL_FEATURES, lambda _, value: value | 1 << 40)


@fault("features.version-1")
def legacy() -> None:
    number(F.GET_FEATURES, lambda _, value: value & ~VirtioFeature.VERSION_1.mask)


@fault("features.queue-num")
def no_queues() -> None:
    number(F.GET_QUEUE_NUM, lambda _, value: 0)


@fault("features.mem-slots", "features.mem-slots-eight")
def no_slots() -> None:
    number(F.GET_MAX_MEM_SLOTS, lambda _, value: 0)


@fault("features.unoffered", "features.protocol-unoffered")
def takes_any_feature() -> None:
    right = State.__init__

    def init(state: State, *arguments: Any) -> None:
        right(state, *arguments)
        state.features_offered = state.protocol_features_offered = ~0

    State.__init__ = init  # type: ignore[method-assign]


@fault("message.ungated.get-config", "message.ungated.get-inflight-fd", "message.ungated.add-mem-reg")
def asks_for_no_feature() -> None:
    State.missing = lambda state, gate: ""  # type: ignore[method-assign]


@fault("features.reset-owner", "features.reset-owner-memory")
def forgets_everything_at_reset_owner() -> None:
    right = State.apply

    def apply(state: State, code: Any, payload: Any) -> None:
        right(state, code, payload)
        if code is F.RESET_OWNER:
            state.protocol_features = 0

    State.apply = apply  # type: ignore[method-assign]
