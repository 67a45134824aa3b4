"""Threads that may wait for guest memory: how such a thread is started.

What belongs here: the two properties that it must have from its first instruction on. What does not: what it runs
(``dataplane``, ``uffd``).

It is a daemon thread and never an executor's: one that waits for a missing page would hold up the exit of the process.
All signals but SIGBUS and SIGSEGV are blocked in it: a thread that a handled signal hits in a fault of the kernel's own
code returns to that fault at once, and so spins until the page is there.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable

_FATAL = {signal.SIGBUS, signal.SIGSEGV}


def spawn(body: Callable[[], object], name: str) -> threading.Thread:
    """Starts ``body`` on a daemon thread that takes no signals. Raises RuntimeError when the system has no thread left.

    A new thread inherits the mask of the one that makes it, so there is no moment at which it takes any.
    """
    thread = threading.Thread(target=body, name=name, daemon=True)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - _FATAL)
    try:
        thread.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return thread
