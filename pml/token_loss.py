"""Losses of single tokens straight from hidden states, without ever holding (tokens x vocabulary) logits whole."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pml.devices import runs_ahead

__all__ = ["TokenLosses", "against_the_rest", "is_argmax", "token_losses"]

PIECE_BYTES = 16 * 2**20
"""Size of the piece of float32 logits that is held where the vocabulary is taken piece by piece: what a CPU's cache may
hold, so that the passes over it after the product cost little."""

LARGE_PIECE_BYTES = 256 * 2**20
"""The same on devices where each piece costs the launch of some twenty kernels, and memory is as fast as a cache."""

LEAST_COLUMNS = 1024
"""Fewest entries of the vocabulary in a piece, however many tokens there are; narrower products are slower."""

ROWS_BYTES = 64 * 2**20
"""Size of the piece of float32 logits that is held where tokens are taken piece by piece. Each piece reads the whole
head from memory, so much smaller ones are slower; larger ones are not faster."""


class TokenLosses(NamedTuple):
    """N target tokens against everything else that could stand in their place.

    Attributes:
        losses: (N,) float32, negative log-probability in nats.
        correct: (N,) bool, whether the target token is the argmax; of two equal logits the first is.
        margin: (N,) float32, its logit minus that of the best other token: negative where that one wins.
        rival: (N,) int64, id of the best other token.
    """

    losses: Tensor
    correct: Tensor
    margin: Tensor
    rival: Tensor


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
    ) -> tuple[Tensor, Tensor, Tensor]:
        gradient: Tensor | None
        # Which tokens need a gradient is known only by a look: it saves a product, and costs a wait at every piece.
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


def against_the_rest(logits: Tensor, place: Tensor, here: Tensor | bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """The target's logit, the best other one and where that stands, in the one pass that the argmax takes anyway.

    Args:
        logits: (N, V), hidden for a moment where the target stands; as they were afterwards.
        place: (N, 1) columns of the targets.
        here: (N, 1) bool, whether the target is in these columns at all; its logit is -inf where it is not.

    Returns:
        Three tensors (N, 1): the target's logit, the highest other one, and its column.
    """
    own = logits.gather(-1, place)
    nothing = torch.full_like(own, -torch.inf)
    logits.scatter_(-1, place, nothing if here is True else torch.where(here, nothing, own))  # type: ignore[arg-type]
    other, rival = logits.max(dim=-1, keepdim=True)
    logits.scatter_(-1, place, own)
    return own if here is True else torch.where(here, own, nothing), other, rival  # type: ignore[arg-type]


def _by_vocabulary(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Losses, margins, rivals and gradient of all tokens in one pass over pieces of the vocabulary.

    The softmax is accumulated relative to the highest logit so far; a higher one shrinks what came before it.
    """
    tokens, vocabulary = len(targets), len(weight)
    # Float32 by name: whoever changes torch's default dtype means other tensors.
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
        own, other, rival_here = against_the_rest(logits, place.clamp(0, len(piece) - 1), here)
        rival = torch.where(other > best_other, rival_here + start, rival)
        target_logit, best_other = torch.maximum(target_logit, own), torch.maximum(best_other, other)
        before, highest = highest, torch.maximum(target_logit, best_other)
        shrink = (before - highest).exp_()
        exponentials = logits.sub_(highest).exp_()
        total.mul_(shrink).add_(exponentials.sum(dim=-1, keepdim=True))
        if expected is not None:
            expected.mul_(shrink).add_(exponentials.to(weight.dtype) @ piece)
        # Before the next piece is made; a name would hold this one until then.
        del logits, exponentials
    losses = (total.log() + highest - target_logit).squeeze(-1)
    margin, rival = (target_logit - best_other).squeeze(-1), rival.squeeze(-1)
    if expected is None:
        return losses, margin, rival, None
    # softmax(logits) W - W[target], with the division by the total after the product, where it is cheap.
    return losses, margin, rival, expected.div_(total).sub_(weight[targets]).to(hidden.dtype)


def _by_rows(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, gradient_above: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same piece of tokens by piece of tokens, so that each loss is known before its gradient has to be made."""
    losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
    margin, rival = torch.empty_like(losses), torch.empty_like(targets)
    gradient = torch.zeros_like(hidden)
    rows = max(16, ROWS_BYTES // (4 * len(weight)))
    for start in range(0, len(targets), rows):
        piece = slice(start, start + rows)
        logits = nn.functional.linear(hidden[piece], weight, bias).float()
        target_logit, other, rival_here = against_the_rest(logits, targets[piece, None])
        margin[piece], rival[piece] = (target_logit - other).squeeze(-1), rival_here.squeeze(-1)
        highest = torch.maximum(target_logit, other)
        target_logit = target_logit - highest
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
    return losses, margin, rival, gradient


def token_losses(hidden: Tensor, head: nn.Linear, targets: Tensor, gradient_above: float | None = None) -> TokenLosses:
    """Negative log-probability of each target token in nats, whether it is the argmax, and by what margin.

    Softmax and loss are float32 whatever the dtype of the hidden states; the gradient flows to the hidden states only,
    never to the (frozen) head.

    Args:
        hidden: (N, d) final hidden states, one for each target token.
        head: The LM head, (vocabulary, d).
        targets: (N,) ids of the target tokens.
        gradient_above: Tokens with a loss up to this may be given a gradient of zero, since their weight will be zero.
    """
    losses, margin, rival = _LinearTokenLoss.apply(hidden, head.weight, head.bias, targets, gradient_above)
    return TokenLosses(losses, is_argmax(margin, rival, targets), margin, rival)


def is_argmax(margin: Tensor, rival: Tensor, targets: Tensor) -> Tensor:
    """(N,) bool, whether the target tokens win: of two equal logits the first does, and nothing wins without a logit.

    Args:
        margin: (N,) the target's logit minus the best other one.
        rival: (N,) id of the best other token.
        targets: (N,) ids of the target tokens.
    """
    return (margin > 0) | ((margin == 0) & (targets < rival))
