"""Losses computed without the full logits equal cross-entropy, in value and gradient."""

import math

import pytest
import torch
from torch import nn

import pml.token_loss
from pml.token_loss import token_losses


def plain(hidden: torch.Tensor, head: nn.Linear, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(head(hidden).float(), targets, reduction="none")


@pytest.fixture
def problem() -> tuple[torch.Tensor, nn.Linear, torch.Tensor]:
    head = nn.Linear(24, 300, bias=False)
    head.weight.data.normal_().requires_grad_(False)
    return torch.randn(70, 24, requires_grad=True), head, torch.randint(300, (70,))


@pytest.mark.parametrize("above", [None, -1.0], ids=["by vocabulary", "by rows"])
@pytest.mark.parametrize("piece_bytes", [1, 4 * 70 * 33, 2**30])
def test_losses_and_gradients_equal_cross_entropy_for_any_piece_size(
    piece_bytes: int,
    above: float | None,
    problem: tuple[torch.Tensor, nn.Linear, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pml.token_loss, "PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(pml.token_loss, "ROWS_BYTES", piece_bytes)
    monkeypatch.setattr(pml.token_loss, "LEAST_COLUMNS", 7)
    hidden, head, targets = problem
    weights = torch.rand(70)
    losses, correct, *_ = token_losses(hidden, head, targets, above)
    (gradient,) = torch.autograd.grad((losses * weights).sum(), hidden)
    expected = plain(hidden, head, targets)
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), hidden)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-5)
    assert torch.equal(correct, head(hidden).argmax(-1) == targets)


@pytest.mark.parametrize("above", [None, 3.0], ids=["by vocabulary", "by rows"])
@pytest.mark.parametrize("piece_bytes", [1, 4 * 70 * 33, 2**30])
def test_the_margin_is_measured_against_the_best_other_token_for_any_piece_size(
    piece_bytes: int,
    above: float | None,
    problem: tuple[torch.Tensor, nn.Linear, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pml.token_loss, "PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(pml.token_loss, "ROWS_BYTES", piece_bytes)
    monkeypatch.setattr(pml.token_loss, "LEAST_COLUMNS", 7)
    hidden, head, targets = problem
    logits = head(hidden).detach()
    # Half of the targets are the argmax, so that margins of both signs occur.
    targets = torch.where(torch.arange(70) < 35, logits.argmax(-1), targets)
    scored = token_losses(hidden, head, targets, above)
    others = logits.scatter(1, targets[:, None], -torch.inf)
    torch.testing.assert_close(scored.margin, logits.gather(1, targets[:, None])[:, 0] - others.amax(1))
    assert torch.equal(scored.rival, others.argmax(1))
    assert scored.correct[:35].all()
    assert torch.equal(scored.margin > 0, scored.correct)


def test_no_token_is_correct_if_a_logit_is_nan() -> None:
    head = nn.Linear(1, 3, bias=False).requires_grad_(False)
    head.weight.copy_(torch.tensor([[1.0], [torch.nan], [2.0]]))
    scored = token_losses(torch.ones(3, 1), head, torch.arange(3))
    assert not scored.correct.any()
    assert scored.losses.isnan().all()


def test_the_lowest_id_of_equal_logits_is_the_argmax_even_across_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pml.token_loss, "PIECE_BYTES", 1)
    monkeypatch.setattr(pml.token_loss, "LEAST_COLUMNS", 2)
    head = nn.Linear(2, 6, bias=False).requires_grad_(False)
    head.weight.copy_(torch.tensor([[0.0, 0], [3, 0], [1, 0], [3, 0], [0, 0], [3, 0]]))
    losses, correct, *_ = token_losses(torch.tensor([[1.0, 0], [1, 0]]), head, torch.tensor([1, 3]))
    # exp: 1, e^3, e, e^3, 1, e^3 -> -log(e^3 / (2 + e + 3 e^3)) = log(3 + (2 + e) / e^3)
    torch.testing.assert_close(losses, torch.full((2,), 1.1740009))
    assert correct.tolist() == [True, False]


def test_logits_too_large_to_exponentiate_in_float32_give_finite_losses_and_gradients() -> None:
    head = nn.Linear(1, 3, bias=False).requires_grad_(False)
    head.weight.copy_(torch.tensor([[1.0], [-1.0], [2.0]]))
    hidden = torch.tensor([[1000.0]], requires_grad=True)
    losses, *_ = token_losses(hidden, head, torch.tensor([0]))
    losses.sum().backward()
    assert losses.item() == 1000.0
    assert hidden.grad is not None
    assert hidden.grad.item() == 1.0  # softmax W - W[target] = 2 - 1


def test_losses_of_a_head_with_bias_equal_cross_entropy(problem: tuple[torch.Tensor, nn.Linear, torch.Tensor]) -> None:
    hidden, _, targets = problem
    head = nn.Linear(24, 300).requires_grad_(False)
    torch.testing.assert_close(token_losses(hidden, head, targets)[0], plain(hidden, head, targets))


@pytest.mark.parametrize("above", [0.01, 3.0, 6.0, 1e9])
def test_tokens_with_a_loss_above_the_bound_keep_their_exact_gradient(
    above: float, problem: tuple[torch.Tensor, nn.Linear, torch.Tensor]
) -> None:
    hidden, head, targets = problem
    losses, *_ = token_losses(hidden, head, targets, gradient_above=above)
    (gradient,) = torch.autograd.grad((losses * (losses.detach() > above)).sum(), hidden)
    expected = plain(hidden, head, targets)
    (expected_gradient,) = torch.autograd.grad((expected * (expected.detach() > above)).sum(), hidden)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("nans", [1, 4])
def test_a_loss_that_is_not_a_number_reaches_the_gradient_however_few_tokens_are_active(nans: int) -> None:
    head = nn.Linear(24, 300, bias=False).requires_grad_(False)
    hidden = torch.randn(5, 24)
    hidden[:nans] = math.nan
    hidden.requires_grad_()
    losses, *_ = token_losses(hidden, head, torch.arange(5), gradient_above=1e9)
    losses.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad[:nans].isnan().all()


def test_a_bfloat16_head_gives_float32_losses_and_bfloat16_gradients() -> None:
    head = nn.Linear(24, 300, bias=False).to(torch.bfloat16).requires_grad_(False)
    hidden = torch.randn(9, 24, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(300, (9,))
    losses, *_ = token_losses(hidden, head, targets)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, plain(hidden, head, targets))
    losses.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16


def test_without_target_tokens_there_are_no_losses_and_the_gradient_is_zero() -> None:
    head = nn.Linear(4, 8, bias=False).requires_grad_(False)
    hidden = torch.randn(3, 4, requires_grad=True)
    losses, correct, *_ = token_losses(hidden[:0], head, torch.empty(0, dtype=torch.long))
    losses.sum().backward()
    assert losses.shape == correct.shape == (0,)
    assert hidden.grad is not None
    assert not hidden.grad.any()
