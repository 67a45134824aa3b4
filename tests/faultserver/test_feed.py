"""What several threads of one source share: the tokens that tell that there is something to do."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from vhostuser.faultserver import feed as module
from vhostuser.faultserver.feed import Background, NativeFeed
from vhostuser.faultserver.sources import Ask

LIMIT = 10.0


class Steps(NativeFeed):
    """A feed in which nobody finds anything; the thread named "late" stands before its poll until it may go on."""

    def __init__(self) -> None:
        super().__init__(Background(), may_poison=False)
        self.late_looks = threading.Event()
        self.late_may_poll = threading.Event()

    def _look(self, background: bool, most: int) -> Ask | None:
        if threading.current_thread().name == "late":
            self.late_looks.set()
            assert self.late_may_poll.wait(LIMIT)
        return None


def test_the_end_reaches_a_thread_that_polls_after_another_has_consumed_its_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The order that hung: one is woken by something else, the end comes, it takes both, the other begins to poll."""
    consuming, may_consume, consume = threading.Event(), threading.Event(), module._consume

    def slowly(fd: int) -> None:
        consuming.set()
        assert may_consume.wait(LIMIT)
        consume(fd)

    monkeypatch.setattr(module, "_consume", slowly)
    feed = Steps()
    threads = [start(name, feed.next) for name in ("late", "quick")]
    assert feed.late_looks.wait(LIMIT)
    feed.look_again()
    assert consuming.wait(LIMIT)
    feed.end()
    may_consume.set()
    threads[1].join(LIMIT)
    feed.late_may_poll.set()
    threads[0].join(LIMIT)
    assert not any(thread.is_alive() for thread in threads)
    feed.close()


def start(name: str, body: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=body, name=name, daemon=True)
    thread.start()
    return thread
