"""Growing an adapter to a higher rank without losing what it has learnt."""

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from pml.adapter import lora_layers
from pml.guard import GuardedA
from pml.modules import Memorization

__all__ = ["grow", "largest_rank", "weights_of"]


def grow(model: PeftModel, learnt: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy a smaller adapter into a fresh one of higher rank, which then computes the same update.

    Args:
        model: The model with the fresh adapter, whose B is zero.
        learnt: Trained A (r, ...) and B (d, r) of each layer of the smaller adapter, from `weights_of`.
    """
    for layer, (a, b) in zip(lora_layers(model), learnt, strict=True):
        with torch.no_grad():
            _trained_a(layer)[: len(a)] = a
            _b(layer)[:, : len(a)] = b


def weights_of(model: PeftModel) -> list[tuple[Tensor, Tensor]]:
    """Trained A and B of each layer of an adapter, as `grow` takes them; a guarded A by its coordinates."""
    return [(_trained_a(layer).detach().clone(), _b(layer).detach().clone()) for layer in lora_layers(model)]


def largest_rank(module: Memorization) -> int:
    """Largest rank that fits the free directions of every adapted layer and the hidden size."""
    free = (_trained_a(layer).shape[-1] for layer in lora_layers(module.model))
    return min(module.backbone.hidden_size, *free)


def _trained_a(layer: Any) -> Tensor:
    a = layer.lora_A["default"]
    return a.coordinates if isinstance(a, GuardedA) else a.weight


def _b(layer: Any) -> Tensor:
    weight: Tensor = layer.lora_B["default"].weight
    return weight
