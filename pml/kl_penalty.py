"""A penalty on what training does to other text: the KL divergence from the frozen model on ordinary passages.

It complements `pml.guard`: the guard limits what an adapter can read, the penalty unlearns what it still does to text
that the corpus knows nothing of. Passages are those of `pml.ordinary_text`; the distribution that they should keep is
the frozen model's own, so no text has to be true or well written (knowledge distillation, arXiv 1503.02531, with the
model as its own teacher).
"""

from dataclasses import dataclass, replace

import torch
from peft import PeftModel
from torch import Tensor

from pml.backbone import Backbone
from pml.corpus import Example, collate
from pml.errors import InputError
from pml.frozen_layers import FrozenLayers, content_keys
from pml.ordinary_text import guard_passages, text_examples
from pml.scoring import target_logits

__all__ = ["KlPenalty", "KlPenaltyConfig", "kl_divergence"]


@dataclass
class KlPenaltyConfig:
    """How much training may change the model on ordinary text.

    Args:
        weight: Factor of the divergence in the loss; both are nats per token.
        passages: Passages in each micro-batch, drawn in turn. Four of 64 tokens cost twice as much as two of 32, and
            did not spare more.
        tokens: Most tokens of each.
        text: Files of ordinary text in UTF-8; null takes the prose, code and chats that ship.
    """

    weight: float = 16.0
    passages: int = 2
    tokens: int = 32
    text: str | list[str] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise InputError(f"kl_penalty.weight is {self.weight}; expected a number above 0, or kl_penalty: null")
        for name, value in (("passages", self.passages), ("tokens", self.tokens)):
            if value < 1:
                raise InputError(f"kl_penalty.{name} is {value}; expected at least 1")


def kl_divergence(frozen: Tensor, adapted: Tensor) -> Tensor:
    """KL(frozen || adapted) in nats, the mean over N tokens; float32 whatever the logits are.

    Args:
        frozen: Logits (N, V) of the frozen model.
        adapted: Logits (N, V), through which the gradient flows.
    """
    log_p, log_q = (logits.float().log_softmax(dim=-1) for logits in (frozen, adapted))
    return torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


class KlPenalty:
    """Divergence from the frozen model on a few passages at a time.

    Args:
        config: How much text.
        backbone: Whose tokenizer and context the passages have to fit.
        seed: Of the order of passages.
    """

    def __init__(self, config: KlPenaltyConfig, backbone: Backbone, seed: int) -> None:
        examples = text_examples(guard_passages(config.text), backbone.tokenizer, backbone.max_positions)
        examples = [e for e in examples if max(e.prompt_ids + e.target_ids) < backbone.vocab_size]
        if not examples:
            raise InputError("kl_penalty.text: no passage fits into the backbone's context; expected shorter ones")
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed % 2**63)).tolist()
        self._passages = [replace(examples[i], target_ids=examples[i].target_ids[: config.tokens]) for i in order]
        self._each = min(config.passages, len(examples))

    def chosen(self, turn: int) -> list[Example]:
        """The passages of a micro-batch, in a fixed order and from the start again after the last.

        Args:
            turn: Number of the micro-batch, counted over ranks and steps.
        """
        first = turn * self._each
        return [self._passages[(first + i) % len(self._passages)] for i in range(self._each)]

    def loss(self, frozen_layers: FrozenLayers, model: PeftModel, turn: int) -> Tensor:
        """Divergence in nats per token on the passages of a micro-batch.

        Args:
            frozen_layers: The adapted model, cut where its frozen layers end.
            model: The same model whole.
            turn: See `chosen`.
        """
        batch = collate(self.chosen(turn))
        keys = content_keys(batch["input_ids"], batch["lengths"])
        on_device = {name: value.to(model.device, non_blocking=True) for name, value in batch.items()}
        with torch.no_grad(), model.disable_adapter():
            frozen = target_logits(frozen_layers, model, {**on_device, "keys": keys})
        return kl_divergence(frozen, target_logits(frozen_layers, model, {**on_device, "keys": keys}))
