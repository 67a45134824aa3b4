"""Answers that are wrong, late, cut short, or no; and what the front-end makes of them.

What belongs here: one misbehaviour for every message that has an answer. What does not: the death of the back-end
(``deaths``), its own channel (``channel``).

The specification has one sentence for all of these: a front-end that receives a wrong reply closes the connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from vhostuser.conformance.frontend_cases.rules import Rules, spelt, unharmed
from vhostuser.conformance.stage import FrontendBench, Outcome, Taken
from vhostuser.conformance.standin import Act, Answer, StandIn, Twist, pack
from vhostuser.conformance.suite import Run, Skipped, check
from vhostuser.conformance.transcript import Heard
from vhostuser.protocol import NEED_REPLY, REPLY, U64, VERSION, Empty, FrontendRequest, Inflight

F = FrontendRequest
CASES = Rules("answer", "Communication")
REFUSED = Rules("refused", "VHOST_USER_PROTOCOL_F_REPLY_ACK")

_ANSWERED = (
    F.GET_FEATURES, F.GET_PROTOCOL_FEATURES, F.GET_QUEUE_NUM, F.GET_MAX_MEM_SLOTS, F.GET_CONFIG, F.GET_INFLIGHT_FD,
    F.GET_STATUS, F.GET_VRING_BASE,
)  # fmt: skip
_LATE = 0.3
_PIECE = 5

Change = Callable[[int, bytes], bytes]
"""From the request's code and the body of the right answer, what is sent instead."""


def _sending(change: Change) -> Act:
    async def act(talk: StandIn, heard: Heard, answer: Answer | None) -> bool:
        if answer is None:
            return False
        await talk.send(change(heard.code, answer.payload.pack()), answer.fd)
        return False

    return act


def other_id(code: int) -> int:
    """Another request that has an answer."""
    return F.GET_FEATURES if code != F.GET_FEATURES else F.GET_QUEUE_NUM


WRONG: dict[str, tuple[str, Change]] = {
    "flags": ("without the flag of a reply", lambda code, body: pack(code, body, VERSION)),
    "id": ("under the id of another request", lambda code, body: pack(other_id(code), body)),
    "short": ("that is four bytes too short", lambda code, body: pack(code, body[:-4])),
    "long": ("that is eight bytes too long", lambda code, body: pack(code, body + bytes(8))),
}
"""Answers that are no answers: what they are, and how they are made."""


async def _outcome(bench: FrontendBench, name: str, code: FrontendRequest, act: Act, *, watch: bool = False) -> Outcome:
    offer = bench.offer_for(code)
    outcome = await bench.take(name, lambda: Twist(code, act, watch=watch), offer=offer)
    if outcome is None:
        raise Skipped(f"it did not come to {code.name} this time")
    if not outcome.asked:
        raise Skipped(f"it does not ask for an answer to {code.name}")
    return outcome


def _refuses(name: str, code: FrontendRequest, change: Change) -> Run[FrontendBench]:
    async def run(bench: FrontendBench) -> None:
        outcome = await _outcome(bench, f"{name}.{code.name}", code, _sending(change), watch=True)
        unharmed(outcome)
        closed = outcome.kind in (Taken.CLOSED, Taken.ENDED)
        check(closed, "the connection closed", f"it {outcome}")

    return run


def _goes_on(name: str, code: FrontendRequest, act: Act) -> Run[FrontendBench]:
    """What is right, however it comes, is taken. The last answer of all is followed by nothing but the end."""

    async def run(bench: FrontendBench) -> None:
        outcome = await _outcome(bench, f"{name}.{code.name}", code, act)
        unharmed(outcome)
        check(outcome.kind is Taken.WENT_ON or _last(bench, code), "the answer taken", f"it {outcome}")

    return run


def _last(bench: FrontendBench, code: FrontendRequest) -> bool:
    ended = [connection for connection in bench.sessions[0].connections if connection.ended]
    return bool(ended) and ended[-1].heard[-1].code == code


def _survives(name: str, code: FrontendRequest, act: Act) -> Run[FrontendBench]:
    async def run(bench: FrontendBench) -> None:
        outcome = await _outcome(bench, f"{name}.{code.name}", code, act)
        unharmed(outcome)
        check(not outcome.lacking, "everything set up again, or nothing", outcome.lacking)

    return run


async def _late(talk: StandIn, heard: Heard, answer: Answer | None) -> bool:
    await asyncio.sleep(_LATE)
    return True


async def _pieces(talk: StandIn, heard: Heard, answer: Answer | None) -> bool:
    if answer is None:
        return False
    data = pack(heard.code, answer.payload.pack())
    for at in range(0, len(data), _PIECE):
        await talk.send(data[at : at + _PIECE], *([] if at else [answer.fd]))
        await asyncio.sleep(0.02)
    return False


