"""Tokens that the output head cannot tell apart."""

import torch
from torch import nn

from pml.output_rows import tokens_with_equal_rows


def head_of(weight: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Linear:
    head = nn.Linear(weight.shape[1], len(weight), bias=bias is not None)
    with torch.no_grad():
        head.weight.copy_(weight)
        if bias is not None:
            head.bias.copy_(bias)
    return head


def rows() -> torch.Tensor:
    weight = torch.randn(6, 12, generator=torch.Generator().manual_seed(1))
    weight[4] = weight[1]
    weight[5] = weight[2]
    weight[5, 11] += 1e-3  # Equal in the columns that rows are sorted by, and not in the last.
    return weight


def test_a_token_whose_row_is_anothers_is_found_with_that_token() -> None:
    assert tokens_with_equal_rows(head_of(rows()), range(6)) == {1: 4, 4: 1}


def test_only_the_tokens_that_were_asked_for_are_looked_at() -> None:
    assert tokens_with_equal_rows(head_of(rows()), {0, 1, 2}) == {1: 4}
    assert tokens_with_equal_rows(head_of(rows()), set()) == {}


def test_a_bias_tells_equal_rows_apart() -> None:
    bias = torch.tensor([0.0, 0.5, 0.0, 0.0, 0.5, 0.0])
    assert tokens_with_equal_rows(head_of(rows(), bias), range(6)) == {1: 4, 4: 1}
    bias[4] = 0.25
    assert tokens_with_equal_rows(head_of(rows(), bias), range(6)) == {}


def test_sixteen_bit_rows_are_compared_as_they_are() -> None:
    assert tokens_with_equal_rows(head_of(rows()).to(torch.bfloat16), [4]) == {4: 1}
