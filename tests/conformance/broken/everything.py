"""A disk that offers every protocol feature, so that cases about messages of other kinds of devices can be tried on it.

What belongs here: what our disk leaves to others, done in the plainest way that is right. What does not: faults.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from tests.conformance.broken.registry import FAULTS, F, Fault
from vhostuser import connection
from vhostuser.connection import HANDLERS, Connection
from vhostuser.device import Device
from vhostuser.protocol import (
    FRONTEND,
    CryptoSession,
    Empty,
    ProtocolFeature,
    Reply,
    Request,
    RequestRefused,
    ShmemConfig,
    VirtioFeature,
)

P, V = ProtocolFeature, VirtioFeature

OFFERED = (
    *(P.RARP, P.MTU, P.CROSS_ENDIAN, P.CRYPTO_SESSION),
    *(P.SHARED_OBJECT, P.DEVICE_STATE, P.SHMEM),
)
STATE = b"the state of a disk: nothing"


def offer_everything() -> None:
    """Patches our disk to this."""
    right = connection.protocol_features
    connection.protocol_features = lambda **what: right(**what) | sum(feature.mask for feature in OFFERED)
    connection.TRANSPORT_FEATURES |= V.ACCESS_PLATFORM.mask | V.NET_F_MTU.mask
    for code, row in FRONTEND.items():
        if row.unserved and row.gate.features:
            FRONTEND[code] = replace(row, unserved="")  # type: ignore[index]
    HANDLERS.update(_ANSWERS)
    Device.save_state = lambda _: STATE  # type: ignore[method-assign]
    Device.load_state = _load_state  # type: ignore[method-assign]


async def _done(_: Connection, __: Request) -> None:
    """There is nothing to do."""


async def _create_crypto_session(_: Connection, request: Request) -> Reply:
    assert isinstance(request.payload, CryptoSession)
    return Reply(replace(request.payload, session_id=1))


async def _get_shared_object(_: Connection, __: Request) -> Reply:
    return Reply(Empty(), fds=(os.memfd_create("object", os.MFD_CLOEXEC),))


async def _get_shmem_config(_: Connection, __: Request) -> Reply:
    return Reply(ShmemConfig(0, (0,) * 256))


def _load_state(_: Device, state: bytes) -> None:
    if state != STATE:
        raise RequestRefused("a part of the state")


_ANSWERS: dict[int, Any] = {
    F.SEND_RARP: _done,
    F.NET_SET_MTU: _done,
    F.CREATE_CRYPTO_SESSION: _create_crypto_session,
    F.GET_SHARED_OBJECT: _get_shared_object,
    F.GET_SHMEM_CONFIG: _get_shmem_config,
}

FAULTS["offers_everything"] = Fault(offer_everything, ())
