"""Storage of the frozen-layer cache: on the device, on the host or in a memory-mapped file, wherever there is room."""

import logging
import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import torch
from torch import Tensor

from pml.errors import InputError
from pml.host_memory import available_bytes

__all__ = ["CacheConfig", "StateStore"]

log = logging.getLogger(__name__)

Place = Literal["device", "host", "disk"]

DEVICE_SHARE = 0.25
"""Share of the device's free memory when the store is made; the rest is for the blocks above and activations."""

HOST_SHARE = 0.5
"""Share of the host's available memory when the store is made."""

SEGMENT_BYTES = 64 * 2**20
"""Bytes by which the file grows at a time: few mappings, little waste."""


@dataclass(frozen=True)
class CacheConfig:
    """The frozen-layer cache: whether to use it, and where to keep its states.

    Args:
        enabled: Run the layers below the adapter once per example and keep their states; false runs all at every step.
        place: `device`, `host` or `disk` (a memory-mapped file in the run's folder); `auto` puts each example in the
            first of these that has room.
        budget_gib: Room in GiB; with `auto`, on the device and on the host each. Processes that train together on one
            machine share host and disk equally. Without a budget, `auto` takes a quarter of the device's free memory
            and half of the host's. With a fixed place, examples beyond the budget are computed at every step.
        release: Keep the blocks below the adapter on the host, move them to the device one at a time to compute the
            kept states, and free them before the first step. Training and teacher-forced measures then need only the
            embeddings, the blocks above and one block below on the device. Generation loads all blocks again from the
            backbone's files. If some example finds no room, all blocks stay.
    """

    enabled: bool = True
    place: Literal["auto", "device", "host", "disk"] = "auto"
    budget_gib: float | None = None
    release: bool = False

    def __post_init__(self) -> None:
        if self.place not in ("auto", "device", "host", "disk"):
            raise InputError(f"frozen_prefix.place is {self.place!r}; expected auto, device, host or disk")
        if self.budget_gib is not None and self.budget_gib <= 0:
            raise InputError(f"frozen_prefix.budget_gib is {self.budget_gib}; expected a number of GiB above 0")
        if self.release and not self.enabled:
            raise InputError("frozen_prefix.release needs the cache of frozen states; set frozen_prefix.enabled: true")


class StateStore:
    """Keeps tensors by the content of the example they belong to.

    Args:
        config: Place and budget.
        device: The model's device.
        folder: Folder for the memory-mapped file, which has no name there and disappears when the process ends. None is
            the system's temporary folder.
        processes: Number of processes that share this machine's host memory and disk, each with its own store.
    """

    def __init__(
        self, config: CacheConfig, device: torch.device, folder: Path | None = None, processes: int = 1
    ) -> None:
        self.device = device
        self._entries: dict[bytes, tuple[Tensor, ...]] = {}
        self._file = _MappedFile(folder)
        self._room = _room(config, device, processes)
        self._full = self._closed = False
        self.bytes: dict[Place, int] = dict.fromkeys(self._room, 0)
        """Bytes kept in each place."""

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def __getitem__(self, key: bytes) -> tuple[Tensor, ...]:
        return self._entries[key]

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def full(self) -> bool:
        """Whether some tensors found no room."""
        return self._full

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Keep nothing new within this context, for examples seen too rarely to take room from the corpus."""
        before, self._closed = self._closed, True
        try:
            yield
        finally:
            self._closed = before

    def put(self, key: bytes, tensors: tuple[Tensor, ...]) -> None:
        """Keep tensors in the first place that has room; if none has, drop them and warn once. A kept key stays."""
        if self._closed or key in self._entries:
            return
        size = sum(t.numel() * t.element_size() for t in tensors)
        for place, room in self._room.items():
            if self.bytes[place] + size <= room:
                try:
                    self._entries[key] = tuple(self._move(t, place) for t in tensors)
                except OSError as error:
                    log.warning("the frozen-layer cache stops using the disk (%s)", error.strerror)
                    self._room[place] = 0
                    continue
                self.bytes[place] += size
                return
        if not self._full:
            self._full = True
            log.warning(
                "the frozen-layer cache has no room for more than %d examples; the others are computed at every step "
                "(frozen_prefix.budget_gib, frozen_prefix.place)",
                len(self),
            )

    def _move(self, tensor: Tensor, place: Place) -> Tensor:
        if place == "device":
            return tensor.to(self.device).clone()
        host = tensor.to("cpu").clone()
        if place == "disk":
            return self._file.append(host)
        return host.pin_memory() if self.device.type == "cuda" else host


class _MappedFile:
    """A nameless file that tensors are appended to and read from in place, without counting as memory in use."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._file: IO[bytes] | None = None
        self._size = 0
        self._segment: Tensor | None = None
        self._used = 0

    def append(self, tensor: Tensor) -> Tensor:
        raw = tensor.contiguous().view(-1).view(torch.uint8)
        if self._segment is None or self._used + len(raw) > len(self._segment):
            self._segment, self._used = self._grow(max(SEGMENT_BYTES, len(raw))), 0
        mapped = self._segment[self._used : self._used + len(raw)]
        mapped.copy_(raw)
        # The next tensor starts at a multiple of every element size.
        self._used += -(-len(raw) // 64) * 64
        # `.data`, since views share the version counter by which autograd detects writes to tensors saved for backward.
        return mapped.view(tensor.dtype).view(tensor.shape).data

    def _grow(self, size: int) -> Tensor:
        if self._file is None:
            if self._folder is not None:
                self._folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - open as long as it is mapped
        size = -(-size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        # Allocate all of it: writing to a hole in a mapped file on a full disk would kill the process.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self._file.fileno(), self._size, size)
        else:  # macOS
            self._file.write(bytes(size))
            self._file.flush()
        segment = mmap.mmap(self._file.fileno(), size, offset=self._size)
        self._size += size
        return torch.frombuffer(segment, dtype=torch.uint8)


def _room(config: CacheConfig, device: torch.device, processes: int) -> dict[Place, float]:
    """Bytes that each place may hold, in the order in which places are tried."""
    budget = None if config.budget_gib is None else config.budget_gib * 2**30
    if config.place != "auto":
        sharing = 1 if config.place == "device" else processes
        return {config.place: float("inf") if budget is None else budget / sharing}
    host = (HOST_SHARE * available_bytes() if budget is None else budget) / processes
    if device.type != "cuda":
        return {"host": host, "disk": float("inf")}
    free = DEVICE_SHARE * torch.cuda.mem_get_info(device)[0] if budget is None else budget
    return {"device": free, "host": host, "disk": float("inf")}
