"""What a network interface says of itself, and does about what it is told."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from tests.conformance.broken.registry import F, handling, net_fault, number
from tests.conformance.plain import Interface, override
from tests.conformance.plain.net import ETHER
from vhostuser.connection import Connection
from vhostuser.devices.ends import NetFeature
from vhostuser.devices.net import MTU_LEAST, MTU_MOST, Net
from vhostuser.protocol import RequestRefused

N = NetFeature

# ---- configuration space


def _says(offset: int, data: bytes) -> None:
    """These bytes of the space are so."""
    right = Net.config

    def config(device: Net) -> bytes:
        space = right(device)
        return space[:offset] + data + space[offset + len(data) :]

    Net.config = config  # type: ignore[method-assign]


@net_fault("net.config.mac")
def has_the_address_of_a_group() -> None:
    _says(0, b"\x03")


@net_fault("net.config.status")
def has_a_status_of_its_own() -> None:
    _says(6, b"\x81")


@net_fault("net.config.pairs")
def tells_rings_for_pairs() -> None:
    _says(8, b"\4\0")


@net_fault("net.config.mtu")
def has_no_mtu() -> None:
    _says(10, b"\0\0")


@net_fault("net.config.speed")
def tells_bits_per_second() -> None:
    _says(12, struct.pack("<I", 4_000_000_000))


@net_fault("net.config.read-only")
def lets_drivers_choose_their_address() -> None:
    right = Net.config
    chosen: list[bytes] = []

    def set_config(device: Net, offset: int, data: bytes, *, migration: bool) -> None:
        chosen[:] = [data[:6]]

    Net.set_config = set_config  # type: ignore[method-assign]
    Net.config = lambda device: chosen[0] + right(device)[6:] if chosen else right(device)  # type: ignore[method-assign]


# ---- MTU


def _judges(good: Callable[[int], bool]) -> None:
    """Which MTU is taken."""

    def set_mtu(device: Net, mtu: int) -> None:
        if not good(mtu):
            raise RequestRefused(f"an MTU of {mtu}")
        device._mtu = mtu

    Net.set_mtu = set_mtu  # type: ignore[method-assign]


@net_fault("net.mtu.usual")
def wants_room_for_a_tag() -> None:
    _judges(lambda mtu: MTU_LEAST <= mtu <= 1496 or 1500 < mtu <= MTU_MOST)


@net_fault("net.mtu.least")
def wants_more_than_the_least_mtu() -> None:
    _judges(lambda mtu: MTU_LEAST < mtu <= MTU_MOST)


@net_fault("net.mtu.most")
def knows_no_mtu_beyond_jumbo_frames() -> None:
    _judges(lambda mtu: MTU_LEAST <= mtu <= 9000)


@net_fault("net.mtu.zero")
def takes_no_mtu_for_any() -> None:
    _judges(lambda mtu: not mtu or MTU_LEAST <= mtu <= MTU_MOST)


@net_fault("net.mtu.below")
def takes_a_minimum_of_64() -> None:
    _judges(lambda mtu: 64 <= mtu <= MTU_MOST)


@net_fault("net.mtu.above")
def takes_one_more_than_there_is() -> None:
    _judges(lambda mtu: MTU_LEAST <= mtu <= MTU_MOST + 1)


@net_fault("net.mtu.64-bits")
def looks_at_sixteen_bits_of_an_mtu() -> None:
    _judges(lambda mtu: mtu & 0xFFFF >= MTU_LEAST and mtu != MTU_MOST + 1)


@net_fault("net.mtu.told")
def takes_an_mtu_and_forgets_it() -> None:
    def set_mtu(device: Net, mtu: int) -> None:
        if not MTU_LEAST <= mtu <= MTU_MOST:
            raise RequestRefused("no MTU")

    Net.set_mtu = set_mtu  # type: ignore[method-assign]


@net_fault("net.mtu.refusal-changes-nothing")
def judges_an_mtu_when_it_has_taken_it() -> None:
    right = Net.set_mtu

    def set_mtu(device: Net, mtu: int) -> None:
        device._mtu = mtu & 0xFFFF
        right(device, mtu)

    Net.set_mtu = set_mtu  # type: ignore[method-assign]


def _wants_features(code: F) -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        if not connection._session.features:
            raise RequestRefused("features first")
        return await right(connection, request)

    handling(code, change)


@net_fault("net.mtu.early")
def wants_features_before_the_mtu() -> None:
    _wants_features(F.NET_SET_MTU)


@net_fault("net.mtu.carried")
def counts_the_ethernet_header_to_the_mtu() -> None:
    override(Interface, sized=lambda device, length: ETHER <= length <= (1500 if device.has(N.MTU) else 70000))


@net_fault("net.mtu.exceeded")
def leaves_the_mtu_to_the_sender() -> None:
    override(Interface, exceeds=lambda device, frame: False)


# ---- announcements


@net_fault("net.rarp.early")
def announces_nobody_without_rings() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        if not any(ring.started for ring in connection._session.rings):
            raise RequestRefused("no rings")
        return await right(connection, request)

    handling(F.SEND_RARP, change)


@net_fault("net.rarp.sent")
def takes_the_last_six_bytes_for_the_address() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        connection.device.announce_guest(request.payload.value.to_bytes(8, "little")[2:])

    handling(F.SEND_RARP, change)


# ---- feature bits


@net_fault("net.features.dependencies")
def offers_ecn_without_segments() -> None:
    segments = sum(1 << feature for feature in (N.HOST_TSO4, N.HOST_TSO6))
    number(F.GET_FEATURES, lambda _, value: value & ~segments)
