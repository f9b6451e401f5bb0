"""Per-token losses straight from hidden states, without ever holding all (tokens x vocabulary) logits at once."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pml.devices import runs_ahead

__all__ = ["TokenLosses", "is_argmax", "target_and_best_rival", "token_losses"]

PIECE_BYTES = 16 * 2**20
"""Size of a piece of float32 logits in the pass over the vocabulary. It fits a CPU's cache, so that the elementwise
passes after the product are cheap."""

LARGE_PIECE_BYTES = 256 * 2**20
"""The same on accelerators, where each piece costs about twenty kernel launches and memory is as fast as a cache."""

LEAST_COLUMNS = 1024
"""Fewest vocabulary entries in a piece, whatever the number of tokens; narrower products are slower."""

ROWS_BYTES = 64 * 2**20
"""Size of a piece of float32 logits in the pass over tokens. Each piece reads the whole head from memory, so much
smaller pieces are slower; larger ones are not faster."""


class TokenLosses(NamedTuple):
    """Scores of N target tokens against all other tokens of the vocabulary.

    Attributes:
        losses: (N,) float32, negative log-probability in nats.
        correct: (N,) bool, whether the target token is the argmax; of two equal logits, the lower id wins.
        margin: (N,) float32, its logit minus that of the best other token; negative if the other token wins.
        rival: (N,) int64, id of the best other token.
    """

    losses: Tensor
    correct: Tensor
    margin: Tensor
    rival: Tensor


class _LinearTokenLoss(torch.autograd.Function):
    """-log softmax(h W^T + c)[target] per token, with the gradient by h computed in the forward pass.

    Weights applied to the losses later only scale the gradient of token t's loss by h_t. So the backward pass needs d
    numbers per token instead of one per vocabulary entry.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        gradient_above: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        gradient: Tensor | None
        # Skipping tokens saves part of a product, but reading which ones makes an accelerator wait at every piece.
        if ctx.needs_input_grad[0] and gradient_above is not None and not runs_ahead(hidden.device):
            losses, margin, rival, gradient = _by_rows(hidden, weight, bias, targets, gradient_above)
        else:
            losses, margin, rival, gradient = _by_vocabulary(hidden, weight, bias, targets, ctx.needs_input_grad[0])
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(margin, rival)
        return losses, margin, rival

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_losses: Tensor, *_: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        if gradient is None:
            return None, None, None, None, None
        return (gradient * grad_losses[:, None]).to(gradient.dtype), None, None, None, None


