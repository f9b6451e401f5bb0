"""Who runs which cell of a grid: claims as files in a shared folder, for workers on any number of machines."""

import contextlib
import os
import socket
import sys
from pathlib import Path

import psutil
from filelock import LeaseCompromise, SoftFileLease, Timeout

__all__ = ["FOLDER_NAME", "Claims"]

FOLDER_NAME = ".claims"

LEASE_SECONDS = 120.0
"""Longest time that a worker may be out of touch. A step takes less, and so does a file server that is restarted."""


class Claims:
    """Claims in a folder, one file each, which says host and process and is renewed by a heartbeat.

    A claim whose process is gone is free at once on the same host, and after `LEASE_SECONDS` without a heartbeat on
    others; clocks need not agree (see `filelock.SoftFileLease`). A worker that has lost a claim ends on the spot, since
    whoever has it now writes to the same places.

    Args:
        folder: Where the files are; made when first needed. It has to be the same folder for all workers.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._leases: dict[str, SoftFileLease] = {}

    def take(self, name: str) -> bool:
        """Whether the claim on `name` is this worker's now; False while another has it.

        Asking again is what lets a claim run out: a heartbeat that has stopped is told by watching it.
        """
        if name not in self._leases:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._leases[name] = SoftFileLease(
                self._path(name), lease_duration=LEASE_SECONDS, on_compromise=lambda loss: _end(name, loss)
            )
        try:
            self._leases[name].acquire(blocking=False)
        except Timeout:
            return False
        return True

    def release(self, name: str) -> None:
        """Give a claim back."""
        self._leases.pop(name).release()

    def holder(self, name: str) -> str | None:
        """Who has a claim, as `host, process 123`; None where nobody has, or whoever had is known to be gone."""
        try:
            lines = self._path(name).read_text(encoding="utf-8").splitlines()
        except (FileNotFoundError, UnicodeDecodeError):
            return None
        fields = dict(line.split("=", 1) for line in lines if "=" in line)
        host, process = fields.get("host"), fields.get("pid")
        return None if host is None or process is None or _gone(host, process) else f"{host}, process {process}"

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.lock"


def _gone(host: str, process: str) -> bool:
    """Whether a process has ended; False for one of another host, of which nobody here can know."""
    # A number that is not whole yet belongs to a claim that is just being written.
    return host == socket.gethostname() and process.isdecimal() and not psutil.pid_exists(int(process))


def _end(name: str, loss: LeaseCompromise) -> None:
    with contextlib.suppress(OSError):
        print(
            f"{name}: this worker has lost its claim ({loss.reason}), so another may be running it; stopping at once "
            "to leave that one's files alone",
            file=sys.stderr,
            flush=True,
        )
    os._exit(1)
