"""Tokens that no adapter can tell apart, because their rows in the output head are equal."""

from collections.abc import Iterable

import torch
from torch import nn

__all__ = ["tokens_with_equal_rows"]

COLUMNS = 8
"""Leading columns that are compared first: trained rows differ there, which leaves few rows to compare in full."""


def tokens_with_equal_rows(head: nn.Linear, tokens: Iterable[int]) -> dict[int, int]:
    """Map each given token whose logit always equals another token's to that other token.

    Such a token has a probability of at most 0.5, and greedy decoding may choose the other. Vocabularies contain a few
    tokens that were never trained, and quantisation makes their rows equal.

    Args:
        head: The output head, (vocabulary, hidden).
        tokens: Ids of the tokens to check.
    """
    weight, bias = head.weight.detach(), head.bias
    _, group, size = torch.unique(weight[:, :COLUMNS].float(), dim=0, return_inverse=True, return_counts=True)
    suspects = set((size[group] > 1).nonzero().flatten().tolist())
    found = {}
    for token in suspects.intersection(tokens):
        rows = (group == group[token]).nonzero().flatten()
        alike = (weight[rows] == weight[token]).all(dim=1) & (rows != token)
        if bias is not None:
            alike &= bias[rows] == bias[token]
        if alike.any():
            found[token] = int(rows[alike][0])
    return found
