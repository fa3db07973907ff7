"""Threads that are used again."""

from __future__ import annotations

import contextvars
import os
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from refresher import _threads
from refresher._threads import in_thread


@pytest.fixture(autouse=True)
def new_crews(monkeypatch):
    """No test has another's threads."""
    monkeypatch.setattr(_threads, "_CREWS", {daemon: _threads._Crew(daemon) for daemon in (False, True)})


def where(daemon=False):
    """Tell in which thread something was done."""
    found, done = [], threading.Event()

    def work():
        found.append(threading.current_thread())
        done.set()

    in_thread(work, daemon=daemon)
    assert done.wait(5)
    return found[0]


def idle(daemon):
    return _threads._CREWS[daemon]._idle


def until(condition):
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("daemon", [False, True])
def test_used_again(daemon, monkeypatch):
    """A thread that has nothing to do does the next work, and ends after a while."""
    monkeypatch.setitem(_threads._IDLE, daemon, 0.3)
    first = where(daemon)
    until(lambda: idle(daemon))
    assert where(daemon) is first
    assert (first.name, first.daemon) == ("refresher", daemon)
    first.join(5)
    assert not first.is_alive()
    assert idle(daemon) == []
    assert where(daemon) is not first


def test_at_the_same_time():
    """Nothing waits for a thread that is busy."""
    go = threading.Event()
    for _ in range(3):
        in_thread(go.wait, daemon=True)
    assert where(daemon=True).is_alive()
    go.set()


def test_work_that_comes_late(monkeypatch):
    """A thread that was taken waits a moment longer for its work, and not for ever."""
    monkeypatch.setitem(_threads._IDLE, True, 0.05)
    monkeypatch.setattr(_threads, "_PROMISED", 0.3)
    done = threading.Event()
    for put in (True, False):
        thread = where(daemon=True)
        until(lambda: idle(True))
        queue = idle(True).pop()
        if put:
            time.sleep(0.1)
            queue.put(done.set)
            assert done.wait(5)
        thread.join(5)
        assert not thread.is_alive()


def test_context():
    """Each work sees the context variables of who had it done."""
    variable, seen = contextvars.ContextVar("variable", default=0), []
    for number in (1, 2):
        variable.set(number)
        done = threading.Event()
        in_thread(lambda done=done: (seen.append(variable.get()), done.set()), daemon=True)
        assert done.wait(5)
        until(lambda: idle(True))
    assert seen == [1, 2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("daemon", [False, True])
def test_end_of_a_process(daemon):
    """A process that ends waits for what is done, but not for a daemon, and only briefly for a thread that is idle."""
    program = f"""
        import os, time
        from refresher._threads import in_thread
        in_thread(lambda: None, daemon={daemon})
        time.sleep(0.1)
        if os.fork() == 0:  # which has no idle thread
            in_thread(lambda: (time.sleep(0.5), print("done", flush=True)), daemon={daemon})
        else:
            os.wait()
    """
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}  # that this process has threads, and forks
    command = [sys.executable, "-c", textwrap.dedent(program)]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=20).stdout
    assert out == ("" if daemon else "done\n")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_idle_threads_stay_behind():
    """A forked child gives no work to threads of its parent, which it does not have."""
    program = """
        import os, threading
        from refresher._threads import _CREWS, in_thread
        in_thread(lambda: None, daemon=True)
        while not _CREWS[True]._idle:
            pass
        if os.fork() == 0:
            done = threading.Event()
            in_thread(done.set, daemon=True)
            print(done.wait(5), flush=True)
        else:
            os.wait()
    """
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    assert (
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=20).stdout
        == "True\n"
    )