def target_and_best_rival(logits: Tensor, place: Tensor, here: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The target's logit, the best other logit and its column, at the cost of a single argmax.

    Args:
        logits: (N, V); the target's logit is masked in place during the call and restored afterwards.
        place: (N, 1) columns of the targets.
        here: (N, 1) bool, whether the target is among these columns; if not, its logit is returned as -inf. None: all.

    Returns:
        Three tensors (N, 1): the target's logit, the highest other one, and its column.
    """
    own = logits.gather(-1, place)
    nothing = torch.full_like(own, -torch.inf)
    here = torch.ones_like(place, dtype=torch.bool) if here is None else here
    logits.scatter_(-1, place, nothing.where(here, own))
    other, rival = logits.max(dim=-1, keepdim=True)
    logits.scatter_(-1, place, own)
    return own.where(here, nothing), other, rival


def _by_vocabulary(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Losses, margins, rivals and gradient of all tokens in one pass over pieces of the vocabulary.

    The softmax is accumulated relative to the highest logit so far; a higher one shrinks what came before it.
    """
    tokens, vocabulary = len(targets), len(weight)
    # Explicitly float32, whatever torch's default dtype is.
    highest = torch.full((tokens, 1), -torch.inf, dtype=torch.float32, device=hidden.device)
    total, target_logit, best_other = torch.zeros_like(highest), highest.clone(), highest.clone()
    rival = torch.zeros_like(targets)[:, None]
    expected = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device) if needs_grad else None
    piece_bytes = LARGE_PIECE_BYTES if runs_ahead(hidden.device) else PIECE_BYTES
    columns = max(LEAST_COLUMNS, piece_bytes // (4 * max(tokens, 1)))
    for start in range(0, vocabulary, columns):
        piece = weight[start : start + columns]
        # Matrix products in the model's dtype, everything after them in float32.
        logits = nn.functional.linear(hidden, piece, None if bias is None else bias[start : start + columns]).float()
        place = targets[:, None] - start
        here = (place >= 0) & (place < len(piece))
        own, other, rival_here = target_and_best_rival(logits, place.clamp(0, len(piece) - 1), here)
        rival = torch.where(other > best_other, rival_here + start, rival)
        target_logit, best_other = torch.maximum(target_logit, own), torch.maximum(best_other, other)
        before, highest = highest, torch.maximum(target_logit, best_other)
        shrink = (before - highest).exp_()
        exponentials = logits.sub_(highest).exp_()
        total.mul_(shrink).add_(exponentials.sum(dim=-1, keepdim=True))
        if expected is not None:
            expected.mul_(shrink).add_(exponentials.to(weight.dtype) @ piece)
        # Free this piece before the next one is allocated.
        del logits, exponentials
    losses = (total.log() + highest - target_logit).squeeze(-1)
    margin, rival = (target_logit - best_other).squeeze(-1), rival.squeeze(-1)
    if expected is None:
        return losses, margin, rival, None
    # softmax(logits) W - W[target]; dividing by the total is cheaper after the product.
    return losses, margin, rival, expected.div_(total).sub_(weight[targets]).to(hidden.dtype)


def _by_rows(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, gradient_above: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same in pieces of tokens, so that each loss is known before its gradient is computed."""
    losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
    margin, rival = torch.empty_like(losses), torch.empty_like(targets)
    gradient = torch.zeros_like(hidden)
    rows = max(16, ROWS_BYTES // (4 * len(weight)))
    for start in range(0, len(targets), rows):
        piece = slice(start, start + rows)
        logits = nn.functional.linear(hidden[piece], weight, bias).float()
        target_logit, other, rival_here = target_and_best_rival(logits, targets[piece, None])
        margin[piece], rival[piece] = (target_logit - other).squeeze(-1), rival_here.squeeze(-1)
        highest = torch.maximum(target_logit, other)
        target_logit = target_logit - highest
        # In place: every further pass over (tokens x vocabulary) costs a tenth of the product.
        exponentials = logits.sub_(highest).exp_()
        total = exponentials.sum(dim=-1, keepdim=True)
        losses[piece] = (total.log() - target_logit).squeeze(-1)
        chosen: Tensor | slice = slice(None)
        # Written so that a NaN is active: it must reach the adapter, whichever path a device takes.
        active = (~(losses[piece] <= gradient_above)).nonzero().squeeze(-1)
        # Selecting rows copies them; if most are active, the copy costs more than it saves.
        if len(active) < 0.75 * len(exponentials):
            chosen = active
            exponentials, total = exponentials[active], total[active]
        expected = (exponentials.to(weight.dtype) @ weight).float() / total
        gradient[piece][chosen] = (expected - weight[targets[piece][chosen]]).to(gradient.dtype)
        del logits, exponentials
    return losses, margin, rival, gradient


def token_losses(hidden: Tensor, head: nn.Linear, targets: Tensor, gradient_above: float | None = None) -> TokenLosses:
    """Negative log-probability of each target token in nats, whether it is the argmax, and by what margin.

    Softmax and loss are float32 whatever the dtype of the hidden states. The gradient flows to the hidden states only,
    never to the (frozen) head.

    Args:
        hidden: (N, d) final hidden states that predict the target tokens.
        head: The LM head, (vocabulary, d).
        targets: (N,) ids of the target tokens.
        gradient_above: Tokens with a loss up to this may get a zero gradient, because their weight will be 0.
    """
    losses, margin, rival = _LinearTokenLoss.apply(hidden, head.weight, head.bias, targets, gradient_above)
    return TokenLosses(losses, is_argmax(margin, rival, targets), margin, rival)


def is_argmax(margin: Tensor, rival: Tensor, targets: Tensor) -> Tensor:
    """Whether each target token is the argmax, (N,) bool: of two equal logits the lower id wins, and NaN never does.

    Args:
        margin: (N,) the target's logit minus the best other one.
        rival: (N,) id of the best other token.
        targets: (N,) ids of the target tokens.
    """
    return (margin > 0) | ((margin == 0) & (targets < rival))
