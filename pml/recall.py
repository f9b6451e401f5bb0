"""Verbatim recall: a teacher-forced pass that certifies it, and greedy decoding that demonstrates it.

Greedy decoding reproduces a target if and only if the argmax is right at every position given the true prefix. A token
with p > 0.5 is always the argmax, so a corpus is certain to be recalled if all its target tokens have p > 0.5.
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
from pml.metrics import above_threshold
from pml.ranks import from_all_ranks, own_part
from pml.token_scores import TokenScores

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
    """Whether every target token is the argmax and has a probability above `margin`.

    With a `margin` of 0.5 or more this certifies that greedy decoding reproduces every target.
    """
    return bool((above_threshold(scores, margin) | ~scores.mask).all())


def gather_scores(parts: Sequence[TokenScores]) -> TokenScores:
    """Gather scores of batches from all ranks on the host: one row per example, sorted by example id."""
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
    """Teacher-forced scores of a whole corpus with dropout off, on the host and equal on every rank.

    Args:
        module: The module whose adapted model is scored.
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
    """Teacher-forced scores of examples outside the corpus, on the host and equal on every rank.

    The ranks share the work.

    Args:
        module: The module whose adapted model is scored.
        examples: At least one example, with distinct ids.
        batch_size: Examples scored together.
        keep: Keep their frozen states in the cache; by default they take no room from the corpus.
    """
    own = own_part(examples)
    if keep and module.backbone.streamed is not None:
        module.frozen_layers.keep(own)
    with nullcontext() if keep else module.frozen_layers.store.closed():
        return score_corpus(
            module, (collate(own[start : start + batch_size]) for start in range(0, len(own), batch_size))
        )


def rounding_of_corpus(module: "Memorization", examples: Sequence[Example], scores: TokenScores) -> Rounding:
    """How far margins move between these scores and decoding, equal on every rank; see `measure_rounding`.

    The ranks share the work.

    Args:
        module: The module whose adapted model decodes.
        examples: The scored examples, in the order of the scores.
        scores: Scores of the model in its current state, with margins.
    """
    module.backbone.restore()
    assert scores.margin is not None
    margins = [row[mask] for row, mask in zip(scores.margin, scores.mask, strict=True)]
    with evaluating(module):
        everyone = from_all_ranks(measure_rounding(module.model, own_part(examples), own_part(margins)))
    return Rounding(max(part.logits for part in everyone), sum(part.tokens for part in everyone))


@dataclass(frozen=True)
class Generated:
    """Output of greedy decoding for one example, with the example.

    Attributes:
        example: The example.
        token_ids: As many generated tokens as the target has; fewer if decoding stopped at a wrong one.
    """

    example: Example
    token_ids: tuple[int, ...]

    @property
    def right_tokens(self) -> int:
        """Number of generated tokens that equal the target's token at the same position."""
        return sum(a == b for a, b in zip(self.token_ids, self.example.target_ids, strict=False))

    @property
    def exact(self) -> bool:
        """Whether the output equals the target token for token."""
        return self.token_ids == self.example.target_ids


def greedy_recall(
    module: "Memorization", examples: Sequence[Example], batch_size: int = 64, to_the_end: bool = True
) -> list[Generated]:
    """Prompt for every example and decode greedily; the ranks share the work.

    Args:
        module: The module whose adapted model is prompted.
        examples: The examples to prompt for.
        batch_size: Prompts read or decoded together.
        to_the_end: Also decode what follows a wrong token; otherwise an answer may end with it.

    Returns:
        One entry per example, in the order given, equal on every rank.
    """
    module.backbone.restore()
    with evaluating(module):
        everyone = from_all_ranks(greedy_tokens(module.model, own_part(examples), batch_size, to_the_end))
    answers = {i: ids for part in everyone for i, ids in part.items()}
    return [Generated(example, answers[example.example_id]) for example in examples]
