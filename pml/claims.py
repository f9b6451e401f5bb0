"""Claims on the cells of a grid, as files in a shared folder, for workers on any number of machines."""

import contextlib
import os
import socket
import sys
import time
from pathlib import Path

import psutil
from filelock import LeaseCompromise, SoftFileLease, Timeout

__all__ = ["FOLDER_NAME", "Claims"]

FOLDER_NAME = ".claims"

LEASE_SECONDS = 120.0
"""Seconds without a heartbeat after which a claim expires. A step or the restart of a file server takes less."""


class Claims:
    """Claims in a folder: one file each, which names host and process and is renewed by a heartbeat.

    If the process of a claim dies, workers on the same host can take the claim at once, others after `LEASE_SECONDS`
    without a heartbeat; clocks need not agree (see `filelock.SoftFileLease`). On NFS and SMB all of them wait for
    that time. A worker that loses a claim exits at once, since the new holder writes to the same files.

    Args:
        folder: Folder of the claim files, the same for all workers; made when first needed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._leases: dict[str, SoftFileLease] = {}
        self._seen: dict[str, tuple[_Marker, float]] = {}
        """Claim files of others as last seen, and since when they have not changed, in seconds of this process."""

    def take(self, name: str) -> bool:
        """Try to claim `name` without waiting; return False while another worker holds it.

        Call this repeatedly: a claim expires only for a worker that has watched its heartbeat stop.
        """
        if name not in self._leases:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._leases[name] = SoftFileLease(
                self.path(name), lease_duration=LEASE_SECONDS, on_compromise=lambda loss: _end(name, loss)
            )
        try:
            self._leases[name].acquire(blocking=False)
        except Timeout:
            self._remove_if_expired(name)
            return False
        self._seen.pop(name, None)
        return True

    def release(self, name: str) -> None:
        """Release a claim that this worker holds."""
        self._leases.pop(name).release()

    def holder(self, name: str) -> str | None:
        """Holder of a claim, as `host, process 123`; None if there is none or its process is known to have ended."""
        try:
            lines = self.path(name).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            return None
        fields = dict(line.split("=", 1) for line in lines if "=" in line)
        host, process = fields.get("host"), fields.get("pid")
        return None if host is None or process is None or _gone(host, process) else f"{host}, process {process}"

    def path(self, name: str) -> Path:
        """The claim file, which exists while the claim is held."""
        return self.folder / f"{name}.lock"

    def _remove_if_expired(self, name: str) -> None:
        """Remove the claim of another worker if this one has seen no heartbeat for `LEASE_SECONDS`.

        `filelock` has tried to take it over first, by exchanging the names of two files, which NFS and SMB refuse.
        """
        path = self.path(name)
        aside = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
        # The holder may release its claim, or another worker remove it, at any time.
        with contextlib.suppress(OSError):
            # Read the clock first: the file server may be away for longer, and no heartbeat arrives then.
            now, marker = time.monotonic(), _marker(path)
            seen, since = self._seen.get(name, (None, now))
            if marker != seen:
                self._seen[name] = marker, now
            elif now - since >= LEASE_SECONDS:
                try:
                    path.rename(aside)
                    if _marker(aside) != marker:
                        # Another worker has removed and taken the claim since. A link never replaces a third one's.
                        os.link(aside, path)
                finally:
                    # A holder whose claim could not be put back finds that it is gone, and exits.
                    aside.unlink(missing_ok=True)


_Marker = tuple[bytes, int, int]


def _marker(path: Path) -> _Marker:
    """Content of a claim file, time of its last heartbeat and inode. NFS asks its server when a file is opened."""
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        return file.read(), status.st_mtime_ns, status.st_ino


def _gone(host: str, process: str) -> bool:
    """Whether a process is known to have ended; always False for another host, whose processes cannot be seen here."""
    # A process id that is not a number comes from a claim file that is still being written.
    return host == socket.gethostname() and process.isdecimal() and not psutil.pid_exists(int(process))


def _end(name: str, loss: LeaseCompromise) -> None:
    with contextlib.suppress(OSError):
        print(
            f"{name}: this worker has lost its claim ({loss.reason}), so another may be running it; stopping at once "
            "to leave the other worker's files alone",
            file=sys.stderr,
            flush=True,
        )
    os._exit(1)
