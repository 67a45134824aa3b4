"""The configuration space."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tests.conformance.broken.registry import F, answering, fault, handling
from vhostuser import device_requests
from vhostuser.connection import Connection
from vhostuser.devices.blk import Blk
from vhostuser.protocol import Config, Outgoing, Payload, Reply, RequestRefused, Row, exchange


@fault("config.part", "config.byte")
def ignores_the_offset() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        asked = request.payload
        if asked.offset > 256:
            return await right(connection, request)
        data = connection.device.config().ljust(256, b"\0")[: asked.size]
        return Reply(Config(asked.offset, asked.size, asked.flags, data))

    handling(F.GET_CONFIG, change)


@fault("config.beyond-is-error")
def knows_no_end_of_the_space() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        asked = request.payload
        if asked.offset < 256:
            return await right(connection, request)
        return Reply(Config(asked.offset, asked.size, asked.flags, bytes(asked.size)))

    handling(F.GET_CONFIG, change)


@fault("config.error-keeps-connection")
def leaves_after_an_error() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        if request.payload.offset > 256:
            raise ConnectionAbortedError
        return await right(connection, request)

    handling(F.GET_CONFIG, change)


@fault("config.read-only", "config.write-beyond", "config.write-cache")
def writes_anything() -> None:
    Blk.set_config = lambda *_, **__: None  # type: ignore[assignment,method-assign]
    device_requests._part = lambda request: request.payload  # type: ignore[assignment,return-value]


@fault("config.migration", "message.acknowledged.set-config")
def says_nothing_to_set_config() -> None:
    answering(lambda _, request, answer: None if request.code is F.SET_CONFIG else answer)


def _answers(change: Callable[[Connection, Config, Config], Config]) -> None:
    """Has answers to GET_CONFIG changed: by the connection, what was asked, and what is right."""

    async def handle(connection: Connection, request: Any, right: Any) -> Reply:
        right_answer = (await right(connection, request)).payload
        return Reply(change(connection, request.payload, right_answer))

    handling(F.GET_CONFIG, handle)


@fault("config.size")
def says_nothing_of_the_offset() -> None:
    _answers(lambda _, asked, answer: replace(answer, offset=0))


@fault("config.request-bytes")
def adds_to_what_was_sent() -> None:
    def change(_: Connection, asked: Config, answer: Config) -> Config:
        return replace(answer, data=bytes(a | b for a, b in zip(asked.data, answer.data, strict=True)))

    _answers(change)


@fault("config.repeated")
def counts_in_the_space() -> None:
    counter = itertools.count()

    def change(_: Connection, asked: Config, answer: Config) -> Config:
        return replace(answer, data=answer.data[:-1] + bytes([next(counter) & 0xFF])) if asked.size == 60 else answer

    _answers(change)


@fault("config.whole")
def has_a_space_of_32_bytes() -> None:
    def change(_: Connection, asked: Config, answer: Config) -> Config:
        if asked.size > 32:
            raise RequestRefused("there are 32 bytes")
        return answer

    _answers(change)


@fault("config.early")
def has_no_space_before_the_features() -> None:
    def change(connection: Connection, asked: Config, answer: Config) -> Config:
        if not connection._session.features:
            raise RequestRefused("no features yet")
        return answer

    _answers(change)


@fault("config.capacity")
def has_no_capacity() -> None:
    right = Blk.config
    Blk.config = lambda disk: bytes(8) + right(disk)[8:]  # type: ignore[method-assign]


@fault("config.beyond")
def says_nothing_of_errors() -> None:
    answering(lambda _, request, answer: None if _refuses(request, answer) else answer)


def _refuses(request: Any, answer: Outgoing | None) -> bool:
    return request.code is F.GET_CONFIG and answer is not None and len(answer.data) == 12


@fault("config.lying-size", "config.write-lying-size")
def believes_a_size() -> None:
    right = exchange._unpack

    def unpack(row: Row, kinds: Any, frame: Any) -> Payload:
        if Config in kinds:
            size = min(int.from_bytes(frame.body[4:8], "little"), 256)
            frame = frame._replace(
                body=(frame.body[:4] + size.to_bytes(4, "little") + frame.body[8:]).ljust(12 + size, b"\0")
            )
        return right(row, kinds, frame)

    exchange._unpack = unpack
