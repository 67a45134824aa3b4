"""Where the frames of a network device go to and come from.

What belongs here: opening each kind of end and saying what it can do. What does not: moving frames, which is done in C
(``native/end_*.c``, ``native/hub.c``), and the device in front of the end (``net``).

An end belongs to one device. It is opened before the device is offered and stays open for the life of the process;
everything here runs on the control thread or the device's data thread and never touches guest memory.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

from vhostuser._native import ffi, lib
from vhostuser.metrics import Sample


class NetFeature(enum.IntEnum):
    """Feature bits of virtio-net that this device knows (virtio 1.3, section 5.1.3)."""

    CSUM = 0
    GUEST_CSUM = 1
    MTU = 3
    MAC = 5
    GUEST_TSO4 = 7
    GUEST_TSO6 = 8
    GUEST_ECN = 9
    HOST_TSO4 = 11
    HOST_TSO6 = 12
    HOST_ECN = 13
    MRG_RXBUF = 15
    STATUS = 16
    GUEST_ANNOUNCE = 21
    MQ = 22
    GUEST_USO4 = 54
    GUEST_USO6 = 55
    HOST_USO = 56
    SPEED_DUPLEX = 63


TSO: Final = frozenset(
    {
        NetFeature.CSUM,
        NetFeature.HOST_TSO4,
        NetFeature.HOST_TSO6,
        NetFeature.HOST_ECN,
        NetFeature.GUEST_CSUM,
        NetFeature.GUEST_TSO4,
        NetFeature.GUEST_TSO6,
        NetFeature.GUEST_ECN,
    }
)
"""Checksums left to the other side, and TCP segments of up to 64 KiB, both ways."""

USO: Final = frozenset({NetFeature.HOST_USO, NetFeature.GUEST_USO4, NetFeature.GUEST_USO6})
"""The same for UDP."""


class EndError(Exception):
    """The end cannot be had: one line that says why and what helps."""


class End:
    """What all ends have in common. ``native`` is the ``vu_end`` in C, valid as long as this object is."""

    kind: ClassVar[str]
    pairs: int
    offloads: frozenset[NetFeature] = frozenset()
    """What may be left to the other side of this end, and what it may leave to the guest."""
    linked: bool = True
    """Whether there is somebody at the other side, as far as the end can know."""
    native: Any

    def measure(self) -> Iterable[Sample]:
        """What the end counts beside what the device does for its queues. Control thread; must not block."""
        return ()

    async def attend(self, linked: Callable[[bool], None]) -> None:
        """What has to be done on the control thread as long as the end is used; returns if that is nothing.

        ``linked`` is called there when somebody has come to the other side, and when nobody is there any more.
        """

    def start(self, features: int) -> None:
        """The device starts with these negotiated features. Frames that are there already are forgotten: they were
        sent to whoever used the device before. Raises EndError."""
        lib.vu_end_flush(self.native)
        if lib.vu_end_accept(self.native, features) < 0:
            raise EndError(f"{self}: {os.strerror(ffi.errno)}")

    def stop(self) -> None:
        """The device has stopped; no ring uses the end until it starts again."""

    def inject(self, frame: bytes) -> bool:
        """Sends a frame of our own, as if the guest had; False if it was not taken. Never blocks."""
        return bool(lib.vu_end_inject(self.native, frame, len(frame)))

    def close(self) -> None:
        """Gives back what the system lent. No ring may use the end."""

    def state(self) -> dict[str, object]:
        """What SIGUSR1 shows of it: JSON-able values."""
        return {"end": str(self)}

    def __str__(self) -> str:
        return self.kind


def made(end: Any, error: Any, what: str) -> Any:
    """The ``vu_end`` or ``vu_hub`` in C, or EndError."""
    if end == ffi.NULL:
        code = error[0]
        reason = os.strerror(ffi.errno) if code == lib.VU_E_SYS else f"code {code}"
        raise EndError(f"{what}: cannot be made: {reason}")
    return end


class Sink(End):
    """Takes every frame and sends none."""

    kind = "sink"

    def __init__(self, pairs: int = 1, frame: bytes = b"") -> None:
        error = ffi.new("int *")
        self.pairs = pairs
        end = lib.vu_end_measure(pairs, frame, len(frame), error)
        self.native = ffi.gc(made(end, error, self.kind), lib.vu_end_free)


class Source(Sink):
    """Takes every frame, and sends one of ``size`` bytes for ever: a broadcast of an EtherType for experiments."""

    kind = "source"
    SIZES: ClassVar = range(14, 65558)

    def __init__(self, pairs: int = 1, size: int = 64) -> None:
        header = b"\xff" * 6 + b"\x02\x00\x00\x00\x00\x01" + b"\x88\xb5"  # IEEE 802, local experimental 1
        super().__init__(pairs, header + bytes(i % 251 for i in range(size - len(header))))


AGEING: Final = 300
"""Seconds after which a switch forgets a station that is silent (IEEE 802.1D, table 7-5)."""


class Hub:
    """Ports between which frames go, in this process. Each port is the end of one device."""

    def __init__(
        self,
        ports: int,
        pairs: int,
        *,
        learn: bool = False,
        reflect: bool = False,
        ageing: int = AGEING,
        names: Sequence[str] = (),
    ) -> None:
        """Frames go to every other port; with ``learn`` to where their station was heard, as in a bridge; with
        ``reflect`` back to where they came from. ``names`` are those of the ports, for the log. Raises EndError."""
        error = ffi.new("int *")
        flags = learn * lib.VU_HUB_LEARN | reflect * lib.VU_HUB_REFLECT
        kind = "loopback" if reflect else "switch" if learn else "peer"
        hub = lib.vu_hub_new(ports, pairs, flags, ageing, error)
        self.native = ffi.gc(made(hub, error, kind), lib.vu_hub_free)
        titles = [f"{name}: {kind}" for name in names] or [kind] * ports
        self.ports = [Port(self, number, pairs, titles[number]) for number in range(ports)]


class Port(End):
    """One port of a hub."""

    offloads = TSO | USO

    def __init__(self, hub: Hub, number: int, pairs: int, name: str) -> None:
        self._hub = hub.native  # alive as long as any of its ports
        self._number = number
        self._name = name
        self.pairs = pairs
        self.native = lib.vu_hub_port(hub.native, number)

    @property
    def stations(self) -> int:
        """How many are known to be behind it, if the hub learns."""
        return lib.vu_hub_stations(self._hub, self._number)

    def stop(self) -> None:
        """Also forgets who was behind it: the next guest here may be another one."""
        lib.vu_end_flush(self.native)

    def state(self) -> dict[str, object]:
        return super().state() | {"stations": self.stations}

    def __str__(self) -> str:
        return self._name


def loopback(pairs: int = 1) -> Port:
    """An end that sends every frame back."""
    return Hub(1, pairs, reflect=True).ports[0]


# linux/if_tun.h and linux/sockios.h
_TUNSETIFF, _TUNGETIFF = 0x400454CA, 0x800454D2
_TUNSETOFFLOAD, _TUNSETVNETHDRSZ = 0x400454D0, 0x400454D8
_IFF_TUN, _IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR, _IFF_MULTI_QUEUE = 0x1, 0x2, 0x1000, 0x4000, 0x0100
_TUN_F_CSUM, _TUN_F_TSO4, _TUN_F_TSO6, _TUN_F_USO = 0x01, 0x02, 0x04, 0x60
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 0x1
_IFREQ = struct.Struct("16sH22x")
_VNET_HEADER = 10

_CURES = {
    errno.EPERM: "not permitted: run with CAP_NET_ADMIN, or make it beforehand: ip tuntap add NAME mode tap user USER",
    errno.EBUSY: "somebody else uses it",
    errno.ENOENT: "/dev/net/tun is missing: modprobe tun",
    errno.EINVAL: "it exists and is no tap, or has another number of queues (multi_queue)",
}


class Tap(End):
    """A tap interface of the host, one descriptor for each pair.

    ``name`` is made if it does not exist, and then goes with the process. ``fds`` are descriptors that somebody else
    has opened, and are ours from here. Raises EndError.
    """

    kind = "tap"

    def __init__(self, name: str = "", pairs: int = 1, *, fds: Sequence[int] = ()) -> None:
        self._fds = list(fds)
        self.pairs = len(self._fds) or pairs
        try:
            if not fds:
                for _ in range(pairs):
                    self._open(name)
            self._configure(name)
        except OSError as error:
            self.close()
            cure = _CURES.get(error.errno or 0, error.strerror)
            raise EndError(f"tap {name or ', '.join(map(str, fds))}: {cure}") from None
        except EndError:
            self.close()
            raise

    def _open(self, name: str) -> None:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        self._fds.append(fd)
        several = _IFF_MULTI_QUEUE if self.pairs > 1 else 0
        flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | several
        fcntl.ioctl(fd, _TUNSETIFF, _IFREQ.pack(os.fsencode(name), flags))

    def _configure(self, name: str) -> None:
        error = ffi.new("int *")
        for fd in self._fds:
            os.set_blocking(fd, False)
            os.set_inheritable(fd, False)
        encoded, flags = _IFREQ.unpack(fcntl.ioctl(self._fds[0], _TUNGETIFF, bytes(_IFREQ.size)))
        self.name = os.fsdecode(encoded.rstrip(b"\0")) or name
        if flags & _IFF_TUN or not flags & _IFF_NO_PI:
            raise EndError(f"tap {self.name}: a tap without packet information is needed (IFF_TAP, IFF_NO_PI)")
        vnet = bool(flags & _IFF_VNET_HDR)
        if vnet:
            self._prepare_headers()
        self._bring_up()
        native = lib.vu_end_tap(self._fds, len(self._fds), vnet, error)
        self.native = ffi.gc(made(native, error, str(self)), lib.vu_end_free)

    def _prepare_headers(self) -> None:
        for fd in self._fds:
            fcntl.ioctl(fd, _TUNSETVNETHDRSZ, struct.pack("i", _VNET_HEADER))
        every = _TUN_F_CSUM | _TUN_F_TSO4 | _TUN_F_TSO6
        self.offloads = TSO
        with contextlib.suppress(OSError):  # Linux before 6.2
            fcntl.ioctl(self._fds[0], _TUNSETOFFLOAD, every | _TUN_F_USO)
            self.offloads |= USO
        fcntl.ioctl(self._fds[0], _TUNSETOFFLOAD, 0)

    def _bring_up(self) -> None:
        """What we may not do, somebody else has done or will do."""
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            request = bytes(fcntl.ioctl(control, _SIOCGIFFLAGS, _IFREQ.pack(os.fsencode(self.name), 0)))
            flags = _IFREQ.unpack(request)[1]
            fcntl.ioctl(control, _SIOCSIFFLAGS, _IFREQ.pack(os.fsencode(self.name), flags | _IFF_UP))

    def close(self) -> None:
        while self._fds:
            with contextlib.suppress(OSError):  # what was passed need not be open
                os.close(self._fds.pop())

    def __str__(self) -> str:
        return f"tap {self.name}"


def interface_exists(name: str) -> bool:
    """Whether the host (our network namespace) has an interface of this name."""
    return Path(f"/sys/class/net/{name}").exists()
