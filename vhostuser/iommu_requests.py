"""Requests about translations: the device IOTLB that the front-end fills, asked for by rings.

What belongs here: IOTLB_MSG both ways, and when an invalidation is answered. What does not: the table (``iotlb``), what
a ring has in use (``virtqueue``), the back-end channel (``backend_channel``). Section "IOMMU support".

Control thread only; nothing here touches guest memory. An invalidation waits for the requests that use what it takes
away: they are complete by then, or given back to be translated anew. It needs no other message of the front-end's: what
was taken from a ring has all its translations, and what lacks one was not taken.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable

from vhostuser.arguments import payload_of
from vhostuser.iotlb import DeviceIotlb, Question
from vhostuser.lifecycle import Lifecycle
from vhostuser.memory import GuestMemory
from vhostuser.protocol import U64, BackendRequest, Iotlb, IotlbType, Reply, Request, RequestRefused, VirtioFeature

log = logging.getLogger("vhostuser")

_UNTOLD = 1024
"""Questions that are kept for a channel that has yet to come; every ring has 32 at most."""

_CHANNEL = "ACCESS_PLATFORM needs BACKEND_REQ, SET_BACKEND_REQ_FD, and answers to what is missing"


class IommuRequests:
    """Fulfils them for one connection. ``memory`` tells what is mapped.

    ``tell`` sends a message to the front-end; False where there is no way yet. No acknowledgement is asked for: the
    answer to a miss is an update, and where none comes the ring waits until its driver resets the device.
    """

    def __init__(
        self,
        name: str,
        life: Lifecycle,
        memory: Callable[[], GuestMemory],
        tell: Callable[[BackendRequest, Iotlb], bool],
    ) -> None:
        self._name = name
        self._life = life
        self._memory = memory
        self._tell = tell
        self._untold: deque[Iotlb] = deque(maxlen=_UNTOLD)

    def negotiated(self, features: int) -> None:
        """The features have changed; no ring runs. Raises OSError where no descriptor is left."""
        self.close()
        if features & VirtioFeature.ACCESS_PLATFORM.mask:
            iotlb = self._life.iotlb = DeviceIotlb(len(self._life.rings))
            asyncio.get_running_loop().add_reader(iotlb.fd, self._ask, iotlb)

    async def iotlb_msg(self, request: Request) -> Reply:
        message = payload_of(request, Iotlb)
        iotlb = self._life.iotlb
        if iotlb is None:
            raise RequestRefused("ACCESS_PLATFORM was not negotiated")
        if message.type == IotlbType.UPDATE:
            iotlb.update(self._memory(), message.iova, message.size, message.user, message.permissions)
        else:
            await self._invalidate(iotlb, message.iova, message.size)
        return Reply(U64(0))

    async def _invalidate(self, iotlb: DeviceIotlb, iova: int, size: int) -> None:
        iotlb.invalidate(iova, size)
        users = [ring for ring in self._life.rings if ring.uses(iova, size)]
        if users:
            async with self._life.halted(*users):
                pass

    def _ask(self, iotlb: DeviceIotlb) -> None:
        told = not self._untold
        for question in iotlb.take():
            if question.denied:
                log.warning("%s: %s", self._name, _denial(question))
            kind = IotlbType.ACCESS_FAIL if question.denied else IotlbType.MISS
            self._untold.append(Iotlb(question.iova, 0, 0, question.access, kind))
        self.tell_due()
        if told and self._untold:
            # A front-end that takes whatever is offered, and knows nothing of translations, would never learn why.
            log.warning("%s: rings wait for translations until there is a channel to ask by: %s", self._name, _CHANNEL)

    def tell_due(self) -> None:
        """Tells what has not been told for want of a channel."""
        while self._untold and self._tell(BackendRequest.IOTLB_MSG, self._untold[0]):
            self._untold.popleft()

    def close(self) -> None:
        """Stops asking, and forgets everything; no ring runs."""
        self._untold.clear()
        if self._life.iotlb is not None:
            asyncio.get_running_loop().remove_reader(self._life.iotlb.fd)
            self._life.iotlb.close()
            self._life.iotlb = None


def _denial(question: Question) -> str:
    access = ("", "read", "written", "read and written")[question.access]
    return f"ring {question.ring}: I/O virtual address {question.iova:#x} may not be {access}"
