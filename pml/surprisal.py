"""Surprisal of targets under the frozen model, alone or given other pairs."""

import math
from collections.abc import Sequence
from dataclasses import replace

from pml.backbone import Backbone
from pml.certificate import log_probability
from pml.corpus import Example
from pml.errors import not_finite

__all__ = ["CONTEXT", "SAMPLE", "sampled", "surprisal_bits"]

CONTEXT = 6
"""Number of other pairs that precede a target when its surprisal is measured."""

CONTEXT_TOKENS = 384
"""Most tokens of a pair and those before it; further ones are left out. A few hundred tokens show the format."""

SAMPLE = 32
"""Number of pairs, evenly spaced, whose surprisal is measured; the others are assumed to have as much per token."""


def sampled(pairs: int, sample: int) -> range:
    """Indices of the pairs that are measured, at most `sample`."""
    return range(0, pairs, -(-pairs // sample))


def surprisal_bits(backbone: Backbone, examples: Sequence[Example], others: int = 0, sample: int = SAMPLE) -> float:
    """Surprisal of all targets under the frozen model in bits, scaled up from a sample of the pairs.

    Args:
        backbone: The model, without an adapter.
        examples: The pairs.
        others: Number of other pairs before each; fewer if they do not fit into the context.
        sample: Largest number of pairs to measure.

    Raises:
        InputError: If the model gives logits that are not finite.
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
    if not math.isfinite(nats):
        raise not_finite(backbone.name, "logits", backbone.model.dtype)
    return nats / math.log(2) * sum(len(e.target_ids) for e in examples) / tokens
