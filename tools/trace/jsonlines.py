"""Events as JSON, one object a line: what programs read, and what a replay is made of. Pure."""

from __future__ import annotations

import json
from dataclasses import asdict, is_dataclass
from typing import Any

from vhostuser.tools.trace.events import Event, Passed, Waits
from vhostuser.tools.trace.words import words


def line(event: Event) -> str:
    """The object, without its newline. Times are nanoseconds; `bytes` is the message in hex as it came."""
    seen = event.seen if isinstance(event, Passed) else event
    head = {"at": seen.at, "connection": seen.connection}
    if isinstance(event, Passed):
        return json.dumps({"event": "message", **head, **_message(event)})
    if isinstance(event, Waits):
        awaited = {"message": event.message.name, "waits": event.message.sender.value, "since": event.since}
        return json.dumps({"event": "waits", **head, **awaited})
    return json.dumps({"event": "notice", **head, "text": event.text, "rings": [_plain(ring) for ring in event.rings]})


def _message(event: Passed) -> dict[str, Any]:
    message = event.message
    return {
        "socket": message.wire.value,
        "from": message.sender.value,
        "message": message.name,
        "kind": "request" if message.is_request else "reply",
        "id": message.header.request,
        "flags": message.header.flags,
        "size": message.header.size,
        "payload": _plain(message.payload),
        "words": words(message),
        "fds": [asdict(what) for what in event.seen.fds],
        "awaits": message.awaits,
        "refused": message.refused,
        "latency": event.latency,
        "held": event.seen.held,
        "rings": [_plain(ring) for ring in message.rings],
        "violations": [what._asdict() for what in message.complaints],
        "faults": list(event.seen.faults),
        "bytes": event.seen.data.hex(),
    }


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if hasattr(value, "_asdict"):
        return value._asdict()
    if isinstance(value, bytes):
        return value.hex()
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value
