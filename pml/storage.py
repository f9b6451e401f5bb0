"""The rank that pairs need, without a run of one's own: their surprisal in bits over what a parameter stores.

What an adapter has to store is what the frozen model does not know, given the other pairs: that all answers are phone
numbers is learnt once, the digits one by one. So each target is scored after `CONTEXT` other pairs, which is within a
few percent of the entropy of a phone book. How many bits a trainable parameter stores depends on where the adapter
sits; measured values ship in `storage_constants.json`, and `pml calibrate` measures them on a backbone of one's own.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, Literal

import pydantic
import torch

from pml.adapter import AdapterConfig, adapter_parameters, attach_adapter, detach_adapter, lora_layers
from pml.backbone import Backbone
from pml.content import Content
from pml.corpus import Example
from pml.errors import InputError

__all__ = [
    "Constant",
    "ConstantsFile",
    "RankPlan",
    "SizeOfRank",
    "constant_for",
    "plan_rank",
    "read_constants",
    "read_constants_file",
    "size_of_rank",
    "surprisal_bits",
]

CONTEXT = 6
"""Other pairs that stand before a target when its surprisal is measured."""

CONTEXT_TOKENS = 384
"""They are left out where they come to more: what a format is shows in a few hundred tokens."""

SAMPLE = 32
"""Pairs whose surprisal is measured, evenly spaced; that of the others is taken to be the same per target token."""

FILL = 0.75
"""Largest fraction of capacity at which all targets are recalled.

It lies between the fullest runs here that recalled everything (80, 144 and 224 random tokens at ranks 2, 3 and 5: .78,
.93 and .87 of .85 bits a parameter) and what leaves room for a text of another kind.
"""

CONSTANTS_VERSION: Final = 1


class Constant(Content):
    """What a trainable parameter stores at one placement, when more is asked of the adapter than it holds.

    Attributes:
        placement: `mlp_block` or names of linear layers.
        guarded: Whether A was guarded.
        bits_per_parameter: Mean, in bits per trainable parameter.
        low: Lower end of the interval.
        high: Upper end of the interval.
        interval: What kind of interval that is.
        source: What it was measured on.
    """

    placement: str | list[str]
    guarded: bool = False
    bits_per_parameter: float = pydantic.Field(gt=0)
    low: float = pydantic.Field(gt=0)
    high: float = pydantic.Field(gt=0)
    interval: str
    source: str


class ConstantsFile(Content):
    """The content of a file of constants, the latest first.

    Attributes:
        version: Version of this layout.
        constants: What was measured.
    """

    version: Literal[1]
    constants: list[Constant]


class SizeOfRank(Content):
    """Parameters per rank.

    Attributes:
        trainable: Trainable parameters.
        saved: Numbers in the saved adapter; more than the trainable ones where A is guarded.
        largest_rank: The largest rank that fits.
    """

    trainable: int
    saved: int
    largest_rank: int


class RankPlan(Content):
    """The rank that pairs need.

    Attributes:
        pairs: Number of targets.
        target_tokens: Their tokens.
        surprisal_bits: Surprisal of all targets under the frozen model, by themselves.
        bits_to_store: Their surprisal given other pairs.
        placement: Where the adapter sits.
        rank: The rank.
        rank_interval: The ranks for the ends of the constant's interval.
        parameters: Trainable parameters at this rank.
        megabytes: Size of the saved adapter in float32, in 10^6 bytes.
        rests_on: The constant that was used.
        warnings: What makes the answer less certain.
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

    def lines(self) -> list[str]:
        """The plan in words, a line each."""
        low, high = self.rank_interval
        where = self.placement if isinstance(self.placement, str) else ", ".join(self.placement)
        known = self.rests_on
        return [
            f"{self.pairs:,} pairs, {self.target_tokens:,} target tokens: {self.surprisal_bits:,.0f} bits of surprisal "
            f"under the frozen model, {self.bits_to_store:,.0f} given other pairs",
            f"rank {self.rank} ({low} to {high}) in {where}: {self.parameters:,} trainable parameters, "
            f"{self.megabytes:.3g} MB in float32",
            f"rests on {known.bits_per_parameter:.2g} bits a parameter ({known.low:.2g} to {known.high:.2g}, "
            f"{known.interval}; {known.source}), filled to {FILL:.0%}",
            *(f"warning: {text}" for text in self.warnings),
        ]


def read_constants(path: str | Path | None = None) -> list[Constant]:
    """Measured constants: those that ship, or those of a file that `pml calibrate` wrote, which come first.

    Raises:
        InputError: If the file cannot be read or does not hold constants.
    """
    shipped = ConstantsFile.model_validate_json((files("pml") / "storage_constants.json").read_bytes()).constants
    return shipped if path is None else [*read_constants_file(path).constants, *shipped]


