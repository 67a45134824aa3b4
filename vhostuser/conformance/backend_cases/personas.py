"""What known front-ends say to a disk from their connecting to their end, and that requests are served in between.

What belongs here: their order of messages and their habits, as data. What does not: how a part is said (``persona``).

The first three are kept to recordings of the real ones (tests/conformance/recordings); the others were read in their
sources: crosvm and cloud-hypervisor of 2025, the driver below libblkio of 2024. Where a message depends on a feature it
is left out without it, so that a part can be said to any back-end.
"""

from __future__ import annotations

from typing import Final

from vhostuser.conformance.bench import Need
from vhostuser.conformance.peer import PLAIN, Peer
from vhostuser.conformance.persona import Lay, Offer, Persona, Player, Say, Serve, Step, asking, each
from vhostuser.conformance.suite import Theme
from vhostuser.protocol import DeviceStatus as S
from vhostuser.protocol import FrontendRequest as F
from vhostuser.protocol import ProtocolFeature as P
from vhostuser.protocol import VirtioFeature as V

CASES: Theme[Peer] = Theme("personas", "Communication")
MIB = 1 << 20
BIT_30 = V.PROTOCOL_FEATURES

_SIZE_MAX, _SEG_MAX, _GEOMETRY, _BLK_SIZE, _FLUSH, _TOPOLOGY, _WCE, _MQ, _DISCARD, _ZEROES = (
    1 << bit for bit in (1, 2, 4, 6, 9, 10, 11, 12, 13, 14)
)
_LINUX: Final = (
    PLAIN | _SEG_MAX | _GEOMETRY | _BLK_SIZE | _FLUSH | _TOPOLOGY | _WCE | _DISCARD | _ZEROES
    | V.RING_INDIRECT_DESC.mask | V.RING_EVENT_IDX.mask
)  # fmt: skip


def _mask(*features: P) -> int:
    return sum(feature.mask for feature in features)


# ---- QEMU: its device comes up, its firmware looks for something to boot from, then the guest's kernel takes over


def _qemu(firmware: int, kernel: int, *, asks: bool) -> tuple[Step, ...]:
    """firmware, kernel: entries of their rings. asks: whether SET_VRING_ENABLE has need_reply."""
    enable, disable = (Say(F.SET_VRING_ENABLE, on, asks=asks) for on in (1, 0))

    def start(lay: Lay, features: int | None, *memory: Say) -> tuple[Step, ...]:
        return (
            Say(F.SET_FEATURES, features),
            Say(F.GET_INFLIGHT_FD, 128, only=P.INFLIGHT_SHMFD),
            Say(F.SET_INFLIGHT_FD, only=P.INFLIGHT_SHMFD),
            lay,
            each(Say(F.SET_VRING_CALL)),
            Say(F.SET_FEATURES, features),
            *memory,
            each(Say(F.SET_VRING_NUM), Say(F.SET_VRING_BASE), Say(F.SET_VRING_ADDR), Say(F.SET_VRING_KICK)),
            each(enable),
            Serve(),
        )

    stop = (each(disable), each(Say(F.GET_VRING_BASE)))
    return (
        Say(F.GET_FEATURES),
        Say(F.GET_PROTOCOL_FEATURES),
        Say(F.SET_PROTOCOL_FEATURES),
        Say(F.GET_QUEUE_NUM, only=P.MQ),
        Say(F.GET_MAX_MEM_SLOTS, only=P.CONFIGURE_MEM_SLOTS),
        Say(F.SET_BACKEND_REQ_FD, asks=True, only=P.BACKEND_REQ),
        Say(F.SET_OWNER),
        Say(F.GET_FEATURES),
        each(Say(F.SET_VRING_CALL), Say(F.SET_VRING_ERR)),
        Say(F.GET_CONFIG, (0, 57, 0), only=P.CONFIG),
        *start(
            Lay(firmware),
            PLAIN | _SEG_MAX | _BLK_SIZE,
            Say(F.ADD_MEM_REG, 0, asks=True, only=P.CONFIGURE_MEM_SLOTS),
            Say(F.SET_MEM_TABLE, asks=True, unless=P.CONFIGURE_MEM_SLOTS),
        ),
        *stop,
        *start(Lay(kernel, place=1), None),
        *stop,
    )


_QEMU_PROTOCOL: Final = _mask(
    P.MQ, P.LOG_SHMFD, P.RARP, P.REPLY_ACK, P.MTU, P.BACKEND_REQ, P.CRYPTO_SESSION, P.PAGEFAULT, P.CONFIG,
    P.BACKEND_SEND_FD, P.HOST_NOTIFIER, P.INFLIGHT_SHMFD, P.RESET_DEVICE, P.CONFIGURE_MEM_SLOTS,
)  # fmt: skip
QEMU_7: Final = Persona(_LINUX, _QEMU_PROTOCOL, _qemu(128, 128, asks=False))
# Its guests take more entries than it asks an in-flight buffer for.
QEMU_10: Final = Persona(_LINUX, _QEMU_PROTOCOL, _qemu(256, 1024, asks=True))


