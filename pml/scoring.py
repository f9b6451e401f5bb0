"""Token scores of a batch under teacher forcing, by example and position."""

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from pml.corpus import IGNORE_INDEX
from pml.frozen_layers import FrozenLayers
from pml.token_loss import TokenLosses, against_the_rest, is_argmax, token_losses
from pml.weighting import TokenScores

__all__ = ["score_batch"]


def score_batch(
    frozen_layers: FrozenLayers, model: PeftModel, batch: dict[str, Any], gradient_above: float | None = None
) -> TokenScores:
    """Loss of every target token in nats under teacher forcing, and whether its argmax is right.

    Args:
        frozen_layers: The adapted model, cut where its frozen layers end.
        model: The same model whole, for heads that cap or scale their logits.
        batch: B examples as `pml.corpus.collate` gives them, on the model's device.
        gradient_above: See `pml.token_loss.token_losses`.
    """
    labels = batch["labels"][:, 1:]
    if labels.shape[1] == 0:
        labels = torch.full_like(batch["labels"], IGNORE_INDEX)
    supervised = labels != IGNORE_INDEX
    targets = labels[supervised]
    if frozen_layers.head is not None:
        hidden = frozen_layers.final_hidden(batch)[supervised]
        scored = token_losses(hidden, frozen_layers.head, targets, gradient_above)
    else:
        # A head that caps or scales its logits is asked as a whole.
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, : labels.shape[1]]
        logits = logits[supervised].float()
        losses = nn.functional.cross_entropy(logits, targets, reduction="none")
        own, other, rival = (t.squeeze(-1) for t in against_the_rest(logits.detach().clone(), targets[:, None]))
        scored = TokenLosses(losses, is_argmax(own - other, rival, targets), own - other, rival)
    return _by_target(scored, supervised, batch["example_id"])


def _by_target(scored: TokenLosses, supervised: Tensor, example_id: Tensor) -> TokenScores:
    """Lay the scores of N supervised tokens out as (B, L), column t for the t-th target token of a row."""
    lengths = supervised.sum(dim=1)
    mask = torch.arange(supervised.shape[1], device=lengths.device) < lengths[:, None]

    def table(values: Tensor) -> Tensor:
        return values.new_zeros(mask.shape).masked_scatter(mask, values)

    losses, correct, margin, rival = map(table, scored)
    return TokenScores(losses, correct, mask, example_id, margin, rival)
