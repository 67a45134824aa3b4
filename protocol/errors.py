"""Every exception class of the project, and nothing else.

The type says who is to blame and what becomes of the connection:

====================  ==========================================  ==========  ==================================
raised                because                                     connection  the peer learns
====================  ==========================================  ==========  ==================================
RemoteProtocolError   the peer broke the protocol                 closed      end of file
RequestRefused        a well-formed request cannot be fulfilled   stays       the refusal, if it can be expressed
QueueBroken           the driver wrote nonsense into a ring       stays       the ring's err eventfd
LocalProtocolError    our own caller is wrong                     stays       nothing, nothing was sent
====================  ==========================================  ==========  ==================================

A refusal that the message has no way to express becomes a RemoteProtocolError (see Server.finish).
"""

from enum import IntEnum


class VhostUserError(Exception):
    """Base of the exceptions that this project raises on purpose."""


class ProtocolError(VhostUserError):
    """Base of the two below; never raised itself, since it would not say whose fault it is.

    request: the code of the message concerned, None before one is known. reason: what was wrong and what was expected.
    clause: the section of the vhost-user specification.
    """

    def __init__(self, request: int | None, reason: str, *, clause: str = "") -> None:
        if type(self) is ProtocolError:
            raise TypeError("raise RemoteProtocolError or LocalProtocolError: they say whose fault it is")
        self.request = request
        self.reason = reason
        self.clause = clause
        super().__init__(f"{_name(request)}: {reason}" + (f" (see {clause})" if clause else ""))


class RemoteProtocolError(ProtocolError):
    """The peer broke the protocol: send `answer`, then close the connection and every descriptor it brought."""

    def __init__(self, request: int | None, reason: str, *, clause: str = "", answer: bytes = b"") -> None:
        super().__init__(request, reason, clause=clause)
        self.answer = answer
        """Bytes to send before closing: the nack of a request that asked for one. Empty in most cases."""


class LocalProtocolError(ProtocolError):
    """The caller asked for something the protocol does not allow. Nothing was sent and no state was changed."""


class RequestRefused(VhostUserError):
    """A well-formed request cannot be fulfilled. For handlers; the peer gets a nack where the message has one."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class QueueBroken(VhostUserError):
    """A ring holds something that no driver may write. Sticky: the queue does nothing more until it is set up anew.

    queue: index of the queue. head: head of the chain, -1 when the fault lies in the ring itself. code: the native
    boundary's number for the fault; reason: the same in words.
    """

    def __init__(self, queue: int, head: int, code: int, reason: str = "") -> None:
        self.queue = queue
        self.head = head
        self.code = code
        self.reason = reason
        where = f"queue {queue}" if head < 0 else f"queue {queue}, chain {head}"
        super().__init__(f"{where}: {reason or f'error {code}'}")


def _name(request: int | None) -> str:
    if request is None:
        return "connection"
    return request.name if isinstance(request, IntEnum) else f"request {request}"
