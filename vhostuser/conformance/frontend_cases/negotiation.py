"""Features, in the order in which both ends come to know them.

What belongs here: what is taken of what is offered, and when. What does not: gates of single messages (``framing``).
"""

from __future__ import annotations

from vhostuser.conformance.frontend_cases.rules import Rules
from vhostuser.conformance.transcript import Heard, Scene, Transcript
from vhostuser.protocol import (
    U64,
    FrontendRequest,
    ProtocolFeature,
    VirtioFeature,
    feature_names,
    protocol_feature_names,
)

F, P, V = FrontendRequest, ProtocolFeature, VirtioFeature
OWNER = Rules("owner", "VHOST_USER_SET_OWNER")
FEATURES = Rules("features", "VHOST_USER_SET_FEATURES")
PROTOCOL = Rules("protocol-features", "VHOST_USER_SET_PROTOCOL_FEATURES")

_OF_RINGS = (F.SET_VRING_NUM, F.SET_VRING_ADDR, F.SET_VRING_BASE, F.SET_VRING_KICK, F.SET_VRING_ENABLE)
_OF_MEMORY = (F.SET_MEM_TABLE, F.ADD_MEM_REG)


def _value(heard: Heard) -> int:
    return heard.payload.value if isinstance(heard.payload, U64) else 0


# ---- owner


@OWNER.connection("announced", "SET_OWNER marks the session on every connection on which anything is set up.")
def announced(connection: Transcript) -> str | None:
    codes = connection.codes()
    if not any(codes[code] for code in (*_OF_RINGS, *_OF_MEMORY)):
        return None
    return "" if codes[F.SET_OWNER] else "no SET_OWNER"


@OWNER.message("once", "SET_OWNER is sent once.", F.SET_OWNER, should=True)
def once(scene: Scene, _: Heard) -> str:
    return "another one" if scene.seen[F.SET_OWNER] else ""


@OWNER.message("before-memory", "SET_OWNER comes before memory is shared.", *_OF_MEMORY, section="VHOST_USER_SET_OWNER")
def before_memory(scene: Scene, _: Heard) -> str:
    return "" if scene.seen[F.SET_OWNER] else "before SET_OWNER"


@OWNER.message("before-rings", "SET_OWNER comes before rings are set up.", *_OF_RINGS, section="VHOST_USER_SET_OWNER")
def before_rings(scene: Scene, _: Heard) -> str:
    return "" if scene.seen[F.SET_OWNER] else "before SET_OWNER"


@OWNER.message("no-reset", "RESET_OWNER, which back-ends understand differently, is not sent.", F.GET_FEATURES,
               F.RESET_OWNER, should=True, section="VHOST_USER_RESET_OWNER")  # fmt: skip
def no_reset(_: Scene, heard: Heard) -> str:
    return "it is deprecated" if heard.code == F.RESET_OWNER else ""


# ---- virtio features


@FEATURES.message("asked-first", "GET_FEATURES comes before SET_FEATURES.", F.SET_FEATURES)
def asked_first(scene: Scene, _: Heard) -> str:
    return "" if scene.seen[F.GET_FEATURES] else "before GET_FEATURES"


@FEATURES.message("offered", "No feature is taken that was not offered.", F.SET_FEATURES)
def offered(scene: Scene, heard: Heard) -> str:
    extra = _value(heard) & ~scene.offered
    return f"{feature_names(extra)} not offered" if extra else ""


@FEATURES.message("before-rings", "SET_FEATURES comes before a ring is given its kick.", F.SET_VRING_KICK,
                  section="VHOST_USER_SET_FEATURES")  # fmt: skip
def before_kick(scene: Scene, _: Heard) -> str:
    return "before SET_FEATURES" if scene.features is None else ""


@FEATURES.message("before-enable", "A ring is enabled by message only when PROTOCOL_FEATURES was negotiated.",
                  F.SET_VRING_ENABLE)  # fmt: skip
def before_enable(scene: Scene, _: Heard) -> str:
    return "" if scene.has(V.PROTOCOL_FEATURES) else "PROTOCOL_FEATURES not among the features that were set"


@FEATURES.message("kept-while-running", "While rings run, only LOG_ALL is changed of the features.", F.SET_FEATURES)
def kept_while_running(scene: Scene, heard: Heard) -> str:
    if not scene.running or scene.features is None:
        return ""
    changed = (scene.features ^ _value(heard)) & ~V.LOG_ALL.mask
    return f"{feature_names(changed)} changed while rings {scene.running} run" if changed else ""


@FEATURES.connection("bit-30", "A front-end that has set protocol features takes PROTOCOL_FEATURES too.", should=True)
def bit_30(connection: Transcript) -> str | None:
    scene = connection.now
    if scene.protocol is None or scene.features is None:
        return None
    return "" if scene.has(V.PROTOCOL_FEATURES) else f"features {feature_names(scene.features)}"


# ---- protocol features


@PROTOCOL.message("bit-30", "Protocol features are asked for only where PROTOCOL_FEATURES is offered.",
                  F.GET_FEATURES, F.GET_PROTOCOL_FEATURES, section="VHOST_USER_GET_PROTOCOL_FEATURES")  # fmt: skip
def only_if_offered(scene: Scene, heard: Heard) -> str:
    if heard.code == F.GET_FEATURES or scene.seen[F.GET_FEATURES]:
        return ""
    return "before GET_FEATURES has said that there are any"


@PROTOCOL.message("asked-first", "GET_PROTOCOL_FEATURES comes before SET_PROTOCOL_FEATURES.", F.SET_PROTOCOL_FEATURES)
def protocol_asked_first(scene: Scene, _: Heard) -> str:
    return "" if scene.seen[F.GET_PROTOCOL_FEATURES] else "before GET_PROTOCOL_FEATURES"


@PROTOCOL.message("offered", "No protocol feature is taken that was not offered.", F.SET_PROTOCOL_FEATURES)
def protocol_offered(scene: Scene, heard: Heard) -> str:
    extra = _value(heard) & ~scene.offered_protocol
    return f"{protocol_feature_names(extra)} not offered" if extra else ""


@PROTOCOL.message("before-use", "Nothing but features is asked before protocol features are set, if they are set.",
                  F.SET_PROTOCOL_FEATURES, should=True)  # fmt: skip
def before_use(scene: Scene, _: Heard) -> str:
    if scene.protocol is not None:
        return ""
    first = {F.GET_FEATURES, F.SET_FEATURES, F.SET_OWNER, F.GET_PROTOCOL_FEATURES, F.SET_PROTOCOL_FEATURES}
    early = [FrontendRequest(code).name for code in scene.seen if code in set(F) and code not in first]
    return f"after {', '.join(early)}" if early else ""


@PROTOCOL.message("fixed", "Protocol features do not change once they are set.", F.SET_PROTOCOL_FEATURES, should=True)
def fixed(scene: Scene, heard: Heard) -> str:
    changed = 0 if scene.protocol is None else scene.protocol ^ _value(heard)
    return f"{protocol_feature_names(changed)} changed" if changed else ""


@PROTOCOL.message("queues-asked", "A third ring and further ones are set up only after GET_QUEUE_NUM, if MQ is there.",
                  *_OF_RINGS, should=True, section="Multiple queue support")  # fmt: skip
def queues_asked(scene: Scene, heard: Heard) -> str:
    index = getattr(heard.payload, "index", 0)
    return "before GET_QUEUE_NUM" if index > 1 and scene.has(P.MQ) and not scene.seen[F.GET_QUEUE_NUM] else ""
