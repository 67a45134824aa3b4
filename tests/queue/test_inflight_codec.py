"""The codec of the in-flight region against the C code's own: what C writes breaks no rule and is read alike, what C
refuses breaks one, and what breaks none C follows.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.queue.guest import Guest, Ring
from tests.queue.packed import PackedDriver, PackedRing
from vhostuser._native import lib
from vhostuser.protocol import DescStatePacked, DescStateSplit, QueueBroken, QueueRegionPacked, QueueRegionSplit
from vhostuser.protocol import Inflight as Described
from vhostuser.virtqueue import DeviceQueue, InflightRegion

SIZE = 4
USED_INDEX = 0xFFFE
RIGHT = st.integers(0, SIZE)
ANY = RIGHT | st.sampled_from([SIZE, SIZE + 1, 0xFFFF])


class Scene:
    """A ring and its region in one of the formats, and the driver that offers chains of 1 to 2 descriptors."""

    def __init__(self, *, packed: bool) -> None:
        self.packed = packed
        self.kind: Any = QueueRegionPacked if packed else QueueRegionSplit
        self.guest = Guest((0, 1 << 16))
        self.fd, size = InflightRegion.create(1, SIZE, packed=packed)
        self.native = InflightRegion.map(self.fd, Described(size, 0, 1, SIZE), packed=packed)
        self.each = size
        self.split, self.ring = Ring(self.guest, SIZE), PackedRing(self.guest, SIZE)
        self.driver = PackedDriver(self.ring)
        self.room = list(range(SIZE))
        for head in range(SIZE):
            self.split.describe(head, 0x8000 + head, 1, 2)

    @property
    def region(self) -> Any:
        return self.kind.parse(os.pread(self.fd, self.each, 0))

    @region.setter
    def region(self, region: Any) -> None:
        os.pwrite(self.fd, region.pack(), 0)

    @property
    def evidence(self) -> int:
        """What the ring says of the batch that was returned last."""
        if not self.packed:
            return self.split.used_index
        return int(self.ring.row(self.region.old_used_idx)[3])

    def named(self, heads: Iterable[int]) -> list[int]:
        """Entries of the region, as the driver names their chains."""
        return [self.region.id_of(head) if self.packed else head for head in heads]

    def open(self) -> DeviceQueue:
        """From the used index on, which is all that a front-end knows of a split ring whose back-end has died."""
        if self.packed:
            return self.ring.open(inflight=self.native)
        return self.split.open(inflight=self.native, base=self.split.used_index)

    def offer(self, length: int) -> None:
        if self.packed:
            if SIZE - self.driver.held >= length:
                self.driver.offer([(0x8000, 16)] * (length - 1), [(0x9000, 16)])
        elif self.room:
            self.split.offer(self.split.available, [self.room.pop(0)])

    def take_back(self, heads: list[int]) -> None:
        self.room += heads
        if self.packed:
            self.driver.take()

    def close(self) -> None:
        os.close(self.fd)
        self.guest.close()


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_what_c_writes_is_right_and_read_alike(data: st.DataObject) -> None:
    """Random lives with crashes: at every step no rule is broken, and a successor executes what the codec says."""
    scene = Scene(packed=data.draw(st.booleans(), "packed"))
    queue, out = scene.open(), []
    for _ in range(data.draw(st.integers(1, 15), "steps")):
        step = data.draw(st.sampled_from(["offer", "pop", "push", "crash"]), "step")
        if step == "offer":
            scene.offer(data.draw(st.integers(1, 2), "length"))
        elif step == "pop":
            out += queue.pop(2)
        elif step == "push":
            done = [out.pop(data.draw(st.integers(0, len(out) - 1))) for _ in range(min(2, len(out)))]
            for request in done:
                request.complete()
            queue.flush()
            scene.take_back([request._chain.head for request in done])
        else:
            queue.close()
            expected = scene.named(scene.region.recovered(scene.evidence))
            queue = scene.open()
            out = queue.pop(len(expected)) if expected else []
            assert [request._chain.head for request in out] == expected
        assert list(scene.region.violations(SIZE if scene.region.version else None, scene.evidence)) == []
        assert scene.region.recovered(scene.evidence) == scene.region.heads
    queue.close()
    scene.close()


SPLIT_STATES = st.builds(DescStateSplit, st.integers(0, 1), ANY, st.integers(0, 9))
SPLITS = st.builds(
    QueueRegionSplit,
    st.just(0),
    st.sampled_from([1, 1, 1, 0, 2]),
    st.sampled_from([SIZE, SIZE, SIZE, 2, 8]),
    ANY,
    st.integers(USED_INDEX - SIZE - 1, USED_INDEX + 1),
    st.lists(SPLIT_STATES, min_size=SIZE, max_size=SIZE).map(tuple),
)


@settings(max_examples=400, deadline=None)
@given(region=SPLITS)
def test_what_c_makes_of_any_split_region(region: QueueRegionSplit) -> None:
    scene = Scene(packed=False)
    scene.split.used_index = scene.split.available = USED_INDEX
    scene.region = region
    _judge(scene, region, USED_INDEX)


@st.composite
def packeds(draw: st.DrawFn) -> QueueRegionPacked:
    """One that is right, of chains of one or two entries, with up to three fields changed to anything."""
    order = draw(st.permutations(range(SIZE)))
    states, at, counter = [DescStatePacked()] * SIZE, 0, 0
    following = [*order[1:], SIZE]
    for place, entry in enumerate(order):
        states[entry] = DescStatePacked(next=following[place], id=entry, len=16, addr=0x8000, flags=2)
    while at < SIZE and draw(st.booleans()):
        chain = order[at : at + draw(st.integers(1, 2))]
        states[chain[0]] = states[chain[0]]._replace(inflight=1, num=len(chain), last=chain[-1], counter=counter)
        at, counter = at + len(chain), counter + 1
    head = order[at] if at < SIZE else SIZE
    used, wrap = draw(st.integers(0, SIZE - 1)), draw(st.integers(0, 1))
    header = {"free_head": head, "old_free_head": head, "used_idx": used, "old_used_idx": used}
    header |= {"used_wrap_counter": wrap, "old_used_wrap_counter": wrap, "version": 1, "desc_num": SIZE, "features": 0}
    for _ in range(draw(st.integers(0, 3))):
        if draw(st.booleans()):
            header[draw(st.sampled_from(sorted(header)[1:]))] = draw(ANY) & 0xFF
        else:
            entry, field = draw(st.integers(0, SIZE - 1)), draw(st.sampled_from(["inflight", "next", "last", "num"]))
            states[entry] = states[entry]._replace(**{field: draw(ANY) & 0xFF})
    return QueueRegionPacked(**header, states=tuple(states))


@settings(max_examples=400, deadline=None)
@given(region=packeds(), flags=st.sampled_from([0, 1 << 7, 1 << 15, 1 << 7 | 1 << 15]))
def test_what_c_makes_of_any_packed_region(region: QueueRegionPacked, flags: int) -> None:
    scene = Scene(packed=True)
    for place in range(SIZE):
        scene.ring.describe(place, (0x8000, 16, place, flags))
    scene.region = region
    _judge(scene, region, flags)


def _judge(scene: Scene, region: Any, evidence: int) -> None:
    wrong = list(region.violations(SIZE, evidence))
    expected = scene.named(region.recovered(evidence)) if not wrong else []
    queue = scene.open()
    try:
        taken = [request._chain.head for request in queue.pop(len(expected))] if expected else []
        queue.arm()
    except QueueBroken as broken:
        assert wrong or broken.code != lib.VU_E_INFLIGHT, "no rule is broken, and C refuses it"
    else:
        assert wrong or taken == expected
        assert wrong or not region.version or not list(scene.region.violations(SIZE, scene.evidence))
    queue.close()
    scene.close()
