"""Decoder blocks whose weights stay on the host; each is on the device only while it runs.

This lets the frozen layers of a model that does not fit on its device run once, to keep their states
(`pml.frozen_layers`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["StreamedBlocks", "free"]


class StreamedBlocks:
    """Frozen decoder blocks that move to the device when they run, and leave it afterwards.

    Args:
        blocks: The blocks; their weights must not change, since the copy on the device is dropped.
        device: Returns the device to run on; called at every move, since the model may itself be moved.

    Attributes:
        moves: Number of times that a block was moved to the device.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: Callable[[], torch.device]) -> None:
        self._device = device
        self._weights = [[(weight, weight.data.cpu()) for weight in block.parameters()] for block in blocks]
        self._resident: int | None = None
        self.moves = 0
        self._hooks: list[Any] = []
        for number, block in enumerate(blocks):
            self._leave(number)
            self._hooks += [
                block.register_forward_pre_hook(lambda *_, number=number: self._come(number)),
                # Also after a pass that fails.
                block.register_forward_hook(lambda *_, number=number: self._after(number), always_call=True),
            ]

    def __len__(self) -> int:
        return len(self._weights)

    @contextmanager
    def resident(self, number: int) -> Iterator[None]:
        """Keep a block on the device within this context, so that many inputs share one move."""
        try:
            self._come(number)
            self._resident = number
            yield
        finally:
            self._resident = None
            self._leave(number)

    def end(self, device: torch.device | None) -> None:
        """Stop streaming: move all weights to a device, or free them if it is None."""
        for hook in self._hooks:
            hook.remove()
        if device is not None:
            for number in range(len(self)):
                self._move(number, device)
        self._weights = []

    def _come(self, number: int) -> None:
        if number != self._resident:
            self.moves += 1
            self._move(number, self._device())

    def _move(self, number: int, device: torch.device) -> None:
        # Tensors made under inference_mode cannot be used in training later.
        with torch.inference_mode(False):
            for weight, on_host in self._weights[number]:
                # The model may be in another dtype temporarily.
                weight.data = on_host.to(device, weight.dtype)

    def _after(self, number: int) -> None:
        if number != self._resident:
            self._leave(number)

    def _leave(self, number: int) -> None:
        with torch.inference_mode(False):
            for weight, _ in self._weights[number]:
                free(weight)


def free(weight: Tensor) -> None:
    """Free a weight's memory; the weight stays on its device."""
    # Empty rather than on the meta device, since a model with meta tensors cannot be moved.
    weight.data = weight.data.new_empty(0)
