"""What only some kinds of device do: classes to mix into a ``Device``, one for each theme. ::

    class Accelerator(CryptoSessions, HostNotifiers, Device): ...

What belongs here: hooks that the runtime calls. What does not: what a device asks of the front-end and keeps account of
(``shared_objects``, ``shared_memory``), what every device has (``device``).

Each brings its protocol features along, so that they are offered by who has the methods and by nobody else. All hooks
are called on the control thread and must not block.
"""

from __future__ import annotations

import socket
from typing import ClassVar, NamedTuple

from vhostuser.protocol import ProtocolFeature, RequestRefused


class Hook:
    """Base of all of them."""

    offers: ClassVar[int] = 0
    """Protocol feature bits that come with the methods of this class."""


def offered_by(device: object) -> int:
    """The protocol feature bits of every hook that was mixed in."""
    bits = 0
    for kind in type(device).__mro__:
        bits |= vars(kind).get("offers", 0)
    return bits


class NotifierArea(NamedTuple):
    """A page of a device's own, which the guest writes to instead of a kick. fd: stays the device's.

    offset: bytes, whole pages. size: bytes, one page of the host.
    """

    fd: int
    offset: int
    size: int


class HostNotifiers(Hook):
    """Rings whose kicks can go to hardware directly (HOST_NOTIFIER)."""

    offers = ProtocolFeature.HOST_NOTIFIER.mask | ProtocolFeature.BACKEND_SEND_FD.mask

    def host_notifier(self, index: int) -> NotifierArea | None:
        """The area of ring ``index``, which is offered while the ring is started and enabled; None: it has none.

        Kicks keep coming by the eventfd as well: nobody has to map what is offered. Section
        "VHOST_USER_BACKEND_VRING_HOST_NOTIFIER_MSG".
        """
        return None


class CryptoSessions(Hook):
    """A crypto device whose sessions the front-end opens (CRYPTO_SESSION)."""

    offers = ProtocolFeature.CRYPTO_SESSION.mask

    def create_crypto_session(self, op_code: int, parameters: bytes) -> int:
        """Opens a session (CREATE_CRYPTO_SESSION); its id, 0 or more and of no other open session.

        The layout of ``parameters`` is the front-end's own and in no specification: trust nothing in it. Raises
        RequestRefused.
        """
        raise RequestRefused("the device has no crypto sessions")

    def close_crypto_session(self, session_id: int) -> None:
        """Closes a session that is open (CLOSE_CRYPTO_SESSION). What its front-end left open when it has gone, too."""


class GpuSocket(Hook):
    """A graphics device that shows its pictures by the vhost-user-gpu protocol."""

    def gpu_socket(self, sock: socket.socket) -> None:
        """The socket of that protocol (GPU_SET_SOCKET), the device's from now on, instead of one before.

        A connected Unix stream socket. Raises RequestRefused, and has then closed nothing.
        """
        raise RequestRefused("the device shows nothing")
