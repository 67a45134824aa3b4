"""Threads that may wait for guest memory take no signals, from the first instruction on."""

import signal
import threading

import pytest

from vhostuser.threads import spawn


def test_no_signal_reaches_a_thread_at_any_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask is looked at in the first Python code that a thread runs, long before its body."""
    masks: list[set[signal.Signals]] = []
    bootstrap = threading.Thread._bootstrap

    def first(thread: threading.Thread) -> None:
        masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        bootstrap(thread)

    monkeypatch.setattr(threading.Thread, "_bootstrap", first)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    thread = spawn(lambda: None, "deaf")
    thread.join()
    assert thread.daemon
    assert signal.valid_signals() - masks[0] - {signal.SIGKILL, signal.SIGSTOP} == {signal.SIGBUS, signal.SIGSEGV}
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_a_thread_that_cannot_be_started_leaves_the_caller_its_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(_: object, __: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading, "_start_new_thread", none_left)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with pytest.raises(RuntimeError):
        spawn(lambda: None, "none")
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