# ---- DPDK's virtio_user: both rings before the features, status after each step, memory far above 4 GiB


_READY: Final = int(S.ACKNOWLEDGE | S.DRIVER | S.FEATURES_OK)
_HIGH: Final = 0x1_0020_0000
DPDK: Final = Persona(
    PLAIN | V.RING_INDIRECT_DESC.mask | V.IN_ORDER.mask,
    _mask(P.MQ, P.REPLY_ACK, P.STATUS),
    (
        Say(F.SET_OWNER),
        Say(F.GET_FEATURES),
        Say(F.GET_PROTOCOL_FEATURES),
        Say(F.SET_PROTOCOL_FEATURES),
        each(Say(F.SET_VRING_CALL)),
        Say(F.SET_FEATURES),
        Say(F.SET_STATUS, _READY, asks=True, only=P.STATUS),
        Say(F.GET_STATUS, only=P.STATUS),
        Say(F.GET_STATUS, only=P.STATUS),
        Say(F.SET_MEM_TABLE, asks=True),
        Lay(256),
        each(Say(F.SET_VRING_NUM), Say(F.SET_VRING_BASE), Say(F.SET_VRING_ADDR), Say(F.SET_VRING_KICK)),
        each(Say(F.SET_VRING_ENABLE, 1)),
        Say(F.SET_STATUS, _READY | S.DRIVER_OK, asks=True, only=P.STATUS),
        Serve(),
        each(Say(F.SET_VRING_ENABLE, 0)),
        each(Say(F.GET_VRING_BASE)),
    ),
    regions=((_HIGH, 8 * MIB),),
    rings_at=_HIGH,
    requests_at=_HIGH + MIB,
    queues=2,
)


# ---- crosvm: it negotiates REPLY_ACK and never asks, reads the space field by field, and sleeps


def _crosvm() -> tuple[Step, ...]:
    ring = (
        Say(F.SET_VRING_NUM),
        Say(F.SET_VRING_ADDR),
        Say(F.SET_VRING_BASE),
        Say(F.SET_VRING_CALL),
        Say(F.SET_VRING_KICK),
        Say(F.SET_VRING_ENABLE, 1),
    )
    sleep = each(Say(F.SET_VRING_ENABLE, 0), Say(F.GET_VRING_BASE))
    fields = ((0, 8), (8, 4), (12, 4), (20, 4), (32, 1), (34, 2))
    return (
        Say(F.SET_OWNER),
        Say(F.GET_FEATURES),
        Say(F.GET_PROTOCOL_FEATURES),
        Say(F.SET_PROTOCOL_FEATURES),
        Say(F.SET_BACKEND_REQ_FD, only=P.BACKEND_REQ),
        Say(F.GET_QUEUE_NUM, only=P.MQ),
        Say(F.SET_FEATURES),
        # Its flags are those of an older text: 1 is "writable".
        *(Say(F.GET_CONFIG, (offset, size, 1), only=P.CONFIG) for offset, size in fields),
        Say(F.SET_MEM_TABLE),
        Lay(256),
        each(*ring),
        Serve(),
        sleep,
        Say(F.SET_MEM_TABLE),
        each(*ring),
        Serve(),
        sleep,
    )


CROSVM: Final = Persona(
    _LINUX & ~V.RING_INDIRECT_DESC.mask,
    _mask(P.CONFIG, P.MQ, P.BACKEND_REQ, P.DEVICE_STATE, P.REPLY_ACK),
    _crosvm(),
)


# ---- cloud-hypervisor: need_reply on everything, sizes before the in-flight buffer, a pause by disabled rings


def _cloud_hypervisor() -> tuple[Step, ...]:
    return (
        Say(F.SET_OWNER),
        Say(F.GET_FEATURES),
        Say(F.GET_PROTOCOL_FEATURES),
        Say(F.SET_PROTOCOL_FEATURES),
        *asking(
            Say(F.GET_QUEUE_NUM, only=P.MQ),
            Say(F.GET_CONFIG, (0, 60, 1), only=P.CONFIG),
            Say(F.SET_FEATURES),
            Say(F.SET_MEM_TABLE),
            Lay(128),
            each(Say(F.SET_VRING_NUM)),
            Say(F.GET_INFLIGHT_FD, 128, only=P.INFLIGHT_SHMFD),
            Say(F.SET_INFLIGHT_FD, only=P.INFLIGHT_SHMFD),
            each(Say(F.SET_VRING_ADDR), Say(F.SET_VRING_BASE), Say(F.SET_VRING_CALL), Say(F.SET_VRING_KICK)),
            each(Say(F.SET_VRING_ENABLE, 1)),
            Serve(),
            # Paused, and resumed: what the guest's last kick announced is served then.
            each(Say(F.SET_VRING_ENABLE, 0)),
            Offer(),
            each(Say(F.SET_VRING_ENABLE, 1)),
            Serve(),
            each(Say(F.SET_VRING_ENABLE, 0), Say(F.GET_VRING_BASE)),
        ),
    )


