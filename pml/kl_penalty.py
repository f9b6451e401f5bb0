"""A penalty on what training does to other text: the KL divergence from the frozen model on ordinary passages.

It complements `pml.guard`: the guard limits what an adapter can read, the penalty unlearns what it still does to text
that the corpus knows nothing of. Passages are those of `pml.ordinary_text`; the distribution that they should keep is
the frozen model's own, so no text has to be true or well written (knowledge distillation, arXiv 1503.02531, with the
model as its own teacher).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch import Trainer
from peft import PeftModel
from torch import Tensor, nn

from pml.backbone import Backbone
from pml.corpus import Example, collate
from pml.errors import InputError
from pml.frozen_layers import FrozenLayers, on_device
from pml.ordinary_text import ordinary_passages, text_examples
from pml.scoring import target_hidden, target_logits

__all__ = ["KlPenalty", "KlPenaltyConfig", "kl_divergence", "turn_of"]


@dataclass
class KlPenaltyConfig:
    """How much training may change the model on ordinary text.

    Args:
        weight: Factor of the divergence in the loss; both are nats per token.
        passages: Passages in each micro-batch, drawn in turn. Four of 64 tokens cost twice as much as two of 32, and
            did not spare more.
        tokens: Most tokens of each; longer text is cut into pieces.
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


class _Divergence(torch.autograd.Function):
    """KL(p || q) of softmax(a) and softmax(b), sum p (a - b) - ln Z_a + ln Z_b, with its gradient q - p by b.

    A pass over (N, V) costs as much as half a product with the head, so what autograd would do apart is done at once.
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
    """ln of the sum of exp(logits), by way of the largest, whose probability is nowhere near 0."""
    return logits.amax(dim=-1) - probabilities.amax(dim=-1).log()


def kl_divergence(frozen: Tensor, adapted: Tensor) -> Tensor:
    """KL(frozen || adapted) in nats, the mean over N tokens; float32 whatever the logits are.

    Args:
        frozen: Logits (N, V) of the frozen model.
        adapted: Logits (N, V), through which the gradient flows.
    """
    divergence: Tensor = _Divergence.apply(frozen, adapted)
    return divergence


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
        passages = ordinary_passages(config.text, "guard", "penalty")
        examples = text_examples(passages, backbone.tokenizer, backbone.max_positions, backbone.vocab_size)
        pieces = [piece for example in examples for piece in _pieces(example, config.tokens)]
        if not pieces:
            raise InputError("kl_penalty.text: no passage fits into the backbone's context; expected shorter ones")
        order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed % 2**63)).tolist()
        self.passages = [replace(pieces[i], example_id=number) for number, i in enumerate(order)]
        self._each = min(config.passages, len(pieces))
        self._hidden: dict[int, Tensor] = {}

    def chosen(self, turn: int) -> list[Example]:
        """The passages of a micro-batch: always the same together, since what is in a batch decides how it is rounded.

        Args:
            turn: See `turn_of`; after the last passages it begins again with the first.
        """
        first = turn % (len(self.passages) // self._each) * self._each
        return self.passages[first : first + self._each]

    def loss(self, frozen_layers: FrozenLayers, model: PeftModel, turn: int) -> Tensor:
        """Divergence in nats per token on the passages of a micro-batch.

        Args:
            frozen_layers: The adapted model, cut where its frozen layers end.
            model: The same model whole.
            turn: See `turn_of`.
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
        """Logits (N, V) of the frozen model; where no more than a head follows, its final hidden states are kept."""
        head = frozen_layers.head
        if head is None:
            with model.disable_adapter():
                return target_logits(frozen_layers, model, batch)
        if any(passage.example_id not in self._hidden for passage in passages):
            with model.disable_adapter():
                hidden = target_hidden(frozen_layers, batch).split([len(p.target_ids) for p in passages])
            self._hidden.update(zip((p.example_id for p in passages), hidden, strict=True))
        return nn.functional.linear(torch.cat([self._hidden[p.example_id] for p in passages]), head.weight, head.bias)


def _pieces(passage: Example, tokens: int) -> Iterator[Example]:
    """Its target in pieces of so many tokens, each after the token before it: what is never seen is never unlearnt."""
    prompt, target = passage.prompt_ids, passage.target_ids
    for start in range(0, len(target), tokens):
        yield replace(passage, prompt_ids=prompt, target_ids=target[start : start + tokens])
        prompt = target[start + tokens - 1 : start + tokens]
