"""Losses of single tokens straight from hidden states, without ever holding (tokens x vocabulary) logits whole."""

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["CHUNK_BYTES", "token_losses"]

CHUNK_BYTES = 64 * 2**20
"""Size of the largest piece of float32 logits held at once. Each piece reads the whole head from memory, so much
smaller ones are slower; larger ones are not faster."""


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
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        correct = torch.empty(len(targets), dtype=torch.bool, device=hidden.device)
        needs_grad = ctx.needs_input_grad[0]
        gradient = torch.zeros_like(hidden) if needs_grad else None
        for start in range(0, len(targets), chunk):
            piece = slice(start, start + chunk)
            # Matrix products in the model's dtype, everything after them in float32.
            logits = nn.functional.linear(hidden[piece], weight, bias).float()
            highest, best = logits.max(dim=-1, keepdim=True)
            correct[piece] = best.squeeze(-1) == targets[piece]
            target_logit = logits.gather(-1, targets[piece, None]) - highest
            # From here on in place: every pass over (tokens x vocabulary) costs as much as a tenth of the product.
            exponentials = logits.sub_(highest).exp_()
            total = exponentials.sum(dim=-1, keepdim=True)
            losses[piece] = (total.log() - target_logit).squeeze(-1)
            if gradient is None:
                continue
            rows: Tensor | slice = slice(None)
            if gradient_above is not None:
                active = (losses[piece] > gradient_above).nonzero().squeeze(-1)
                # Picking rows copies them; with most of them active the copy costs more than it saves.
                if len(active) < 0.75 * len(exponentials):
                    rows = active
                    exponentials, total = exponentials[rows], total[rows]
            # softmax(logits) W - W[target], with the division by the total after the product, where it is cheap.
            expected = (exponentials.to(weight.dtype) @ weight).float() / total
            gradient[piece][rows] = (expected - weight[targets[piece][rows]]).to(gradient.dtype)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(correct)
        return losses, correct

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_losses: Tensor, _: Tensor) -> tuple[Tensor | None, None, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        if gradient is None:
            return None, None, None, None, None, None
        return (gradient * grad_losses[:, None]).to(gradient.dtype), None, None, None, None, None


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
    chunk = max(16, CHUNK_BYTES // (4 * head.weight.shape[0]))
    return _LinearTokenLoss.apply(hidden, head.weight, head.bias, targets, gradient_above, chunk)
