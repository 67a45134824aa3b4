"""How a rule about what a front-end says becomes a case: it is tried on everything that was heard in the sessions.

What belongs here: the forms that rules have. What does not: rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum

from vhostuser.conformance.stage import FrontendBench, Outcome
from vhostuser.conformance.suite import Case, Level, Run, Skipped, Theme, Violation
from vhostuser.conformance.transcript import Heard, Scene, Transcript
from vhostuser.protocol import FrontendRequest

Objection = Callable[[Scene, Heard], str]
"""What is wrong with a message, which is given with what stood before it; empty: nothing."""

Judgement = Callable[[Transcript], str | None]
"""What is wrong with a connection; empty: nothing, None: there is nothing to judge in it."""


class Rules(Theme[FrontendBench]):
    """The cases of one theme about front-ends."""

    def message(
        self, name: str, rule: str, *codes: FrontendRequest, should: bool = False, section: str = ""
    ) -> Callable[[Objection], Objection]:
        """Declares the function under it as a rule about each message of these codes; none given: about every one."""

        def add(objection: Objection) -> Objection:
            async def run(bench: FrontendBench) -> None:
                _judge(bench, rule, codes, objection)

            where = section or (f"VHOST_USER_{codes[0].name}" if codes else self.section)
            self._add(name, rule, should, where, (), run)
            return objection

        return add

    def connection(
        self, name: str, rule: str, *, should: bool = False, section: str = ""
    ) -> Callable[[Judgement], Judgement]:
        """Declares the function under it as a rule about each connection as a whole."""

        def add(judgement: Judgement) -> Judgement:
            async def run(bench: FrontendBench) -> None:
                found = [(each, judgement(each)) for each in _connections(bench)]
                if all(wrong is None for _, wrong in found):
                    raise Skipped("this front-end does nothing that it speaks of")
                for each, wrong in found:
                    if wrong:
                        raise Violation(_expectation(rule), f"{wrong}, {each.name}")

            self._add(name, rule, should, section or self.section, (), run)
            return judgement

        return add

    def _add(
        self, name: str, rule: str, should: bool, section: str, needs: tuple[Enum, ...], run: Run[FrontendBench]
    ) -> None:
        level = Level.SHOULD if should else Level.MUST
        self.cases.append(Case(f"{self.name}.{name}", section or self.section, rule, level, needs, run))


def _connections(bench: FrontendBench) -> Iterator[Transcript]:
    for session in bench.sessions:
        yield from session.connections


def _judge(bench: FrontendBench, rule: str, codes: tuple[FrontendRequest, ...], objection: Objection) -> None:
    tried = False
    for connection in _connections(bench):
        for scene, heard in connection.walk():
            if codes and heard.code not in codes:
                continue
            tried = True
            if wrong := objection(scene, heard):
                raise Violation(_expectation(rule), f"{heard}: {wrong}, {connection.name}")
    if not tried:
        raise Skipped(f"it never sends {' or '.join(code.name for code in codes) or 'anything'}")


def _expectation(rule: str) -> str:
    first = rule if rule[1].isupper() else rule[0].lower() + rule[1:]
    return first.rstrip(".")


def spelt(code: FrontendRequest) -> str:
    """A message's name in ids."""
    return code.name.lower().replace("_", "-")


# ---- what was done to a front-end


def unharmed(outcome: Outcome) -> None:
    """Raises Violation if it was ended by a signal, or does not end when it is asked to."""
    if outcome.crash:
        raise Violation("the front-end to survive what a back-end does", outcome.crash)
    if outcome.hung:
        raise Violation("a front-end that can be ended (SIGTERM)", f"it {outcome}, and does not end")
