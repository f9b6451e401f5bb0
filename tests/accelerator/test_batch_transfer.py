"""Moving a batch to its device takes no more calls for a long text than for a short one."""

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device

from pml.corpus import Example, collate
from pml.frozen_layers import ContentKeys
from pml.modules import Memorization
from tests.fits import module_on


def calls_of_a_transfer(module: Memorization, tokens: int) -> tuple[int, dict[str, Any]]:
    ids = tuple(i % 250 for i in range(tokens))
    batch = collate([Example(0, ids[:2], ids), Example(1, ids[:3], ids[:4])])
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        moved = move_data_to_device(module.on_before_batch_transfer(batch, 0), torch.device("cpu"))
    finally:
        sys.setprofile(None)
    return calls, moved


def test_moving_a_batch_takes_as_many_calls_for_long_targets_as_for_short_ones(tiny_backbone_folder: Path) -> None:
    module = module_on(tiny_backbone_folder)
    calls_of_a_transfer(module, 8)  # The first call imports modules and fills caches.
    few, _ = calls_of_a_transfer(module, 8)
    many, moved = calls_of_a_transfer(module, 800)
    assert few == many
    assert isinstance(moved["keys"], ContentKeys)
    assert moved["target_tokens"] == 804