CLOUD_HYPERVISOR: Final = Persona(
    _LINUX | _SIZE_MAX | V.ORDER_PLATFORM.mask,
    _mask(P.CONFIG, P.MQ, P.CONFIGURE_MEM_SLOTS, P.REPLY_ACK, P.INFLIGHT_SHMFD, P.LOG_SHMFD),
    _cloud_hypervisor(),
    regions=((0, 4 * MIB), (1 << 32, 4 * MIB)),
    requests_at=1 << 32,
)


# ---- libblkio: no guest at all, so that guest addresses are its own; features before protocol features; regions that
# ---- come and go under running rings, with a descriptor also to take one away


_OWN: Final = 0x7F10_0000_0000


def _libblkio() -> tuple[Step, ...]:
    return (
        Say(F.SET_OWNER),
        Say(F.GET_FEATURES),
        Say(F.SET_FEATURES),
        Say(F.GET_PROTOCOL_FEATURES),
        Say(F.SET_PROTOCOL_FEATURES),
        *asking(
            Say(F.GET_QUEUE_NUM, only=P.MQ),
            Say(F.GET_MAX_MEM_SLOTS),
            Say(F.GET_CONFIG, (0, 60, 0)),
            Say(F.ADD_MEM_REG, 0),
            Lay(128),
            each(
                Say(F.SET_VRING_NUM),
                Say(F.SET_VRING_BASE),
                Say(F.SET_VRING_ADDR),
                Say(F.SET_VRING_KICK),
                Say(F.SET_VRING_CALL),
                Say(F.SET_VRING_ENABLE, 1),
            ),
            Say(F.ADD_MEM_REG, 1),
            Serve(),
            Say(F.ADD_MEM_REG, 2),
            Serve(),
            Say(F.REM_MEM_REG, 2),
            Serve(),
        ),
    )


LIBBLKIO: Final = Persona(
    PLAIN | _SEG_MAX | _BLK_SIZE | _FLUSH | _TOPOLOGY | _WCE | _MQ | _DISCARD | _ZEROES | V.RING_EVENT_IDX.mask,
    _mask(P.REPLY_ACK, P.CONFIG, P.CONFIGURE_MEM_SLOTS, P.MQ),
    _libblkio(),
    regions=((_OWN, MIB), (_OWN + 64 * MIB, 4 * MIB), (_OWN + 128 * MIB, MIB)),
    rings_at=_OWN,
    requests_at=_OWN + 64 * MIB,
)

PERSONAS: Final = {
    "qemu-7": QEMU_7,
    "qemu-10": QEMU_10,
    "dpdk": DPDK,
    "crosvm": CROSVM,
    "cloud-hypervisor": CLOUD_HYPERVISOR,
    "libblkio": LIBBLKIO,
}
"""All of them, by the last part of their case's id."""


@CASES.must("qemu-7", "A machine of QEMU 7.2 boots from it: firmware, then kernel.", BIT_30, Need.RINGS)
async def _(peer: Peer) -> None:
    await Player(peer, QEMU_7).play()


@CASES.must(
    "qemu-10", "A machine of QEMU 10.0 boots from it, with rings larger than it has announced.", BIT_30, Need.RINGS
)
async def _(peer: Peer) -> None:
    await Player(peer, QEMU_10).play()


@CASES.must("dpdk", "It serves DPDK's virtio_user, by two rings in memory above 4 GiB.", BIT_30, Need.BOTH_RINGS)
async def _(peer: Peer) -> None:
    await Player(peer, DPDK).play()


@CASES.must(
    "crosvm", "It serves crosvm, which puts it to sleep and wakes it, and never asks for an answer.", BIT_30, Need.RINGS
)
async def _(peer: Peer) -> None:
    await Player(peer, CROSVM).play()


@CASES.must(
    "cloud-hypervisor",
    "It serves cloud-hypervisor, which pauses and resumes it, and asks for every answer.",
    BIT_30,
    Need.RINGS,
)
async def _(peer: Peer) -> None:
    await Player(peer, CLOUD_HYPERVISOR).play()


@CASES.must(
    "libblkio", "It serves libblkio, which gives and takes memory under running rings.",
    Need.RINGS, P.REPLY_ACK, P.CONFIG, P.CONFIGURE_MEM_SLOTS,
)  # fmt: skip
async def _(peer: Peer) -> None:
    await Player(peer, LIBBLKIO).play()
