"""Memory of this machine that a process may still take, which containers and batch systems limit."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

__all__ = ["available_bytes"]


def available_bytes(limits: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes available to this process: those of the machine, or those left to a control group if they are fewer.

    Args:
        limits: Folder where the control groups are mounted.
        membership: File that lists the groups of this process.
    """
    return max(0, min([psutil.virtual_memory().available, *_left_to_groups(limits, membership)]))


def _left_to_groups(limits: Path, membership: Path) -> Iterator[int]:
    """Limit minus use, in bytes, of each group with a limit that this process is in, directly or nested."""
    try:
        entries = membership.read_text().splitlines()
    except OSError:  # not Linux
        return
    for entry in entries:
        _, controllers, path = entry.split(":", 2)
        if not controllers:
            top, limit, use, cached = limits, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, cached = limits / "memory", "total_inactive_file"
            limit, use = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            # Some groups have no limit. A container sees its own group as the topmost, whatever its path is outside.
            with suppress(OSError, ValueError):
                # File contents that were not used lately are counted as in use, but make room when it is needed.
                kept = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines()).get(cached, 0)
                yield int((folder / limit).read_text()) - int((folder / use).read_text()) + int(kept)
            if folder == top:
                break
