"""The front-end: what drives a back-end over a socket. What belongs here: the public names, each from its module."""

from vhostuser.frontend.channel import Answerer, BackendEvent, BackendRequests, notifying
from vhostuser.frontend.frontend import DRIVABLE, DRIVABLE_PROTOCOL, Frontend, Listener
from vhostuser.frontend.iommu import Iommu, Mapping
from vhostuser.frontend.memory import SharedLog, SharedMemory, SharedRegion
from vhostuser.frontend.postcopy import ClientRegion, PostcopyClient
from vhostuser.frontend.requests import ReplyTimeout
from vhostuser.frontend.ring import FrontendRing, InflightBuffer
from vhostuser.frontend.services import BackendServices, ObjectRegistry, Window
from vhostuser.frontend.state import load_state, save_state
from vhostuser.raw import RawMessage

__all__ = [
    "DRIVABLE",
    "DRIVABLE_PROTOCOL",
    "Answerer",
    "BackendEvent",
    "BackendRequests",
    "BackendServices",
    "ClientRegion",
    "Frontend",
    "FrontendRing",
    "InflightBuffer",
    "Iommu",
    "Listener",
    "Mapping",
    "ObjectRegistry",
    "PostcopyClient",
    "RawMessage",
    "ReplyTimeout",
    "SharedLog",
    "SharedMemory",
    "SharedRegion",
    "Window",
    "load_state",
    "notifying",
    "save_state",
]
