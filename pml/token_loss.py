"""Losses of single tokens straight from hidden states, without ever holding (tokens x vocabulary) logits whole."""

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["token_losses"]

PIECE_BYTES = 16 * 2**20
"""Size of the piece of float32 logits that is held where the vocabulary is taken piece by piece: what a cache may hold,
so that the passes over it after the product cost little."""

LEAST_COLUMNS = 1024
"""Fewest entries of the vocabulary in a piece, however many tokens there are; narrower products are slower."""

ROWS_BYTES = 64 * 2**20
"""Size of the piece of float32 logits that is held where tokens are taken piece by piece. Each piece reads the whole
head from memory, so much smaller ones are slower; larger ones are not faster."""


class _LinearTokenLoss(torch.autograd.Function):
    """-log softmax(h W^T + c)[target] per token, with the gradient by h computed while the logits are at hand.

    The gradient of token t's loss by h_t does not depend on what the loss is multiplied with later, so (d) numbers a
    token are kept for the backward pass in place of (vocabulary).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        gradient_above: float | None,
    ) -> tuple[Tensor, Tensor]:
        gradient: Tensor | None
        if ctx.needs_input_grad[0] and gradient_above is not None:
            losses, best, gradient = _by_rows(hidden, weight, bias, targets, gradient_above)
        else:
            losses, best, gradient = _by_vocabulary(hidden, weight, bias, targets, ctx.needs_input_grad[0])
        correct = best == targets
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(correct)
        return losses, correct

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_losses: Tensor, _: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        if gradient is None:
            return None, None, None, None, None
        return (gradient * grad_losses[:, None]).to(gradient.dtype), None, None, None, None


def _by_vocabulary(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Losses, argmax and gradient of all tokens in one pass over pieces of the vocabulary.

    The softmax is accumulated relative to the highest logit so far; a higher one shrinks what came before it.
    """
    tokens, vocabulary = len(targets), len(weight)
    highest = torch.full((tokens, 1), -torch.inf, device=hidden.device)
    total, target_logit = torch.zeros_like(highest), torch.zeros_like(highest)
    best = torch.zeros_like(targets)
    expected = torch.zeros(hidden.shape, device=hidden.device) if needs_grad else None
    columns = max(LEAST_COLUMNS, PIECE_BYTES // (4 * max(tokens, 1)))
    for start in range(0, vocabulary, columns):
        piece = weight[start : start + columns]
        # Matrix products in the model's dtype, everything after them in float32.
        logits = nn.functional.linear(hidden, piece, None if bias is None else bias[start : start + columns]).float()
        place = targets[:, None] - start
        here = (place >= 0) & (place < len(piece))
        target_logit = torch.where(here, logits.gather(-1, place.clamp(0, len(piece) - 1)), target_logit)
        highest_here, best_here = logits.max(dim=-1, keepdim=True)
        best = torch.where(highest_here > highest, best_here + start, best[:, None]).squeeze(-1)
        before, highest = highest, torch.maximum(highest, highest_here)
        shrink = (before - highest).exp_()
        exponentials = logits.sub_(highest).exp_()
        total.mul_(shrink).add_(exponentials.sum(dim=-1, keepdim=True))
        if expected is not None:
            expected.mul_(shrink).add_(exponentials.to(weight.dtype) @ piece)
        # Before the next piece is made; a name would hold this one until then.
        del logits, exponentials
    losses = (total.log() + highest - target_logit).squeeze(-1)
    if expected is None:
        return losses, best, None
    # softmax(logits) W - W[target], with the division by the total after the product, where it is cheap.
    return losses, best, expected.div_(total).sub_(weight[targets]).to(hidden.dtype)


def _by_rows(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, gradient_above: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The same piece of tokens by piece of tokens, so that each loss is known before its gradient has to be made."""
    losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
    best = torch.empty_like(targets)
    gradient = torch.zeros_like(hidden)
    rows = max(16, ROWS_BYTES // (4 * len(weight)))
    for start in range(0, len(targets), rows):
        piece = slice(start, start + rows)
        logits = nn.functional.linear(hidden[piece], weight, bias).float()
        highest, best_here = logits.max(dim=-1, keepdim=True)
        best[piece] = best_here.squeeze(-1)
        target_logit = logits.gather(-1, targets[piece, None]) - highest
        # From here on in place: every pass over (tokens x vocabulary) costs as much as a tenth of the product.
        exponentials = logits.sub_(highest).exp_()
        total = exponentials.sum(dim=-1, keepdim=True)
        losses[piece] = (total.log() - target_logit).squeeze(-1)
        chosen: Tensor | slice = slice(None)
        active = (losses[piece] > gradient_above).nonzero().squeeze(-1)
        # Picking rows copies them; with most of them active the copy costs more than it saves.
        if len(active) < 0.75 * len(exponentials):
            chosen = active
            exponentials, total = exponentials[active], total[active]
        expected = (exponentials.to(weight.dtype) @ weight).float() / total
        gradient[piece][chosen] = (expected - weight[targets[piece][chosen]]).to(gradient.dtype)
        del logits, exponentials
    return losses, best, gradient


def token_losses(
    hidden: Tensor, head: nn.Linear, targets: Tensor, gradient_above: float | None = None
) -> tuple[Tensor, Tensor]:
    """Negative log-probability of each target token in nats, and whether it is the argmax.

    Softmax and loss are float32 whatever the dtype of the hidden states; the gradient flows to the hidden states only,
    never to the (frozen) head.

    Args:
        hidden: (N, d) final hidden states, one for each target token.
        head: The LM head, (vocabulary, d).
        targets: (N,) ids of the target tokens.
        gradient_above: Tokens with a loss up to this may be given a gradient of zero, since their weight will be zero.

    Returns:
        Losses (N,) float32 and correctness (N,) bool.
    """
    return _LinearTokenLoss.apply(hidden, head.weight, head.bias, targets, gradient_above)
