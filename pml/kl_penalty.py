"""A penalty on what training does to other text: the KL divergence from the frozen model on ordinary passages.

It complements `pml.guard`: the guard limits what an adapter can read, the penalty unlearns what it still does to text
that the corpus knows nothing of. Passages are those of `pml.ordinary_text`; the distribution that they should keep is
the frozen model's own, so no text has to be true or well written (knowledge distillation, arXiv 1503.02531, with the
model as its own teacher).
"""

from dataclasses import dataclass, replace

import torch
from lightning.pytorch import Trainer
from peft import PeftModel
from torch import Tensor

from pml.backbone import Backbone
from pml.corpus import Example, collate
from pml.errors import InputError
from pml.frozen_layers import FrozenLayers, on_device
from pml.ordinary_text import guard_passages, text_examples
from pml.scoring import target_logits

__all__ = ["KlPenalty", "KlPenaltyConfig", "kl_divergence", "turn_of"]


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


def turn_of(trainer: Trainer, batch_idx: int) -> int:
    """Number of a micro-batch, counted over ranks and steps. It follows from the step: checkpoints need not hold it."""
    per_step = trainer.accumulate_grad_batches
    turn = trainer.global_step * per_step + batch_idx % per_step
    return turn * trainer.world_size + trainer.global_rank


class KlPenalty:
    """Divergence from the frozen model on a few passages at a time.

    Args:
        config: How much text.
        backbone: Whose tokenizer and context the passages have to fit.
        seed: Of the order of passages.

    Attributes:
        passages: All of them, in the order in which they are drawn.
    """

    def __init__(self, config: KlPenaltyConfig, backbone: Backbone, seed: int) -> None:
        passages = guard_passages(config.text)
        examples = text_examples(passages, backbone.tokenizer, backbone.max_positions, backbone.vocab_size)
        if not examples:
            raise InputError("kl_penalty.text: no passage fits into the backbone's context; expected shorter ones")
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed % 2**63)).tolist()
        self.passages = [replace(examples[i], target_ids=examples[i].target_ids[: config.tokens]) for i in order]
        self._each = min(config.passages, len(examples))

    def chosen(self, turn: int) -> list[Example]:
        """The passages of a micro-batch, in a fixed order and from the start again after the last.

        Args:
            turn: See `turn_of`.
        """
        first = turn * self._each
        return [self.passages[(first + i) % len(self.passages)] for i in range(self._each)]

    def loss(self, frozen_layers: FrozenLayers, model: PeftModel, turn: int) -> Tensor:
        """Divergence in nats per token on the passages of a micro-batch.

        Args:
            frozen_layers: The adapted model, cut where its frozen layers end.
            model: The same model whole.
            turn: See `turn_of`.
        """
        batch = on_device(collate(self.chosen(turn)), model.device)
        with torch.no_grad(), model.disable_adapter():
            frozen = target_logits(frozen_layers, model, batch)
        return kl_divergence(frozen, target_logits(frozen_layers, model, batch))
