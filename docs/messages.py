"""Makes messages.md: the catalog, and against whom each message was tried at either end. python docs/messages.py

What belongs here: what counts as tried, and reading recordings. What does not: the rules (``vhostuser.protocol``).

A recording in tested/ is the transcript of a tracer (``vhostuser trace --json``) between one end of ours and a program
of others, without contents. Its first line says which end and which program. ::

    python docs/messages.py front-end "QEMU 7.2's storage daemon" < TRANSCRIPT > docs/tested/NAME.jsonl

keeps what matters of one, without connections in which either end broke a rule.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from vhostuser.protocol.table import Tested, table

HERE: Final = Path(__file__).parent
_KEPT: Final = ("connection", "socket", "from", "message", "kind", "awaits", "refused")


def page() -> str:
    """The whole of it."""
    return table(tested())


def tested() -> Tested:
    """By the end that is ours and by message: the programs with which a recording shows that it did what it is for."""
    found: dict[str, dict[str, list[str]]] = {"front-end": {}, "back-end": {}}
    for path in sorted((HERE / "tested").glob("*.jsonl")):
        head, *lines = map(json.loads, path.read_text().splitlines())
        for message in sorted(served(lines)):
            found[head["ours"]].setdefault(message, []).append(head["against"])
    return found


def served(lines: Iterable[Mapping[str, Any]]) -> set[str]:
    """Messages that were answered, and not with no; or that owe no answer, and after which others were answered."""
    found: set[str] = set()
    for messages in _connections(lines).values():
        asked: set[tuple[str, str]] = set()
        silent: set[str] = set()
        for line in messages:
            key = line["socket"], line["message"]
            if line["kind"] == "request":
                (asked.add(key) if line["awaits"] else silent.add(line["message"]))
            else:
                found |= silent | ({line["message"]} if key in asked and not line["refused"] else set())
                asked.discard(key)
                silent.clear()
    return found


def _connections(lines: Iterable[Mapping[str, Any]]) -> dict[int, list[Mapping[str, Any]]]:
    found: dict[int, list[Mapping[str, Any]]] = {}
    for line in lines:
        found.setdefault(line["connection"], []).append(line)
    return found


def kept(transcript: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The lines of a recording, from those of a tracer."""
    lines = [line for line in map(json.loads, transcript) if line["event"] == "message"]
    for messages in _connections(lines).values():
        if not any(line["violations"] or line["faults"] for line in messages):
            yield from ({name: line[name] for name in _KEPT} for line in messages)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        for record in ({"ours": sys.argv[1], "against": sys.argv[2]}, *kept(sys.stdin)):
            print(json.dumps(record))
    else:
        (HERE / "messages.md").write_text(page())
