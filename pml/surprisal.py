"""Surprisal of targets under the frozen model, by themselves or given other pairs."""

import math
from collections.abc import Sequence
from dataclasses import replace

from pml.backbone import Backbone
from pml.certificate import log_probability
from pml.corpus import Example

__all__ = ["CONTEXT", "SAMPLE", "sampled", "surprisal_bits"]

CONTEXT = 6
"""Other pairs that stand before a target when its surprisal is measured."""

CONTEXT_TOKENS = 384
"""They are left out where they come to more: what a format is shows in a few hundred tokens."""

SAMPLE = 32
"""Pairs whose surprisal is measured, evenly spaced; that of the others is taken to be the same per target token."""


def sampled(pairs: int, sample: int) -> range:
    """Which of so many pairs are measured."""
    return range(0, pairs, -(-pairs // sample))


def surprisal_bits(backbone: Backbone, examples: Sequence[Example], others: int = 0, sample: int = SAMPLE) -> float:
    """Surprisal of all targets under the frozen model in bits, each after so many other pairs.

    Args:
        backbone: The model, without an adapter.
        examples: The pairs.
        others: Pairs that stand before each; fewer where they do not fit into the context.
        sample: Most pairs that are measured.
    """
    backbone.restore()
    room = min(CONTEXT_TOKENS, backbone.max_positions or CONTEXT_TOKENS)
    nats, tokens = 0.0, 0
    for index in sampled(len(examples), sample):
        example, before = examples[index], list[int]()
        for step in range(1, min(others, len(examples) - 1) + 1):
            other = examples[index - step]
            longer = [*other.prompt_ids, *other.target_ids, *before]
            if len(longer) + len(example) > room:
                break
            before = longer
        nats -= log_probability(backbone.model, replace(example, prompt_ids=(*before, *example.prompt_ids)))
        tokens += len(example.target_ids)
    return nats / math.log(2) * sum(len(e.target_ids) for e in examples) / tokens
