"""Random replacement: uniform random tokens replace those at evenly spaced positions."""

import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from pml.encoding import special_ids

__all__ = ["ordinary_ids", "replace", "replaced_positions"]


def ordinary_ids(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> list[int]:
    """Ids of all tokens that stand for text, ascending.

    Args:
        tokenizer: The backbone's tokenizer.
        vocabulary: Number of token ids that the backbone knows.
    """
    # A backbone's embedding may have more rows than its tokenizer has tokens; such ids stand for no text.
    special = special_ids(tokenizer)
    return [i for i in range(min(vocabulary, len(tokenizer))) if i not in special]


def replaced_positions(length: int, ratio: float) -> tuple[int, ...]:
    """Positions at which tokens are replaced, ascending: 2, 7, 12, ... for a ratio of 0.2.

    With n tokens of which k = round(ratio n) are replaced, these are floor((i + 1/2) n / k) for i = 0 ... k - 1, the
    rule of the published files. The same share of every prefix is replaced, to within one token.

    Args:
        length: Tokens n of the target.
        ratio: Share of tokens to replace, 0 to 1.
    """
    count = math.floor(length * ratio + 0.5)
    return tuple((2 * i + 1) * length // (2 * count) for i in range(count))


def replace(
    ids: Sequence[int], ratio: float, candidates: Sequence[int], generator: torch.Generator
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids with a share of them replaced by random candidates, and the replaced positions, ascending.

    A candidate is drawn for every position, used or not, so the one at a position depends neither on the length nor on
    the ratio.

    Args:
        ids: Token ids of the target.
        ratio: Share of tokens to replace, 0 to 1.
        candidates: Token ids to draw from, all equally likely.
        generator: Source of randomness.
    """
    drawn = torch.randint(len(candidates), (len(ids),), generator=generator).tolist()
    positions = replaced_positions(len(ids), ratio)
    replaced = list(ids)
    for position in positions:
        replaced[position] = candidates[drawn[position]]
    return tuple(replaced), positions
