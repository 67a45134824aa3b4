"""Postcopy: more in tests/lab_postcopy/broken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.conformance.broken.registry import answering, fault, handling, script
from vhostuser.connection import Connection
from vhostuser.protocol import (
    BackendSession,
    FrontendRequest,
    Header,
    Outgoing,
)

F = FrontendRequest


@fault("postcopy.advise")
def advises_with_a_payload() -> None:
    def change(_: BackendSession, request: Any, answer: Outgoing | None) -> Outgoing | None:
        if answer is None or request.code is not F.POSTCOPY_ADVISE:
            return answer
        return Outgoing(Header(F.POSTCOPY_ADVISE, 5, 8).pack() + bytes(8), answer.fds)

    answering(change)


@fault("postcopy.listen-mapped")
def listens_with_regions() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        connection._regions.listen()

    handling(F.POSTCOPY_LISTEN, change)


# ---- disks of the laboratory

_LABORATORY = Path(__file__).parents[2] / "lab_postcopy/broken"


def _laboratory(name: str, *fails: str) -> None:
    script(_LABORATORY / f"{name}.py", *(f"postcopy.{case}" for case in fails))


_laboratory("advise_with_another_descriptor", "advise-userfaultfd")
_laboratory("advise_with_two_descriptors", "advise")
_laboratory("advise_without_descriptor", "advise")
_laboratory("bases_of_other_regions", "two-regions", "two-regions-in-table")
_laboratory("bases_of_the_front_end", "ack-empty", "ack-u64", "ack-slots")
_laboratory("bases_off_by_a_page", "fault", "end")
_laboratory("blocks_the_control_socket", "control")
_laboratory("end_not_answered", "end", "end-again", "second")
_laboratory("fills_before_the_ack", "no-touch", "no-hole-filled")
_laboratory("listen_not_acked", "listen", "listen-again")
_laboratory("registers_nothing", "fault", "no-hole-filled", "loss-then-next")
_laboratory("sends_an_idle_userfaultfd", "fault", "loss")
_laboratory("table_not_answered", "table", "table-order")
_laboratory("unregisters_early", "waits", "two-regions")