def read_constants_file(path: str | Path) -> ConstantsFile:
    """What `pml calibrate` wrote.

    Raises:
        InputError: If the file cannot be read, does not hold constants, or holds those of another version.
    """
    try:
        return ConstantsFile.model_validate_json(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); `pml calibrate --out` writes one") from error
    except pydantic.ValidationError as error:
        # Another version may differ in many fields; the version says it best.
        problem = min(error.errors(), key=lambda problem: problem["loc"] != ("version",))
        where = ".".join(map(str, problem["loc"])) or "file"
        raise InputError(
            f"{path}: not a file of constants of version {CONSTANTS_VERSION} ({where}: {problem['msg'].lower()}); "
            "`pml calibrate --out` writes one"
        ) from error


def constant_for(
    placement: str | list[str], guarded: bool, constants: Sequence[Constant]
) -> tuple[Constant, list[str]]:
    """The first constant of a placement, and warnings where what there is was measured elsewhere.

    Args:
        placement: Where the adapter sits.
        guarded: Whether its A is guarded.
        constants: What is known.
    """
    same = [known for known in constants if _as_set(known.placement) == _as_set(placement)]
    for known in same:
        if known.guarded == guarded:
            return known, []
    if same:
        return same[0], [f"measured {'with' if same[0].guarded else 'without'} the guard"]
    # Of placements that were never measured, the one that stores least: a plan errs on the side of what is recalled.
    least = min(constants, key=lambda known: known.bits_per_parameter)
    where = least.placement if isinstance(least.placement, str) else ", ".join(least.placement)
    return least, [f"nothing was measured at this placement; this is what {where} stores, the least of all"]


def size_of_rank(backbone: Backbone, config: AdapterConfig) -> SizeOfRank:
    """Parameters per rank at a placement; the backbone carries no adapter before and after.

    Args:
        backbone: The frozen model.
        config: Placement, block and guard; its rank does not matter.
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
    for index in range(0, len(examples), -(-len(examples) // sample)):
        example, before = examples[index], list[int]()
        for step in range(1, min(others, len(examples) - 1) + 1):
            other = examples[index - step]
            longer = [*other.prompt_ids, *other.target_ids, *before]
            if len(longer) + len(example) > room:
                break
            before = longer
        nats += _surprisal(backbone, before, example)
        tokens += len(example.target_ids)
    return nats / math.log(2) * sum(len(e.target_ids) for e in examples) / tokens


def _surprisal(backbone: Backbone, before: Sequence[int], example: Example) -> float:
    device = backbone.model.device
    ids = torch.tensor([[*before, *example.prompt_ids, *example.target_ids[:-1]]], device=device)
    targets = torch.tensor(example.target_ids, device=device)
    with torch.no_grad():
        logits = backbone.model(input_ids=ids, use_cache=False, logits_to_keep=len(targets)).logits[0]
    scores = logits[-len(targets) :].float().log_softmax(dim=-1)
    return -float(scores.gather(1, targets[:, None]).cpu().double().sum())


def plan_rank(
    backbone: Backbone, examples: Sequence[Example], config: AdapterConfig, constants: Sequence[Constant] | None = None
) -> RankPlan:
    """The smallest rank that is expected to recall all of some pairs.

    Args:
        backbone: The frozen model, without an adapter.
        examples: The pairs.
        config: Placement, block and guard of the adapter.
        constants: What a parameter stores; those that ship unless given.

    Raises:
        InputError: If no rank that fits is enough.
    """
    constant, warnings = constant_for(config.placement, config.guard is not None, constants or read_constants())
    size = size_of_rank(backbone, config)
    alone = surprisal_bits(backbone, examples)
    if len(examples) > SAMPLE:
        warnings = [*warnings, f"surprisal was measured on about {SAMPLE} pairs, evenly spaced"]
    # The first pair has no context, and some contexts mislead.
    bits = min(alone, surprisal_bits(backbone, examples, CONTEXT)) if len(examples) > 1 else alone

    def enough(bits_per_parameter: float) -> int:
        return max(1, math.ceil(bits / (FILL * bits_per_parameter * size.trainable)))

    rank = enough(constant.bits_per_parameter)
    if rank > size.largest_rank:
        raise InputError(
            f"{bits:,.0f} bits need rank {rank} at {config.placement}, and no more than {size.largest_rank} fits; "
            "adapt more layers (adapter.placement) or blocks (adapter.block), or split the pairs"
        )
    return RankPlan(
        pairs=len(examples),
        target_tokens=sum(len(e.target_ids) for e in examples),
        surprisal_bits=alone,
        bits_to_store=bits,
        placement=config.placement,
        rank=rank,
        rank_interval=(enough(constant.high), enough(constant.low)),
        parameters=rank * size.trainable,
        megabytes=rank * size.saved * torch.float32.itemsize / 1e6,
        rests_on=constant,
        warnings=warnings,
    )


def _as_set(placement: str | list[str]) -> frozenset[str]:
    return frozenset([placement] if isinstance(placement, str) else placement)
