"""Verbatim recall: one teacher-forced pass that certifies it, and greedy decoding that shows it.

Greedy decoding reproduces a target if and only if the argmax is right at every position given the true prefix. A token
with p > 0.5 cannot be beaten, so a corpus whose every target token has p > 0.5 is certain to be recalled.
"""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pml.certificate import Rounding, measure_rounding
from pml.corpus import Example, collate
from pml.decoding import greedy_tokens
from pml.evaluating import evaluating
from pml.frozen_layers import on_device
from pml.ranks import from_all_ranks, own_part
from pml.weighting import TokenScores

if TYPE_CHECKING:
    from pml.modules import Memorization

__all__ = [
    "Generated",
    "certified",
    "gather_scores",
    "greedy_recall",
    "rounding_of_corpus",
    "score_corpus",
    "score_examples",
]


def certified(scores: TokenScores, margin: float = 0.5) -> bool:
    """Whether every target token has the argmax right and a probability above `margin`.

    With a margin of 0.5 or more this certifies that greedy decoding reproduces every target.
    """
    sure = scores.correct & (torch.exp(-scores.losses) > margin)
    return bool((sure | ~scores.mask).all())


def gather_scores(parts: Sequence[TokenScores]) -> TokenScores:
    """Scores of many batches, from all ranks, as one on the host: a row per example, sorted by example id."""
    gathered = [TokenScores._make(t if t is None else t.detach().cpu() for t in part) for part in parts]
    gathered = [part for rank in from_all_ranks(gathered) for part in rank]
    longest = max(part.losses.shape[1] for part in gathered)
    rows = {
        int(example_id): (part, row)
        for part in gathered
        for row, example_id in enumerate(part.example_id.tolist())
        if example_id >= 0
    }
    order = sorted(rows)

    def column(name: str) -> Tensor:
        first: Tensor = getattr(gathered[0], name)
        joined = torch.zeros(len(order), longest, dtype=first.dtype)
        for i, example_id in enumerate(order):
            part, row = rows[example_id]
            values = getattr(part, name)[row]
            joined[i, : len(values)] = values
        return joined

    known = all(part.margin is not None and part.rival is not None for part in gathered)
    return TokenScores(
        losses=column("losses"),
        correct=column("correct"),
        mask=column("mask"),
        example_id=torch.tensor(order),
        margin=column("margin") if known else None,
        rival=column("rival") if known else None,
    )


def score_corpus(module: "Memorization", batches: Iterable[dict[str, Any]]) -> TokenScores:
    """Teacher-forced scores of a whole corpus with dropout off, on the host, the same on every rank.

    Args:
        module: The module whose adapted model is asked.
        batches: This rank's share of the corpus, as a validation dataloader yields it.
    """
    parts = []
    with torch.no_grad(), evaluating(module):
        for batch in batches:
            parts.append(module.score(on_device(batch, module.device)))
    return gather_scores(parts)


def score_examples(
    module: "Memorization", examples: Sequence[Example], batch_size: int = 8, keep: bool = False
) -> TokenScores:
    """Teacher-forced scores of examples outside the corpus, on the host, the same on every rank.

    The ranks share the examples.

    Args:
        module: The module whose adapted model is asked.
        examples: At least one; their ids differ.
        batch_size: Examples scored together.
        keep: Let the frozen-layer cache keep them; by default the corpus has all of its room.
    """
    own = own_part(examples)
    if keep and module.backbone.streamed is not None:
        module.frozen_layers.keep(own)
    with nullcontext() if keep else module.frozen_layers.store.closed():
        return score_corpus(
            module, (collate(own[start : start + batch_size]) for start in range(0, len(own), batch_size))
        )


def rounding_of_corpus(module: "Memorization", examples: Sequence[Example], scores: TokenScores) -> Rounding:
    """How far margins move between these scores and decoding, the same on every rank; see `measure_rounding`.

    The ranks share the examples.

    Args:
        module: The module whose adapted model is asked.
        examples: What was scored, in the order of the scores.
        scores: Of the model as it is now.
    """
    module.backbone.restore()
    assert scores.margin is not None
    margins = [row[mask] for row, mask in zip(scores.margin, scores.mask, strict=True)]
    with evaluating(module):
        everyone = from_all_ranks(measure_rounding(module.model, own_part(examples), own_part(margins)))
    return Rounding(max(part.logits for part in everyone), sum(part.tokens for part in everyone))


@dataclass(frozen=True)
class Generated:
    """What greedy decoding gave for one example, next to what was expected.

    Attributes:
        example: The example.
        token_ids: As many generated tokens as the target has; fewer where decoding ended with a wrong one.
    """

    example: Example
    token_ids: tuple[int, ...]

    @property
    def right_tokens(self) -> int:
        """Generated tokens that equal the target's token in the same place."""
        return sum(a == b for a, b in zip(self.token_ids, self.example.target_ids, strict=False))

    @property
    def exact(self) -> bool:
        """Whether the target came back token for token."""
        return self.token_ids == self.example.target_ids


def greedy_recall(
    module: "Memorization", examples: Sequence[Example], batch_size: int = 64, to_the_end: bool = True
) -> list[Generated]:
    """Ask for every example and take what greedy decoding answers; work is shared among ranks, the result is not.

    Args:
        module: The module whose adapted model is asked.
        examples: What to ask for.
        batch_size: Prompts read or decoded together.
        to_the_end: Decode what follows on a wrong token too; where nobody looks at that, an answer may end with it.

    Returns:
        One entry per example, in the order given, the same on every rank.
    """
    module.backbone.restore()
    with evaluating(module):
        everyone = from_all_ranks(greedy_tokens(module.model, own_part(examples), batch_size, to_the_end))
    answers = {i: ids for part in everyone for i, ids in part.items()}
    return [Generated(example, answers[example.example_id]) for example in examples]
