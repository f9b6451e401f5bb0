"""What tests of whole fits share: a tiny backbone that can be certain of a token, and corpora that it can learn."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pml.adapter import AdapterConfig
from pml.modules import SFT, MemFT, Memorization

# Matrices this small gain nothing from threads, which on a busy machine wait for each other longer than they work.
torch.set_num_threads(1)

__all__ = ["ADAPTER", "module_on", "save_sharpened"]

ADAPTER = AdapterConfig(rank=16, block=2)
"""Enough parameters for every corpus that `tests.tiny_runs.uneven` gives up to eight examples of."""


def save_sharpened(folder: Path, to: Path) -> Path:
    """Save a backbone with an LM head three times as large, and return where.

    The final norm limits how long a hidden state can be, and with it how large a logit: as it is, the tiny backbone
    gives some tokens no more than p = 0.3 whatever its adapter does.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    model.save_pretrained(to)
    AutoTokenizer.from_pretrained(folder).save_pretrained(to)
    return to


def module_on(folder: Path, method: type[Memorization] = SFT, **settings: Any) -> SFT | MemFT:
    """A module whose short fits recall small corpora, unless told otherwise."""
    defaults: dict[str, Any] = {"adapter": ADAPTER, "seed": 1, "learning_rate": 0.02, "schedule": "constant"}
    return method(backbone=str(folder), **{**defaults, **settings})  # type: ignore[return-value]
