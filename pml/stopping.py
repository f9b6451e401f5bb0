"""Stopping from outside: the first signal ends a fit at its next step's end, the second one at once.

Outside a fit the first signal ends at once too: there is nothing to save. Whoever is in the middle of writing a file
leaves it whole or not there (`pml.atomic`).
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
"""Within this time SIGTERM that comes twice is one."""

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Stopped(BaseException):
    """Someone stopped the process; not an error, and not to be caught by what catches errors.

    Attributes:
        signum: The signal.
        at_once: Whether it ended where it was, rather than at a step's end where everything can be saved.
    """

    def __init__(self, signum: int, at_once: bool) -> None:
        super().__init__(signum, at_once)
        self.signum = signum
        self.at_once = at_once
        self.advice = ""
        """How to go on, for whoever says that it stopped."""

    @property
    def code(self) -> int:
        """Exit code, as shells have it: 130 for Ctrl-C, 143 for SIGTERM."""
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
    """The signal by which a stop at the next step's end was asked for; None where nobody has."""
    return _State.first


def request(signum: int, frame: FrameType | None = None) -> None:
    """Ask for a stop, as a signal does.

    Raises:
        Stopped: Unless a fit will see to it at its next step's end, and this is the first time.
    """
    now = time.monotonic()
    if signum == signal.SIGTERM == _State.first and now - _State.at < ONE_SIGNAL_SECONDS:
        # A launcher passes on what the whole process group has got already.
        return
    _State.at = now
    _State.times += 1
    if _State.times > 2:
        # Whatever was to clean up hangs.
        os._exit(128 + signum)
    if _State.waits_for_step and _State.times == 1:
        _State.first = signum
        print("stopping when this step is done; once more to stop at once", file=sys.stderr, flush=True)
        return
    stop = Stopped(signum, at_once=True)
    if _is_importing(frame):
        # Libraries that are loading may not survive an exception. There is nothing to save or to clean up yet.
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
    """Have signals end the process by `Stopped`, within it; outside the main thread nothing changes.

    Args:
        who: The command, as it says what it says.
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
    """Whether signals are ours."""
    return signal.getsignal(signal.SIGTERM) is request


@contextmanager
def at_step_ends() -> Iterator[None]:
    """Within it, a fit looks at `requested` at the end of each step, so a signal may wait for that."""
    _State.waits_for_step = True
    try:
        yield
    finally:
        _State.waits_for_step = False
