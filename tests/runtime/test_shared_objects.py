"""Objects that one device exports and another is given, by way of our front-end."""

import os
from collections.abc import Callable
from uuid import UUID

import pytest

from tests.runtime.gadget import PAGE, Gadget, Gadgets, memfd
from vhostuser import shared_objects
from vhostuser.protocol import (
    BackendRequest,
    FrontendRequest,
    RequestRefused,
    Uuid,
)

B, F = BackendRequest, FrontendRequest
ONE, TWO = UUID(int=1), UUID(int=2)


async def test_one_device_is_given_what_another_exports(gadgets: Callable[..., object]) -> None:
    exporter: Gadgets = await gadgets()  # type: ignore[misc]
    importer: Gadgets = await gadgets()  # type: ignore[misc]
    await exporter.device.objects.add(ONE, exporter.device.file)
    with pytest.raises(RequestRefused):
        await importer.device.objects.look_up(ONE)  # the front-end has not fetched it yet
    assert exporter.services._objects is not None
    await exporter.services._objects.fetch(ONE)
    fd = await importer.device.objects.look_up(ONE)
    assert os.pread(fd, 4, 0) == b"file"
    os.close(fd)
    await exporter.device.objects.remove(ONE)
    with pytest.raises(RequestRefused):
        await importer.device.objects.look_up(ONE)


async def test_only_the_owner_removes_an_object(gadgets: Callable[..., object]) -> None:
    exporter: Gadgets = await gadgets()  # type: ignore[misc]
    other: Gadgets = await gadgets()  # type: ignore[misc]
    await exporter.device.objects.add(ONE, exporter.device.file)
    with pytest.raises(RequestRefused, match="refused SHARED_OBJECT_ADD"):
        await other.device.objects.add(ONE, other.device.file)
    with pytest.raises(RequestRefused, match="is not exported"):
        await other.device.objects.remove(ONE)
    asking_ = other.pair.backend.connections[0]._announcements
    with pytest.raises(RequestRefused, match="refused SHARED_OBJECT_REMOVE"):
        await asking_.ask(B.SHARED_OBJECT_REMOVE, Uuid(ONE.bytes))
    fd = await exporter.pair.frontend.get_shared_object(ONE)
    os.close(fd)


async def test_an_object_belongs_to_the_table_while_it_is_exported(gadget: Gadgets) -> None:
    """The device may close its own descriptor; no_leaks looks for the table's at the end."""
    fd = memfd(PAGE, b"data")
    await gadget.device.objects.add(ONE, fd)
    os.close(fd)
    fetched = await gadget.pair.frontend.get_shared_object(ONE)
    assert os.pread(fetched, 4, 0) == b"data"
    os.close(fetched)
    with pytest.raises(RequestRefused, match="is exported already"):
        await gadget.device.objects.add(ONE, gadget.device.file)


async def test_an_object_that_is_not_there_is_answered_without_a_descriptor(gadget: Gadgets) -> None:
    with pytest.raises(RequestRefused):
        await gadget.pair.frontend.get_shared_object(TWO)
    await gadget.pair.frontend.send_raw(bytes.fromhex("29000000 01000000 00000000"))  # as QEMU asks: without a UUID
    message = await gadget.pair.frontend.receive_message()
    assert message is not None
    assert (message.header.request, message.body, len(message.fds)) == (F.GET_SHARED_OBJECT, b"", 0)


async def test_objects_are_limited(gadget: Gadgets, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_objects, "MOST_OBJECTS", 1)
    await gadget.device.objects.add(ONE, gadget.device.file)
    with pytest.raises(RequestRefused, match="1 objects are exported"):
        await gadget.device.objects.add(TWO, gadget.device.file)


async def test_what_a_front_end_refuses_is_not_exported(gadget: Gadgets) -> None:
    assert gadget.services._objects is not None
    gadget.services._objects.add(ONE, "somebody else")
    with pytest.raises(RequestRefused):
        await gadget.device.objects.add(ONE, gadget.device.file)
    with pytest.raises(RequestRefused):
        await gadget.pair.frontend.get_shared_object(ONE)


async def test_without_a_front_end_nothing_is_shared() -> None:
    device = Gadget()
    with pytest.raises(RequestRefused, match="no front-end is served"):
        _ = device.objects
    with pytest.raises(RequestRefused, match="no front-end is served"):
        _ = device.shmem
    device.close()
