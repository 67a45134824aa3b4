"""What back-ends were reported or read to get wrong is tried: each of these mistakes has its cases.

A number stands for a group of reports; behind it, what is to be right. Two more things were read in hostile peers that
no front-end can see: whether descriptors are inherited by other programs, and who is to be blamed for a death.
"""

from __future__ import annotations

import pytest

from vhostuser.conformance.backend_cases import CASES
from vhostuser.conformance.suite import select

# fmt: off
REPORTED: dict[tuple[str, str], tuple[str, ...]] = {
    ("NEG-1", "protocol features come before the others"):
        ("features.protocol-set-first",),
    ("NEG-2", "a front-end need not ask before it takes REPLY_ACK"): ("features.protocol-set-alone",),
    ("NEG-3", "unknown bits and requests are refused"):
        ("features.unoffered", "features.protocol-unoffered", "framing.unknown", "framing.unknown-with-payload"),
    ("NEG-4", "SET_FEATURES enables rings without bit 30, and does nothing to them with it"):
        ("setup.without-bit-30", "features.bit-30-enables-nothing", "features.bit-30-disables-nothing",
         "features.log-all-while-running", "features.again-while-running"),
    ("RING-1", "kick and call come in any order, or not at all"):
        ("setup.nbakce", "setup.nbacke", "setup.nbake", "kick.polled", "kick.polled-index", "call.none"),
    ("RING-2", "a kick before ENABLE is not lost"): ("kick.before-enable", "ring.state.kick-then-enable"),
    ("RING-3", "ENABLE with 0, 1 and 2; a second ring without MQ"):
        ("ring.state.enable-disable", "reply-ack.enable-2", "features.second-ring-without-mq"),
    ("RING-4", "the base, twice, of a ring that never started; silence afterwards; going on"):
        ("base.count", "base.twice", "base.untouched", "base.silent-after-stop", "log.after-stop", "base.goes-on"),
    ("RING-5", "the used index is read anew; a base need not be given"): ("setup.reset-by-driver", "setup.nakce"),
    ("RING-6", "indexes wrap"): ("base.wrap", "inflight.wrap"),
    ("RING-7", "chains that turn in a circle, are too large, are offered twice; tables that were not negotiated"):
        ("hostile.loop", "hostile.loop-of-one", "hostile.buffer-huge", "hostile.indirect-huge", "hostile.head-twice",
         "hostile.indirect-unnegotiated"),
    ("RING-8", "a call after a restart; no call is lost"): ("call.at-start", "split.event-idx-stress"),
    ("FD-1", "descriptors that are replaced are closed and not looked at any more; nothing leaks"):
        ("kick.replaced", "kick.replaced-leak", "kick.no-spin", "framing.no-leak"),
    ("FD-2", "too many and too few descriptors, bodies cut off"):
        ("memory.refused.too-few-descriptors", "memory.refused.too-many-descriptors", "framing.descriptors-many",
         "framing.descriptors-253", "message.no-descriptor", "message.short"),
    ("MEM-1", "memory changes under load; many slots; removals with a descriptor, and of a ring's region"):
        ("memory.under-load", "slots.under-load", "slots.many", "slots.removed-descriptor", "slots.removed-ring"),
    ("MEM-2", "offsets, odd ones too; huge pages"): ("memory.offset", "memory.odd-offset", "memory.hugetlb"),
    ("LOG-1", "the reply to SET_LOG_BASE, its offset, what is marked, and until when"):
        ("log.reply-bytes", "log.offset", "log.written-only", "log.used", "log.stops", "log.again"),
    ("ACK-1", "every message is acknowledged if it asks, also when it fails"):
        ("message.acknowledged", "reply-ack.no-queue-num", "reply-ack.refusal-keeps-connection"),
    ("ACK-2", "a front-end that does not answer the back-end's requests holds nothing up"): ("channel.full",),
    ("CFG-1", "parts of configuration space, errors, writes"):
        ("config.part", "config.byte", "config.beyond-is-error", "config.write-beyond", "config.read-only"),
    ("INF-1", "a fresh buffer, a killed process, a guest that boots again, the order of what is done again"):
        ("inflight.fresh-buffer-old-ring", "inflight.killed", "inflight.reboot", "inflight.order"),
    ("STATE-1", "device state: when, checked, twice"): ("state.running", "state.save", "state.cut-off", "state.twice"),
    ("PC-1", "ADVISE is answered without payload and with one descriptor"):
        ("postcopy.advise", "postcopy.advise-userfaultfd"),
    ("PC-2", "LISTEN comes before regions"): ("postcopy.listen", "postcopy.listen-mapped"),
    ("PC-3", "tables and slots are answered with bases, in their order; nothing is touched before they are known"):
        ("postcopy.table", "postcopy.table-order", "postcopy.slots", "postcopy.no-touch"),
    ("PC-4", "the socket is answered while a page is waited for"): ("postcopy.control",),
    ("PC-5", "END, and a front-end that is lost"): ("postcopy.end", "postcopy.loss", "postcopy.loss-then-next"),
    ("PC-6", "huge pages, and no more pages than are needed"): ("postcopy.hugetlb", "postcopy.no-more-than-needed"),
}

