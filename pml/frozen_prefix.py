"""The split: what lies below the adapter gives the same numbers at every step, so it is computed once per example.

A decoder is cut at its lowest adapted block. Below the cut each example is run once and what comes out is kept; above
it runs a shallow copy of the decoder that shares all modules and starts from the kept states. The PEFT model stays
whole: names, saving, loading and generation know nothing of the split.
"""

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn

from pml.adapter import MlpBlockLora, evaluating, lora_layers
from pml.backbone import Backbone
from pml.compiled import CompiledDecoder
from pml.cpu import attention, give_back_memory
from pml.prefix_store import PrefixConfig, PrefixStore

__all__ = ["FrozenPrefix", "content_keys"]

log = logging.getLogger(__name__)

Cut = Literal["after_block", "before_block", "whole"]


def content_keys(input_ids: Tensor, lengths: Tensor) -> list[bytes]:
    """A key per row that is equal if and only if the token ids before the padding are equal.

    Takes tensors that lie on the host, so that making the keys never waits for a device.
    """
    return [row[:length].numpy().tobytes() for row, length in zip(input_ids, lengths.tolist(), strict=True)]


class FrozenPrefix:
    """Final hidden states of a backbone with its adapter, with everything below the adapter computed once per example.

    The cut is `after_block` where the lowest adapter is an `mlp_block` whose update only adds to the block's output:
    what is kept is that output without the adapter, and the MLP's input. Otherwise it is `before_block`: what enters
    the lowest adapted block. Each cut is tried on a padded batch with a random adapter when it is made, and given up
    unless its states equal the whole model's; `whole` runs everything at every step.

    Args:
        backbone: The backbone that carries the adapter. Kept states live with it, so that other adapters at the same
            block share them.
        model: The PEFT model on it.
        config: Whether to cut at all, and where to keep what is computed.
        folder: Where a memory-mapped file may be made.
    """

    def __init__(
        self,
        backbone: Backbone,
        model: PeftModel,
        config: PrefixConfig | None = None,
        folder: Path | None = None,
    ) -> None:
        backbone.restore()
        self.backbone = backbone
        self.model = model
        self.config = config or PrefixConfig()
        self._folder = folder
        self.filled = 0
        """Examples whose prefix was computed by this object (0 where another adapter had already done so)."""
        self.head = self._plain_head()
        """The LM head where the logits are no more than its product with the final hidden states, else None."""
        self._lowest = self._lowest_block()
        self.cut: Cut = "whole"
        self._suffix: nn.Module = backbone.decoder
        self._compiled: CompiledDecoder | None = None
        if not self.config.enabled:
            return
        adapted = list(lora_layers(backbone.blocks[self._lowest]))
        cuts: list[Cut] = ["before_block"]
        if len(adapted) == 1 and isinstance(adapted[0], MlpBlockLora):
            self._mlp_lora = adapted[0]
            cuts.insert(0, "after_block")
        for cut in cuts:
            problem = self._try(cut)
            if problem is None:
                log.info("frozen prefix: cut %s %d of %d", cut, self._lowest, len(backbone.blocks))
                return
            log.info("frozen prefix: no cut %s %d: %s", cut, self._lowest, problem)
        self._use("whole")
        log.warning(
            "%s cannot be split at block %d (%s): every step runs the whole model", backbone.name, self._lowest, problem
        )

    def final_hidden(self, batch: dict[str, Any]) -> Tensor:
        """Hidden states (B, S, d) after the final norm; S is the longest example without its last token.

        Args:
            batch: What `pml.corpus.collate` gives; `keys` from `content_keys` saves a copy from the device.
        """
        input_ids = batch["input_ids"]
        steps = max(input_ids.shape[1] - 1, 1)
        if self.cut == "whole":
            return self._trained(input_ids=input_ids[:, :steps])
        keys: Sequence[bytes] = batch.get("keys") or content_keys(input_ids.cpu(), batch["lengths"].cpu())
        return self._above([self._below(batch, row, key) for row, key in enumerate(keys)], steps, input_ids.device)

    @property
    def store(self) -> PrefixStore:
        """Kept states by content of the example; shared by all adapters that cut this backbone at the same place."""
        place = (self.cut, self._lowest, self.config.place, self.config.budget_gib)
        if place not in self.backbone.prefixes:
            self.backbone.prefixes[place] = PrefixStore(self.config, self.backbone.model.device, self._folder)
        return self.backbone.prefixes[place]

    def release(self) -> None:
        """Free what lies below the cut; `Backbone.restore` brings it back."""
        if self.cut != "whole":
            self.backbone.release(self._lowest + (1 if self.cut == "after_block" else 0))
            give_back_memory()

    def compile(self) -> None:
        """Compile what is trained through; a first batch tries it. Evaluation, whose shapes vary, runs as it is."""
        self._compiled = CompiledDecoder(self._suffix, self._rounding)

    def _above(self, kept: Sequence[tuple[Tensor, ...]], steps: int, device: torch.device) -> Tensor:
        """Final hidden states (B, steps, d) from what each example keeps."""
        hidden, *mlp_input = (_padded(rows, steps, device) for rows in zip(*kept, strict=True))
        if mlp_input and (delta := self._mlp_lora.delta(mlp_input[0])) is not None:
            hidden = hidden + delta.to(hidden.dtype)
        return self._trained(inputs_embeds=hidden)

    def _trained(self, **inputs: Tensor) -> Tensor:
        """Final hidden states through the blocks above the cut."""
        if self._compiled is None or not torch.is_grad_enabled():
            return self._run(self._suffix, **inputs)
        first = next(iter(inputs.values()))
        with attention(first.shape[1], first.device):
            return self._compiled(**inputs)

    @property
    def _rounding(self) -> float:
        """Adding the same numbers in another order moves a float32 result by a few 1e-6 and a bfloat16 one by 1e-2."""
        return 1e-4 if self.backbone.model.dtype == torch.float32 else 5e-2

    def _below(self, batch: dict[str, Any], row: int, key: bytes) -> tuple[Tensor, ...]:
        """What one example keeps, from the store or computed."""
        store = self.store
        if key in store:
            return store[key]
        # Computed alone: in a batch, rounding depends on what else is in it, and what is kept is shared by runs that
        # batch otherwise. Tensors made under inference_mode (a validation pass may come first) could not take part in
        # training later.
        with torch.inference_mode(False), torch.no_grad():
            used = max(int(batch["lengths"][row]) - 1, 1)
            kept = self._capture(batch["input_ids"][row : row + 1, :used].clone())
            store.put(key, kept)
        self.filled += 1
        return kept

    def _capture(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        """States (S, d) of one example at the cut and, if that is after an `mlp_block`, the input of its MLP (S, d)."""
        self.backbone.restore()
        block = self.backbone.blocks[self._lowest]
        caught: dict[str, Tensor] = {}

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            caught["in"] = args[0] if args else kwargs["hidden_states"]

        def after(_: nn.Module, __: Any, output: Any) -> None:
            caught["out"] = output if isinstance(output, Tensor) else output[0]

        def mlp(_: nn.Module, args: tuple[Any, ...]) -> None:
            caught["mlp"] = args[0]

        hooks = [block.register_forward_pre_hook(before, with_kwargs=True), block.register_forward_hook(after)]
        if self.cut == "after_block":
            hooks.append(self._mlp_lora.register_forward_pre_hook(mlp))
        try:
            with self.model.disable_adapter():
                lower = _with_blocks(self.backbone, slice(0, self._lowest + 1))
                self._run(lower, input_ids=input_ids)
        finally:
            for hook in hooks:
                hook.remove()
        kept = (caught["out"], caught["mlp"]) if self.cut == "after_block" else (caught["in"],)
        return tuple(states[0].clone() for states in kept)

    def _plain_head(self) -> nn.Linear | None:
        head = self.backbone.model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            return None
        caught: list[Tensor] = []
        hook = self.backbone.decoder.register_forward_hook(lambda _, __, out: caught.append(out.last_hidden_state))
        input_ids = torch.arange(1, 6, device=self.backbone.model.device)[None] % self.backbone.vocab_size
        try:
            with torch.no_grad(), evaluating(self.model):
                logits = self.backbone.model(input_ids=input_ids, use_cache=False).logits.float()
                product = head(caught[0]).float()
        finally:
            hook.remove()
        # The same product twice, of the same states: a cap, a scale or a bias would show far above rounding.
        same = (product - logits).abs().max() <= 1e-4 * logits.abs().max()
        return head if same else None

    def _lowest_block(self) -> int:
        for index, block in enumerate(self.backbone.blocks):
            if next(lora_layers(block), None) is not None:
                return index
        raise ValueError("the backbone carries no adapter")

    def _use(self, cut: Cut) -> None:
        self.cut = cut
        if cut == "whole":
            self._suffix = self.backbone.decoder
        else:
            first = self._lowest + (1 if cut == "after_block" else 0)
            self._suffix = _with_blocks(self.backbone, slice(first, None))

    def _try(self, cut: Cut) -> str | None:
        """Make a cut and compare it with the whole model on a padded batch; a sentence where it will not do."""
        self._use(cut)
        device = self.backbone.model.device
        generator = torch.Generator().manual_seed(0)
        lengths = torch.tensor([7, 12])
        input_ids = torch.randint(self.backbone.vocab_size, (2, 12), generator=generator)
        real = torch.arange(11) < lengths[:, None] - 1
        rows = [ids[None, : length - 1].to(device) for ids, length in zip(input_ids, lengths.tolist(), strict=True)]
        try:
            with torch.no_grad(), _random_adapter(self.model), evaluating(self.model):
                split = self._above([self._capture(row) for row in rows], 11, device).float().cpu()[real]
                whole = self._run(self.backbone.decoder, input_ids=input_ids[:, :11].to(device)).float().cpu()[real]
        except (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            return f"{type(error).__name__}: {error}"
        worst = ((split - whole).abs().max() / whole.abs().max()).item()
        # A cut that misses something (a second norm, a position embedding) is off by the size of the states.
        return None if worst <= self._rounding else f"hidden states differ by {worst:.1e} of their size"

    @staticmethod
    def _run(decoder: nn.Module, **inputs: Tensor) -> Tensor:
        first = next(iter(inputs.values()))
        with attention(first.shape[1], first.device):
            return decoder(**inputs, use_cache=False).last_hidden_state


def _padded(rows: Sequence[Tensor], steps: int, device: torch.device) -> Tensor:
    """Stack (S_i, d) tensors into (B, steps, d) on a device; a lone full row is not copied."""
    if len(rows) == 1 and len(rows[0]) == steps:
        return rows[0].to(device, non_blocking=True)[None]
    batch = torch.zeros(len(rows), steps, rows[0].shape[1], dtype=rows[0].dtype, device=device)
    for row, values in zip(batch, rows, strict=True):
        row[: len(values)] = values
    return batch


def _with_blocks(backbone: Backbone, blocks: slice) -> nn.Module:
    """A shallow copy of the decoder that shares all its modules but has only some of its blocks."""
    decoder: Any = copy.copy(backbone.decoder)
    kept = nn.ModuleList(backbone.blocks[blocks])
    decoder._modules = {**decoder._modules, backbone.blocks_path.rsplit(".", 1)[-1]: kept}
    config = copy.copy(decoder.config)
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        # Decoders look up what kind of attention a block has by its place in the list.
        config.layer_types = config.layer_types[blocks]
    decoder.config = config
    return decoder


@contextmanager
def _random_adapter(model: PeftModel) -> Iterator[None]:
    """Give B random values for a while: a zero update would agree with anything."""
    generator = torch.Generator().manual_seed(1)
    weights = [weight for layer in lora_layers(model) for b in layer.lora_B.values() for weight in b.parameters()]
    saved = [weight.detach().clone() for weight in weights]
    try:
        for weight in weights:
            weight.data.copy_(torch.randn(weight.shape, generator=generator))
        yield
    finally:
        for weight, values in zip(weights, saved, strict=True):
            weight.data.copy_(values)
