"""What the table of messages says of other programs is what recordings show, and no more."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.docs.test_site import DOCS, script
from vhostuser.protocol import BACKEND, FRONTEND

messages = script("messages")
RECORDINGS = sorted((DOCS / "tested").glob("*.jsonl"))


def said(message: str, *, awaits: bool = True, connection: int = 1) -> dict[str, Any]:
    return line(message, "request", awaits=awaits, connection=connection)


def answered(message: str, *, refused: bool = False, connection: int = 1) -> dict[str, Any]:
    return line(message, "reply", refused=refused, connection=connection)


def line(message: str, kind: str, *, awaits: bool = False, refused: bool = False, connection: int = 1) -> Any:
    what = {"connection": connection, "socket": "main", "from": "", "message": message, "kind": kind}
    return {**what, "awaits": awaits, "refused": refused, "event": "message", "violations": [], "faults": []}


def test_an_answer_shows_that_it_was_done() -> None:
    assert messages.served([said("A"), answered("A")]) == {"A"}


def test_no_answer_or_one_that_says_no_shows_nothing() -> None:
    assert messages.served([said("A"), said("B"), answered("B", refused=True)]) == set()
    assert messages.served([said("A"), answered("A", connection=2)]) == set()


def test_a_message_without_an_answer_counts_when_the_connection_went_on() -> None:
    assert messages.served([said("A", awaits=False)]) == set()
    assert messages.served([said("A", awaits=False), said("B"), answered("B")]) == {"A", "B"}


def test_a_connection_in_which_a_rule_was_broken_is_not_kept() -> None:
    good, bad = said("A"), {**said("A", connection=2), "violations": ["..."]}
    kept = list(messages.kept(map(json.dumps, [good, bad, answered("A", connection=2)])))
    assert [each["connection"] for each in kept] == [1]


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_a_recording_has_messages_of_the_catalog_only(path: Any) -> None:
    head, *lines = map(json.loads, path.read_text().splitlines())
    assert head["ours"] in ("front-end", "back-end")
    names = {str(row) for rows in (FRONTEND, BACKEND) for row in rows.values()}
    assert {each["message"] for each in lines} <= names
    assert messages.served(lines)


def test_programs_of_others_are_named_for_both_ends() -> None:
    assert all(messages.tested().values())
