"""Tokens that no adapter can tell apart, since their rows in the output head are the same."""

from collections.abc import Iterable

import torch
from torch import nn

__all__ = ["tokens_with_equal_rows"]

COLUMNS = 8
"""By which rows are sorted first: trained rows differ in these, and few are then left to compare whole."""


def tokens_with_equal_rows(head: nn.Linear, tokens: Iterable[int]) -> dict[int, int]:
    """Those of some tokens whose logits always equal another token's, and that token.

    Such a token has a probability of 0.5 at most, and greedy decoding may take the other. Vocabularies hold a few that
    were never trained, and quantising makes their rows equal.

    Args:
        head: The output head, (vocabulary, hidden).
        tokens: Token ids.
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
