"""Helpers for tests of whole fits: a tiny backbone that can become certain of a token, and modules that learn fast."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pml.adapter import AdapterConfig
from pml.modules import SFT, MemFT, Memorization

# Matrices this small gain nothing from threads, which on a busy machine wait longer than they compute.
torch.set_num_threads(1)

__all__ = ["ADAPTER", "module_on", "save_sharpened"]

ADAPTER = AdapterConfig(rank=16, block=2)
"""An adapter with enough parameters for corpora of up to eight examples from `tests.tiny_runs.uneven`."""


def save_sharpened(folder: Path, to: Path) -> Path:
    """Save a copy of a backbone with the weights of its LM head multiplied by 3, and return its folder.

    The final norm limits the length of a hidden state and so the size of a logit: without the factor, the tiny backbone
    gives some tokens at most p = 0.3, whatever its adapter does.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    model.save_pretrained(to)
    AutoTokenizer.from_pretrained(folder).save_pretrained(to)
    return to


def module_on(folder: Path, method: type[Memorization] = SFT, **settings: Any) -> SFT | MemFT:
    """Return a module that, by default, recalls small corpora after a short fit."""
    defaults: dict[str, Any] = {"adapter": ADAPTER, "seed": 1, "learning_rate": 0.02, "schedule": "constant"}
    return method(backbone=str(folder), **{**defaults, **settings})  # type: ignore[return-value]
