"""The KL penalty: a loss term on ordinary text, the KL divergence of the adapted model from the frozen one.

It complements `pml.guard`: the guard limits what an adapter can read, and the penalty trains away the harm that is
left. The passages come from `pml.ordinary_text`. The target is the frozen model's own distribution, so the text need
not be true or well written (knowledge distillation, arXiv 1503.02531, with the model as its own teacher).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch import Trainer
from peft import PeftModel
from torch import Tensor, nn

from pml.backbone import Backbone
from pml.chat_template import PromptFormat
from pml.corpus import Example, collate
from pml.encoding import TextEncoder
from pml.errors import InputError
from pml.frozen_layers import FrozenLayers, on_device
from pml.ordinary_text import ordinary_passages, text_examples
from pml.scoring import target_hidden, target_logits

__all__ = ["KlPenalty", "KlPenaltyConfig", "kl_divergence", "micro_batch_index"]


@dataclass
class KlPenaltyConfig:
    """How strongly training is penalised for changing the model on ordinary text.

    Args:
        weight: Factor of the divergence in the loss; both are in nats per token.
        passages: Passages per micro-batch, drawn in turn. Four of 64 tokens took twice as long as two of 32 and did not
            reduce harm further.
        tokens: Most tokens of a passage; longer text is cut into pieces.
        text: UTF-8 files of ordinary text; null takes the packaged prose, code and chats.
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


class _Divergence(torch.autograd.Function):
    """KL(p || q) of softmax(a) and softmax(b), sum p (a - b) - ln Z_a + ln Z_b, with its gradient q - p by b.

    A pass over (N, V) costs half as much as a product with the head, so this fuses the passes that autograd would make.
    """

    @staticmethod
    def forward(ctx: Any, frozen: Tensor, adapted: Tensor) -> Tensor:
        a, b = frozen.float(), adapted.float()
        p, q = a.softmax(dim=-1), b.softmax(dim=-1)
        divergences = (p * (a - b)).sum(dim=-1) + _log_normaliser(b, q) - _log_normaliser(a, p)
        ctx.save_for_backward(q.sub_(p).div_(len(q)))
        ctx.dtype = adapted.dtype
        return divergences.mean()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        (by_adapted,) = ctx.saved_tensors
        return None, (by_adapted * gradient).to(ctx.dtype)


def _log_normaliser(logits: Tensor, probabilities: Tensor) -> Tensor:
    """ln of the sum of exp(logits), from the largest logit, whose probability is far from 0."""
    return logits.amax(dim=-1) - probabilities.amax(dim=-1).log()


def kl_divergence(frozen: Tensor, adapted: Tensor) -> Tensor:
    """KL(frozen || adapted) in nats, mean over N tokens; float32 whatever the dtype of the logits.

    Args:
        frozen: Logits (N, V) of the frozen model.
        adapted: Logits (N, V), through which the gradient flows.
    """
    divergence: Tensor = _Divergence.apply(frozen, adapted)
    return divergence


def micro_batch_index(trainer: Trainer, batch_idx: int) -> int:
    """Number of a micro-batch, counted over steps and ranks. It follows from the step: checkpoints need not hold it."""
    per_step = trainer.accumulate_grad_batches
    turn = trainer.global_step * per_step + batch_idx % per_step
    return turn * trainer.world_size + trainer.global_rank


class KlPenalty:
    """KL divergence from the frozen model, on a few passages per micro-batch.

    Args:
        config: Which text, and how much of it.
        backbone: The model, whose tokenizer and context length the passages have to fit.
        seed: Seed of the order of the passages.

    Attributes:
        passages: All passages in their order; of several groups, a last one below `config.passages` is never drawn.
    """

    def __init__(self, config: KlPenaltyConfig, backbone: Backbone, seed: int) -> None:
        passages = ordinary_passages(config.text, "guard", "penalty")
        examples = text_examples(passages, backbone.tokenizer, backbone.max_positions, backbone.vocab_size)
        first = TextEncoder(backbone.tokenizer, PromptFormat(chat_template=False)).put_before
        pieces = [piece for example in examples for piece in _pieces(example, config.tokens, first)]
        if not pieces:
            raise InputError("kl_penalty.text: no passage fits into the backbone's context; expected shorter ones")
        order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed % 2**63)).tolist()
        self.passages = [replace(pieces[i], example_id=number) for number, i in enumerate(order)]
        self._each = min(config.passages, len(pieces))
        self._hidden: dict[int, Tensor] = {}

    def chosen(self, turn: int) -> list[Example]:
        """The passages of a micro-batch, always in the same groups, since rounding depends on what shares a batch.

        Args:
            turn: See `micro_batch_index`; after the last group the first one follows again.
        """
        first = turn % (len(self.passages) // self._each) * self._each
        return self.passages[first : first + self._each]

    def loss(self, frozen_layers: FrozenLayers, model: PeftModel, turn: int) -> Tensor:
        """KL divergence in nats per token on the passages of a micro-batch.

        Args:
            frozen_layers: The adapted model, split at the cut.
            model: The same model whole.
            turn: See `micro_batch_index`.
        """
        passages = self.chosen(turn)
        batch = on_device(collate(passages), model.device)
        return kl_divergence(
            self._frozen_logits(passages, batch, frozen_layers, model), target_logits(frozen_layers, model, batch)
        )

    @torch.no_grad()
    def _frozen_logits(
        self, passages: Sequence[Example], batch: dict[str, Any], frozen_layers: FrozenLayers, model: PeftModel
    ) -> Tensor:
        """Logits (N, V) of the frozen model; if the head is linear, its final hidden states are kept."""
        head = frozen_layers.head
        if head is None:
            with model.disable_adapter():
                return target_logits(frozen_layers, model, batch)
        if any(passage.example_id not in self._hidden for passage in passages):
            with model.disable_adapter():
                hidden = target_hidden(frozen_layers, batch).split([len(p.target_ids) for p in passages])
            self._hidden.update(zip((p.example_id for p in passages), hidden, strict=True))
        return nn.functional.linear(torch.cat([self._hidden[p.example_id] for p in passages]), head.weight, head.bias)


def _pieces(passage: Example, tokens: int, first: tuple[int, ...] = ()) -> Iterator[Example]:
    """Pieces of at most `tokens` tokens that cover the whole target, each prompted by the token before it.

    `first` is what the tokenizer puts before a text; without it, some models predict poorly.
    """
    prompt, target = passage.prompt_ids, passage.target_ids
    for start in range(0, len(target), tokens):
        yield replace(passage, prompt_ids=prompt, target_ids=target[start : start + tokens])
        prompt = (*first, *target[start + tokens - 1 : start + tokens])