async def _half(talk: StandIn, heard: Heard, answer: Answer | None) -> bool:
    if answer is not None:
        data = pack(heard.code, answer.payload.pack())
        await talk.send(data[: len(data) - 4], answer.fd)
    talk.hang_up()
    return False


async def _never(talk: StandIn, heard: Heard, answer: Answer | None) -> bool:
    return False


for _code in _ANSWERED:
    for _name, (_words, _change) in WRONG.items():
        CASES.must(f"{_name}.{spelt(_code)}", f"An answer to {_code.name} {_words} ends the connection.", _code)(
            _refuses(_name, _code, _change)
        )

for _code in (F.GET_FEATURES, F.GET_CONFIG, F.GET_INFLIGHT_FD, F.GET_VRING_BASE):
    CASES.should(f"late.{spelt(_code)}", f"An answer to {_code.name} that takes {_LATE} s is waited for.", _code)(
        _goes_on("late", _code, _late)
    )
    CASES.must(f"half.{spelt(_code)}", f"A back-end that dies within its answer to {_code.name} does no harm.", _code)(
        _survives("half", _code, _half)
    )
    CASES.should(
        f"never.{spelt(_code)}", f"A front-end that waits for {_code.name} in vain can still be ended.", _code
    )(_survives("never", _code, _never))

for _code in (F.GET_FEATURES, F.GET_CONFIG, F.GET_VRING_BASE):
    CASES.must(f"pieces.{spelt(_code)}", f"An answer to {_code.name} may come in pieces.", _code)(
        _goes_on("pieces", _code, _pieces)
    )
for _code in (F.GET_FEATURES, F.GET_VRING_BASE):
    CASES.must(f"version.{spelt(_code)}", f"An answer to {_code.name} of version 2 ends the connection.", _code)(
        _refuses("version", _code, lambda code, body: pack(code, body, 2 | REPLY))
    )
    CASES.should(f"need-reply.{spelt(_code)}", f"An answer to {_code.name} that asks for one ends the connection.",
                 _code)(
        _refuses("need-reply", _code, lambda code, body: pack(code, body, VERSION | REPLY | NEED_REPLY))
    )  # fmt: skip


# ---- refusals


def _no_ring_runs(code: FrontendRequest, act: Act) -> Run[FrontendBench]:
    """What was refused is not taken for done: no ring is made ready on that connection."""

    async def run(bench: FrontendBench) -> None:
        outcome = await _outcome(bench, f"refused.{code.name}", code, act, watch=True)
        unharmed(outcome)
        ready = sorted(outcome.last.ready)
        check(not ready, "no ring made to run", f"rings {ready} made to run all the same")

    return run


_nack = _sending(lambda code, body: pack(code, U64(1).pack()))

for _code in (F.SET_MEM_TABLE, F.ADD_MEM_REG, F.SET_VRING_NUM, F.SET_VRING_ADDR, F.SET_VRING_KICK, F.SET_INFLIGHT_FD,
              F.SET_FEATURES):  # fmt: skip
    REFUSED.should(spelt(_code), f"Where {_code.name} was refused, no ring is made to run.", _code)(
        _no_ring_runs(_code, _nack)
    )


async def _empty(talk: StandIn, heard: Heard, answer: Answer | None) -> bool:
    await talk.send(pack(heard.code, Empty().pack()))
    return False


async def _refused_config(bench: FrontendBench) -> None:
    outcome = await _outcome(bench, "refused.GET_CONFIG", F.GET_CONFIG, _empty)
    unharmed(outcome)


async def _no_buffer(talk: StandIn, heard: Heard, answer: Answer | None) -> bool:
    assert answer is not None and isinstance(answer.payload, Inflight)
    nothing = Inflight(0, 0, answer.payload.num_queues, answer.payload.queue_size)
    await talk.send(pack(heard.code, nothing.pack()))
    return False


async def _refused_inflight(bench: FrontendBench) -> None:
    outcome = await _outcome(bench, "refused.GET_INFLIGHT_FD", F.GET_INFLIGHT_FD, _no_buffer, watch=True)
    unharmed(outcome)
    heard = [h for h in outcome.last.heard if h.code == F.SET_INFLIGHT_FD]
    check(not heard, "no SET_INFLIGHT_FD without a buffer", "SET_INFLIGHT_FD")


REFUSED.must("get-config", "A back-end that has no configuration space to tell does no harm.", F.GET_CONFIG,
             section="VHOST_USER_GET_CONFIG")(_refused_config)  # fmt: skip
REFUSED.must("get-inflight-fd", "Without a buffer, none is given back.", F.GET_INFLIGHT_FD,
             section="VHOST_USER_GET_INFLIGHT_FD")(_refused_inflight)  # fmt: skip
