"""Stopping by signal: the first one ends a fit after its current step, the second one at once.

Outside a fit there is nothing to save, so the first signal ends the process at once. A file that is being written is
then either whole or absent (`pml.atomic`).
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

__all__ = ["Stopped", "at_step_ends", "is_listening", "listening", "requested"]

SIGNALS: tuple[signal.Signals, ...] = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
"""The signals that stop a command; Windows has no SIGHUP, which says that the terminal was closed."""

ONE_SIGNAL_SECONDS = 1.0
"""The same signal twice within this time counts once, unless it is Ctrl-C."""


class Stopped(BaseException):
    """Raised when a signal stops the process. It is not an error, so `except Exception` does not catch it.

    Attributes:
        signum: Number of the signal.
        at_once: Whether the process stops immediately, rather than after a step, where everything can be saved.
    """

    def __init__(self, signum: int, at_once: bool) -> None:
        super().__init__(signum, at_once)
        self.signum = signum
        self.at_once = at_once
        self.advice = ""
        """How to resume, for the message that says that it stopped."""

    @property
    def code(self) -> int:
        """Exit code by the convention of shells: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP."""
        return 128 + self.signum

    def __str__(self) -> str:
        by = "Ctrl-C" if self.signum == signal.SIGINT else signal.Signals(self.signum).name
        return f"stopped by {by}" + (f"; {self.advice}" if self.advice else "")


class _State:
    waits_for_step = False
    first: int | None = None
    last: int | None = None
    times = 0
    at = 0.0
    who = "pml"


def requested() -> int | None:
    """The signal that asked for a stop after the current step; None if there was none."""
    return _State.first


def request(signum: int, frame: FrameType | None = None) -> None:
    """Ask for a stop; this is the signal handler.

    Raises:
        Stopped: Unless this is the first request and a fit will stop after its current step.
    """
    now = time.monotonic()
    if signum == _State.last != signal.SIGINT and now - _State.at < ONE_SIGNAL_SECONDS:
        # A launcher or a shell passes on a signal that the whole process group has already received.
        return
    _State.last, _State.at = signum, now
    _State.times += 1
    if _State.times > 2:
        # The clean-up after the second request hangs.
        os._exit(128 + signum)
    if _State.waits_for_step and _State.times == 1:
        _State.first = signum
        _say("stopping after this step; repeat to stop at once")
        return
    stop = Stopped(signum, at_once=True)
    if _is_importing(frame):
        # An exception may break a library that is being imported, and there is nothing to save or clean up yet.
        _say(f"{_State.who}: {stop}")
        os._exit(stop.code)
    raise stop


def _say(words: str) -> None:
    # The terminal may be gone.
    with suppress(OSError):
        print(words, file=sys.stderr, flush=True)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


@contextmanager
def listening(who: str = "pml") -> Iterator[None]:
    """Handle `SIGNALS` with `request` inside the context; has no effect outside the main thread.

    SIGHUP stays ignored if it is, as under `nohup`.

    Args:
        who: Name of the command, which begins its messages.
    """
    _State.who = who
    _State.first, _State.last, _State.times, _State.waits_for_step = None, None, 0, False
    before = {}
    try:
        for signum in SIGNALS:
            if signum in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(signum) != signal.SIG_IGN:
                before[signum] = signal.signal(signum, request)
    except ValueError:  # another thread
        before = {}
    try:
        yield
    finally:
        _State.first, _State.times = None, 0
        for signum, handler in before.items():
            signal.signal(signum, handler)


def is_listening() -> bool:
    """Whether `request` handles signals."""
    return signal.getsignal(signal.SIGTERM) is request


@contextmanager
def at_step_ends() -> Iterator[None]:
    """Let the first signal wait for the end of a step, where the fit inside the context checks `requested`."""
    _State.waits_for_step = True
    try:
        yield
    finally:
        _State.waits_for_step = False
