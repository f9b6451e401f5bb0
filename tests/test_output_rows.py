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
    weight[5, 11] += 1e-3  # Equal in the leading columns, which are compared first, but not in the last one.
    return weight


def test_a_token_with_the_row_of_another_is_mapped_to_that_token() -> None:
    assert tokens_with_equal_rows(head_of(rows()), range(6)) == {1: 4, 4: 1}


def test_only_the_given_tokens_are_checked() -> None:
    assert tokens_with_equal_rows(head_of(rows()), {0, 1, 2}) == {1: 4}
    assert tokens_with_equal_rows(head_of(rows()), set()) == {}


def test_different_biases_tell_equal_rows_apart() -> None:
    bias = torch.tensor([0.0, 0.5, 0.0, 0.0, 0.5, 0.0])
    assert tokens_with_equal_rows(head_of(rows(), bias), range(6)) == {1: 4, 4: 1}
    bias[4] = 0.25
    assert tokens_with_equal_rows(head_of(rows(), bias), range(6)) == {}


def test_equal_rows_of_a_bfloat16_head_are_found() -> None:
    assert tokens_with_equal_rows(head_of(rows()).to(torch.bfloat16), [4]) == {4: 1}
