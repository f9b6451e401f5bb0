"""Token scores of a batch under teacher forcing."""

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from pml.frozen_layers import FrozenLayers
from pml.token_loss import TokenLosses, is_argmax, target_and_best_rival, token_losses
from pml.token_scores import TokenScores

__all__ = ["score_batch", "target_hidden", "target_logits"]


def score_batch(
    frozen_layers: FrozenLayers, model: PeftModel, batch: dict[str, Any], gradient_above: float | None = None
) -> TokenScores:
    """Scores of every target token under teacher forcing: loss in nats, argmax, logit margin and rival.

    Args:
        frozen_layers: The adapted model, split at the end of its frozen layers.
        model: The same model unsplit, for heads that cap or scale their logits.
        batch: B examples from `pml.corpus.collate`, on the model's device.
        gradient_above: See `pml.token_loss.token_losses`.
    """
    _, cells, targets = batch["supervised"]
    rows, steps = len(batch["input_ids"]), max(batch["input_ids"].shape[1] - 1, 1)
    if frozen_layers.head is not None:
        hidden = target_hidden(frozen_layers, batch)
        scored = token_losses(hidden, frozen_layers.head, targets, gradient_above)
    else:
        logits = target_logits(frozen_layers, model, batch).float()
        losses = nn.functional.cross_entropy(logits, targets, reduction="none")
        own, other, rival = (t.squeeze(-1) for t in target_and_best_rival(logits.detach().clone(), targets[:, None]))
        scored = TokenLosses(losses, is_argmax(own - other, rival, targets), own - other, rival)

    def table(values: Tensor) -> Tensor:
        return values.new_zeros(rows * steps).index_copy(0, cells, values).view(rows, steps)

    losses, correct, margin, rival = map(table, scored)
    mask = table(torch.ones_like(targets, dtype=torch.bool))
    return TokenScores(losses, correct, mask, batch["example_id"], margin, rival)


def target_logits(frozen_layers: FrozenLayers, model: PeftModel, batch: dict[str, Any]) -> Tensor:
    """Logits (N, V) at the positions that predict the N target tokens, all in memory at once; see `score_batch`."""
    if frozen_layers.head is not None:
        hidden = target_hidden(frozen_layers, batch)
        return nn.functional.linear(hidden, frozen_layers.head.weight, frozen_layers.head.bias)
    # A head that caps or scales its logits needs the whole model.
    steps = max(batch["input_ids"].shape[1] - 1, 1)
    logits: Tensor = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :steps]
    return logits.flatten(0, 1).index_select(0, batch["supervised"][0])


def target_hidden(frozen_layers: FrozenLayers, batch: dict[str, Any]) -> Tensor:
    """Final hidden states (N, d) at the positions that predict the target tokens."""
    return frozen_layers.final_hidden(batch).flatten(0, 1).index_select(0, batch["supervised"][0])
