"""Bits per parameter that an adapter stores, measured at rank 1 on more random tokens than it can hold.

Adapters are trained with the rate, guard and penalty of `pml memorize`, on the plain loss, a few short pairs at a
time. How an adapter is trained matters as much as its placement: on one long text, at a high rate and without the
penalty, it stores twice as much.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from statistics import fmean, stdev
from typing import Any

from scipy import stats

from pml import metrics
from pml.adapter import adapter_for, adapter_parameters
from pml.backbone import load_backbone, shared_backbones
from pml.bare_trainer import bare_trainer
from pml.errors import InputError
from pml.guard import GuardConfig
from pml.kl_penalty import KlPenaltyConfig
from pml.memorizing import LEARNING_RATE, PER_STEP
from pml.modules import SFT
from pml.recall import score_corpus
from pml.storage_constants import Constant

__all__ = ["calibrate"]

MOST_BITS = 1.6
"""Bits per parameter that each adapter is given to store; none stored more than 1.3."""

PAIR_TOKENS = 24
"""Target tokens per pair, about as many as a fact or a key has."""


def calibrate(
    backbone: str,
    placement: str | list[str] | None = None,
    block: int | float | list[int] = 2 / 3,
    guard: GuardConfig | None = None,
    kl_penalty: KlPenaltyConfig | None = None,
    *,
    texts: int = 3,
    steps: int = 300,
    learning_rate: float = LEARNING_RATE,
    on_text: Callable[[int, float], None] | None = None,
) -> Constant:
    """Measure the bits stored per trainable parameter at one placement.

    Args:
        backbone: As `pml.backbone.load_backbone` takes it.
        placement: See `pml.adapter.AdapterConfig`; None takes all linear layers of the block.
        block: See `pml.adapter.AdapterConfig`.
        guard: Guard of the adapters; None disables it.
        kl_penalty: KL penalty in training; None disables it.
        texts: Number of sets of random pairs; each trains its own adapter.
        steps: Optimiser steps per set.
        learning_rate: Peak learning rate of AdamW.
        on_text: Called after each set with its number, from 1, and its bits per parameter.

    Raises:
        InputError: If a number is out of range, or nothing was stored.
    """
    if texts < 2 or steps < 1:
        raise InputError(f"texts is {texts}, steps is {steps}; expected at least 2 texts and 1 step")
    stored: list[float] = []
    with shared_backbones():
        loaded = load_backbone(backbone)
        adapter = replace(adapter_for(loaded, placement, block, guard), rank=1)
        bits_per_token = math.log2(loaded.vocab_size)
        where = ", ".join(map(str, adapter.block_indices(len(loaded.blocks))))
        for text in range(texts):
            module = SFT(
                backbone=backbone, adapter=adapter, learning_rate=learning_rate, kl_penalty=kl_penalty, seed=text
            )
            module.configure_model()
            parameters = sum(p.numel() for p in adapter_parameters(module.model).values())
            stored.append(_stored_bits(module, math.ceil(MOST_BITS * parameters / bits_per_token), steps) / parameters)
            module.release()
            if not stored[-1] > 0:
                raise InputError(
                    f"text {text + 1} of {texts} stored nothing in {steps} steps at a learning rate of "
                    f"{learning_rate:g}; give a lower rate, or more steps"
                )
            if on_text is not None:
                on_text(text + 1, stored[-1])
    mean = fmean(stored)
    half = float(stats.t.ppf(0.975, texts - 1)) * stdev(stored) / math.sqrt(texts)
    return Constant(
        placement=adapter.placement,
        guarded=adapter.guard is not None,
        bits_per_parameter=mean,
        # With few texts the interval may reach below 0, which no parameter stores.
        low=max(mean - half, min(stored) / 2),
        high=mean + half,
        interval="95 %",
        backbone=backbone,
        source=f"{backbone}, block {where}, {texts} sets of random pairs at rank 1, {steps} steps at {learning_rate:g}"
        + (f", KL penalty {kl_penalty.weight:g}" if kl_penalty is not None else ""),
    )


def _stored_bits(module: SFT, tokens: int, steps: int) -> float:
    """Bits of random pairs that the module's adapter stores after training."""
    length = min(tokens, PAIR_TOKENS)
    data: Any = import_module("data_modules").RandomTokens(
        length=length, count=math.ceil(tokens / length), prompt="pair", batch_size=PER_STEP, seed=module.seed
    )
    trainer = bare_trainer(max_steps=steps, max_epochs=-1)
    trainer.fit(module, datamodule=data)
    loss = metrics.mean_loss(score_corpus(module, data.val_dataloader())).item()
    assert data.corpus.entropy_bits is not None
    return metrics.memorized_bits(data.corpus.entropy_bits, loss, data.corpus.target_tokens)
