"""Stopping by signal: the first one ends a fit after its current step, the second one at once.

Outside a fit there is nothing to save, so the first signal ends the process at once. A file that is being written is
then either whole or absent (`pml.atomic`).
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Stopped", "at_step_ends", "is_listening", "listening", "requested"]

SIGNALS = (signal.SIGINT, signal.SIGTERM)

ONE_SIGNAL_SECONDS = 1.0
"""Two SIGTERMs within this time count as one."""

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


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
        """Exit code by the convention of shells: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.signum

    def __str__(self) -> str:
        by = NAMES.get(signal.Signals(self.signum), str(self.signum))
        return f"stopped by {by}" + (f"; {self.advice}" if self.advice else "")


class _State:
    waits_for_step = False
    first: int | None = None
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
    if signum == signal.SIGTERM == _State.first and now - _State.at < ONE_SIGNAL_SECONDS:
        # A launcher passes on a signal that the whole process group has already received.
        return
    _State.at = now
    _State.times += 1
    if _State.times > 2:
        # The clean-up after the second request hangs.
        os._exit(128 + signum)
    if _State.waits_for_step and _State.times == 1:
        _State.first = signum
        print("stopping after this step; repeat to stop at once", file=sys.stderr, flush=True)
        return
    stop = Stopped(signum, at_once=True)
    if _is_importing(frame):
        # An exception may break a library that is being imported, and there is nothing to save or clean up yet.
        print(f"{_State.who}: {stop}", file=sys.stderr, flush=True)
        os._exit(stop.code)
    raise stop


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


@contextmanager
def listening(who: str = "pml") -> Iterator[None]:
    """Handle SIGINT and SIGTERM with `request` inside the context; has no effect outside the main thread.

    Args:
        who: Name of the command, which begins its messages.
    """
    _State.who = who
    _State.first, _State.times, _State.waits_for_step = None, 0, False
    before = {}
    try:
        for signum in SIGNALS:
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
