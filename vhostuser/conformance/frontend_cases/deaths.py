"""The back-end dies at every message and comes back: the front-end sets everything up again, or gives up in order.

What belongs here: ends of connections. What does not: half answers (``answers``).

Reconnecting is optional by the specification; so is going on without the device. What nobody may do is to end by a
signal, to hang, or to come back and leave a part out.
"""

from __future__ import annotations

from vhostuser.conformance.frontend_cases.rules import Rules, spelt, unharmed
from vhostuser.conformance.stage import FrontendBench
from vhostuser.conformance.standin import Answer, StandIn, Twist
from vhostuser.conformance.suite import Run, Skipped, check
from vhostuser.conformance.transcript import Heard
from vhostuser.protocol import FrontendRequest

F = FrontendRequest
CASES = Rules("death", "Communication")
LIFE = Rules("life", "Communication")

_AT = (
    F.GET_FEATURES, F.GET_PROTOCOL_FEATURES, F.SET_PROTOCOL_FEATURES, F.GET_QUEUE_NUM, F.GET_MAX_MEM_SLOTS,
    F.SET_BACKEND_REQ_FD, F.SET_OWNER, F.GET_CONFIG, F.SET_FEATURES, F.GET_STATUS, F.SET_STATUS, F.GET_INFLIGHT_FD,
    F.SET_INFLIGHT_FD, F.SET_MEM_TABLE, F.ADD_MEM_REG, F.REM_MEM_REG, F.SET_VRING_NUM, F.SET_VRING_BASE,
    F.SET_VRING_ADDR, F.SET_VRING_CALL, F.SET_VRING_ERR, F.SET_VRING_KICK, F.SET_VRING_ENABLE, F.GET_VRING_BASE,
)  # fmt: skip


async def _die(talk: StandIn, heard: Heard, answer: Answer | None) -> bool:
    talk.hang_up()
    return False


def _at(code: FrontendRequest) -> Run[FrontendBench]:
    async def run(bench: FrontendBench) -> None:
        offer = bench.offer_for(code)
        outcome = await bench.take(f"death.{code.name}", lambda: Twist(code, _die), offer=offer)
        if outcome is None:
            raise Skipped(f"it did not come to {code.name} this time")
        unharmed(outcome)
        check(not outcome.lacking, "everything set up again, or nothing", outcome.lacking)

    return run


for _code in _AT:
    CASES.must(f"at.{spelt(_code)}", f"A back-end that dies at {_code.name} does no harm, and may come back.", _code)(
        _at(_code)
    )


async def _while_running(bench: FrontendBench) -> None:
    session = next(each for each in bench.sessions if each.restart)
    check(not session.crash, "the front-end to survive the death of a back-end", session.crash)
    check(not session.hung, "a front-end that can be ended (SIGTERM)", "it does not end")
    first, *later = [connection for connection in session.connections if connection.heard]
    lacking = first.ready - later[-1].ready if later else frozenset()
    check(not lacking, "everything set up again, or nothing", f"rings {sorted(lacking)} not set up again")


CASES.must("while-running", "A back-end that dies while its rings run does no harm, and may come back.")(_while_running)


async def _right(bench: FrontendBench) -> None:
    for session in (each for each in bench.sessions if not each.restart):
        told = f"{session.crash}, {session.offer.name}"
        check(not session.crash, "the front-end to survive a back-end that is right", told)


async def _ends(bench: FrontendBench) -> None:
    for session in (each for each in bench.sessions if not each.restart):
        check(not session.hung, "a front-end that can be ended (SIGTERM)", f"it does not end, {session.offer.name}")


async def _sets_up(bench: FrontendBench) -> None:
    check(bool(bench.extent), "a ring made to run", "none, with everything offered that this suite can play")


LIFE.must("survives", "A back-end that does everything right ends no front-end by a signal.")(_right)
LIFE.must("ends", "A front-end whose back-end does everything right ends when it is asked to.")(_ends)
LIFE.should("sets-up", "A front-end that is offered everything sets a ring up.")(_sets_up)
