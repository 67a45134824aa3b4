"""The front-end's half of postcopy. What belongs here: the public names, each from its module."""

from vhostuser.faultserver.channels import Channels, ChannelStats
from vhostuser.faultserver.placement import Placement, Unsupported, WakePolicy
from vhostuser.faultserver.server import FaultServer
from vhostuser.faultserver.sources import (
    Ask,
    CallableSource,
    Feed,
    FilePiece,
    FileSource,
    MappedFile,
    MappedPiece,
    MappedSource,
    PageLost,
    PageSource,
    SourceLost,
    image_pieces,
)
from vhostuser.faultserver.stats import Client, ClientStats, Event, EventKind, ServerStats
from vhostuser.faultserver.stream import StreamSource, serve_pages

__all__ = [
    "Ask",
    "CallableSource",
    "ChannelStats",
    "Channels",
    "Client",
    "ClientStats",
    "Event",
    "EventKind",
    "FaultServer",
    "Feed",
    "FilePiece",
    "FileSource",
    "MappedFile",
    "MappedPiece",
    "MappedSource",
    "PageLost",
    "PageSource",
    "Placement",
    "ServerStats",
    "SourceLost",
    "StreamSource",
    "Unsupported",
    "WakePolicy",
    "image_pieces",
    "serve_pages",
]
