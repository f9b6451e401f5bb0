"""Plan the rank that pairs need without any run: their surprisal in bits over the bits that a parameter stores.

An adapter has to store what the frozen model does not know given the other pairs: that all answers are phone numbers is
learnt once, the digits one by one. So each target is scored after `CONTEXT` other pairs, which gives the entropy of a
phone book to a few percent. How many bits a trainable parameter stores depends on the placement. Measured values ship
in `storage_constants.json`, and `pml calibrate` measures them on your own backbone.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pydantic
import torch

from pml.adapter import AdapterConfig, adapter_parameters, attach_adapter, detach_adapter, lora_layers
from pml.backbone import Backbone
from pml.content import Content
from pml.corpus import Corpus
from pml.errors import InputError
from pml.storage_constants import Constant, constant_for, placement_name, read_constants
from pml.surprisal import CONTEXT, SAMPLE, sampled, surprisal_bits

__all__ = ["RankPlan", "RankTooHigh", "SizeOfRank", "plan_rank", "size_of_rank"]

FILL = 0.5
"""Fraction of the capacity that a plan fills.

Chosen on two draws of twelve sets of pairs under the guard and the KL penalty, with a falling threshold: at 0.7 some
phone books and functions are not fully recalled. On a third draw, the planned ranks recall 11 of twelve sets. The plain
loss needs about 2.5 times the rank (`configs/experiments/README.md`, the planned rank and half of it).
"""


class RankTooHigh(InputError):
    """Pairs need a higher rank than fits."""


class SizeOfRank(Content):
    """Parameters per rank.

    Attributes:
        trainable: Trainable parameters.
        saved: Numbers in the saved adapter; more than `trainable` if A is guarded.
        largest_rank: The largest possible rank.
    """

    trainable: int
    saved: int
    largest_rank: int


class RankPlan(Content):
    """The rank that pairs need.

    Attributes:
        pairs: Number of targets.
        target_tokens: Number of target tokens.
        surprisal_bits: Surprisal of all targets under the frozen model, without other pairs.
        bits_to_store: Their surprisal given other pairs, if that is smaller.
        placement: Where the adapter sits.
        rank: The planned rank.
        rank_interval: The ranks at the upper and lower ends of the constant's interval.
        parameters: Trainable parameters at this rank.
        megabytes: Size of the saved adapter in float32, in 10^6 bytes.
        rests_on: The constant used for the plan.
        warnings: Reasons to trust the plan less.
        largest_rank: Largest rank that fits; not in the JSON.
    """

    pairs: int
    target_tokens: int
    surprisal_bits: float
    bits_to_store: float
    placement: str | list[str]
    rank: int
    rank_interval: tuple[int, int]
    parameters: int
    megabytes: float
    rests_on: Constant
    warnings: list[str]
    largest_rank: int = pydantic.Field(exclude=True)

    def lines(self) -> list[str]:
        """The plan in words, line by line."""
        low, high = self.rank_interval
        where = placement_name(self.placement)
        known = self.rests_on
        return [
            f"{self.pairs:,} pairs, {self.target_tokens:,} target tokens: {self.surprisal_bits:,.0f} bits of surprisal "
            f"under the frozen model, {self.bits_to_store:,.0f} given other pairs",
            f"rank {self.rank} ({low} to {high}) in {where}: {self.parameters:,} trainable parameters, "
            f"{self.megabytes:.3g} MB in float32",
            f"based on {known.bits_per_parameter:.2g} bits per parameter ({known.low:.2g} to {known.high:.2g}, "
            f"{known.interval}; {known.source}), filled to {FILL:.0%}",
            *(f"warning: {text}" for text in self.warnings),
        ]


def size_of_rank(backbone: Backbone, config: AdapterConfig) -> SizeOfRank:
    """Parameters per rank at a placement. The backbone must have no adapter, and has none afterwards.

    Args:
        backbone: The frozen model.
        config: Placement, block and guard; its rank is ignored.
    """
    model = attach_adapter(backbone, replace(config, rank=1))
    try:
        layers: list[Any] = list(lora_layers(model))
        sides = [(layer.lora_A["default"], layer.lora_B["default"]) for layer in layers]
        free = [next(a.parameters()).shape[-1] for a, _ in sides]
        return SizeOfRank(
            trainable=sum(p.numel() for p in adapter_parameters(model).values()),
            saved=sum(a.weight.numel() + b.weight.numel() for a, b in sides),
            largest_rank=min(backbone.hidden_size, *free),
        )
    finally:
        detach_adapter(model)


def plan_rank(
    backbone: Backbone, corpus: Corpus, config: AdapterConfig, constants: Sequence[Constant] | None = None
) -> RankPlan:
    """Plan the smallest rank whose adapter holds the bits of the corpus when filled to `FILL`.

    A fact with several prompts counts once.

    Args:
        backbone: The frozen model, without an adapter.
        corpus: The pairs.
        config: Placement, block and guard of the adapter.
        constants: What a parameter stores; the shipped constants by default.

    Raises:
        RankTooHigh: If the largest possible rank is too small.
        InputError: If the backbone cannot score the pairs, see `surprisal_bits`, or the guard cannot be made.
    """
    known = constants or read_constants()
    constant, warnings = constant_for(config.placement, config.guard is not None, backbone.name, known)
    size = size_of_rank(backbone, config)
    facts = corpus.facts
    alone = surprisal_bits(backbone, facts)
    measured = len(sampled(len(facts), SAMPLE))
    if measured < len(facts):
        warnings = [*warnings, f"surprisal was measured on {measured} of the pairs, evenly spaced"]
    # A single pair has no others to be given, and some contexts mislead.
    bits = min(alone, surprisal_bits(backbone, facts, CONTEXT)) if len(facts) > 1 else alone

    def enough(bits_per_parameter: float) -> int:
        return max(1, math.ceil(bits / (FILL * bits_per_parameter * size.trainable)))

    rank = enough(constant.bits_per_parameter)
    if rank > size.largest_rank:
        where = placement_name(config.placement)
        raise RankTooHigh(
            f"{bits:,.0f} bits need rank {rank} in {where}, and no more than {size.largest_rank} fits; adapt more "
            "layers (placement) or blocks (block), or split the pairs"
        )
    high = enough(constant.low)
    if high > size.largest_rank:
        warnings = [*warnings, f"the interval ends at rank {high}, and no more than {size.largest_rank} fits"]
    return RankPlan(
        pairs=len(corpus),
        target_tokens=corpus.target_tokens,
        surprisal_bits=alone,
        bits_to_store=bits,
        placement=config.placement,
        rank=rank,
        rank_interval=(enough(constant.high), high),
        parameters=rank * size.trainable,
        megabytes=rank * size.saved * torch.float32.itemsize / 1e6,
        rests_on=constant,
        warnings=warnings,
        largest_rank=size.largest_rank,
    )