HOSTILE: dict[str, tuple[str, ...]] = {
    "version, reply flag and reserved flags of a request":
        ("framing.version-0", "framing.version-2", "framing.reply-flag-on-request", "framing.reserved-flags"),
    "the end, and half a header": ("framing.end-at-once", "framing.end-in-header"),
    "a payload larger than any buffer": ("framing.size-huge", "framing.size-over"),
    "a payload of another size than the message has": ("message.short", "message.long"),
    "a payload in pieces, or half of one": ("framing.payload-apart", "framing.byte-by-byte", "framing.end-in-payload"),
    "too many descriptors": ("framing.descriptors-many",),
    "more descriptors than the back-end makes room for (MSG_CTRUNC)": ("framing.descriptors-253",),
    "descriptors of messages that have none": ("message.extra-descriptor", "framing.descriptor-of-unknown"),
    "rings that do not exist": tuple(
        f"reply-ack.no-queue-{what}"
        for what in ("num", "base", "enable", "kick", "call", "err", "addr", "wide", "get-base")
    ),
    "sizes that no ring has": ("reply-ack.size-0", "reply-ack.size-3", "reply-ack.size-64k", "reply-ack.size-4g"),
    "a ring that goes on behind its region":
        ("address.desc-over-the-end", "address.avail-over-the-end", "address.used-over-the-end", "address.outside"),
    "a ring at odd addresses": ("address.misaligned",),
    "regions and descriptors of another number":
        ("memory.refused.too-few-descriptors", "memory.refused.too-many-descriptors", "memory.refused.nine",
         "memory.lying-count"),
    "offset and size that wrap":
        ("memory.refused.offset-wraps", "memory.refused.guest-wraps", "memory.refused.user-wraps"),
    "regions that overlap": ("memory.refused.guest-overlap", "memory.refused.user-overlap", "slots.added-overlap"),
    "a file smaller than its region":
        ("memory.refused.beyond-file", "slots.added-beyond-file", "memory.file-shrinks-ring",
         "memory.file-shrinks-data"),
    "a log smaller than memory": ("log.too-small", "log.beyond-file", "log.shrinks"),
    "a log that cannot be mapped": ("log.unmappable",),
    "an in-flight buffer too small for its queues":
        ("inflight.set-too-small", "inflight.set-many-queues", "inflight.set-wraps", "inflight.get-many-queues"),
    "nonsense in an in-flight buffer": ("inflight.nonsense", "inflight.other-size"),
    "features that were never offered": ("features.unoffered", "features.protocol-unoffered"),
    "an error that asks for an answer": ("framing.unknown", "reply-ack.no-queue-num", "message.no-descriptor"),
    "an available index out of reach": ("hostile.index-ahead", "hostile.index-back"),
    "a head outside of the table": ("hostile.head-outside", "hostile.head-far-outside"),
    "a link out of the table": ("hostile.next-outside", "hostile.indirect-link-outside"),
    "a chain that turns in a circle": ("hostile.loop", "hostile.loop-of-one", "hostile.indirect-loop"),
    "tables in tables, with links, of odd sizes":
        ("hostile.indirect-nested", "hostile.indirect-and-next", "hostile.indirect-odd", "hostile.indirect-empty"),
    "descriptors that change while they are read": ("hostile.changes",),
    "buffers across regions": ("split.across-regions",),
    "buffers of no bytes": ("split.empty-buffer", "hostile.nothing"),
    "used lengths and status bytes": ("split.used-length", "blk.write-length", "hostile.status-outside"),
    "addresses that wrap": ("hostile.buffer-wraps", "blk.read-wraps"),
    "headers in pieces, or too short": ("split.cut-header", "hostile.header-short", "hostile.header-missing"),
}
# fmt: on


def test_nothing_is_missing() -> None:
    assert len(REPORTED) == 28


@pytest.mark.parametrize("names", [*REPORTED.values(), *HOSTILE.values()], ids=[*map(" ".join, REPORTED), *HOSTILE])
def test_it_is_tried(names: tuple[str, ...]) -> None:
    assert [name for name in names if not select(CASES, [name], [])] == []
