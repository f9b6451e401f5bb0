"""The split: the layers below the adapter give the same states at every step, so they run once per example.

A decoder is cut at its lowest adapted block. Below the cut, each example runs once and its states are kept. Above the
cut, a shallow copy of the decoder, which shares all modules, starts from the kept states. The PEFT model stays whole,
so the split does not affect parameter names, saving, loading or generation.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.func import functional_call

from pml.adapter import MlpBlockLora, lora_layers, lowest_adapted_block
from pml.backbone import Backbone
from pml.compiled import CompiledDecoder
from pml.corpus import PADDING_EXAMPLE, Example, collate
from pml.cpu import attention, give_back_memory
from pml.cuda_graphs import ReplayedDecoder
from pml.cut_trial import find_mismatch, narrow_windows
from pml.devices import has_graphs
from pml.errors import InputError
from pml.products import float32_products
from pml.state_store import CacheConfig, StateStore
from pml.states_below import states_below, streamed_states, with_blocks
from pml.whole_model import one_sequence_a_row, plain_head, run_decoder

if TYPE_CHECKING:
    from pml.memorization import Memorization

__all__ = ["ContentKeys", "FrozenLayers", "content_keys", "move_backbone", "on_device", "split_for", "stream_below"]

log = logging.getLogger(__name__)

Cut = Literal["after_block", "before_block", "whole"]


class ContentKeys:
    """One key per row of a batch, derived from its content.

    Deliberately not a sequence: Lightning would recurse into it down to single bytes to move them to a device.
    """

    def __init__(self, keys: Iterable[bytes]) -> None:
        self._keys = tuple(keys)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._keys)


def content_keys(input_ids: Tensor, lengths: Tensor) -> ContentKeys:
    """One key per row; two keys are equal if and only if the token ids before the padding are.

    The tensors must be on the host, so that making keys never waits for a device.
    """
    rows = zip(input_ids, lengths.tolist(), strict=True)
    return ContentKeys(row[:length].numpy().tobytes() for row, length in rows)


def on_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Any]:
    """Move a batch of `pml.corpus.collate` to a device and add its `keys`, which are made on the host."""
    keys = content_keys(batch["input_ids"], batch["lengths"])
    return {**{name: values.to(device, non_blocking=True) for name, values in batch.items()}, "keys": keys}


class FrozenLayers:
    """Computes final hidden states of a backbone with its adapter, running the layers below it once per example.

    The cut is `after_block` if the lowest adapter is an `mlp_block` whose update only adds to the block's output; kept
    are that output without the adapter and the MLP's input. Otherwise the cut is `before_block`, and the input of the
    lowest adapted block is kept. Each cut is tested when it is made (`pml.cut_trial`) and rejected unless it matches
    the whole model. Without a cut (`whole`), everything runs at every step.

    Args:
        backbone: The backbone that carries the adapter. It holds the kept states, so that other adapters at the same
            block share them.
        model: The PEFT model on it.
        config: Whether to cut at all, and where to keep states.
        folder: Folder for a memory-mapped file.
        processes: Number of processes on this machine that train together.

    Raises:
        InputError: If the model cannot run here even whole, or is not causal.
    """

    def __init__(
        self,
        backbone: Backbone,
        model: PeftModel,
        config: CacheConfig | None = None,
        folder: Path | None = None,
        processes: int = 1,
    ) -> None:
        self.backbone = backbone
        self.model = model
        self.config = config or CacheConfig()
        self._folder, self._processes = folder, processes
        self.filled = 0
        """Number of examples that this object ran through the frozen layers (0 if another adapter had kept them)."""
        self._lowest = lowest_adapted_block(backbone)
        streamed = backbone.streamed
        if streamed is None or len(streamed) != self._lowest or not self.config.release:
            backbone.restore()
        self.head = plain_head(backbone)
        """The LM head if the logits are exactly its output for the final hidden states, else None."""
        self.cut: Cut = "whole"
        self._mlp: MlpBlockLora | None = None
        self._suffix: nn.Module = backbone.decoder
        self._compiled: CompiledDecoder | None = None
        self._replayed: ReplayedDecoder | None = None
        if not self.config.enabled:
            return
        problem = self._first_sound_cut()
        if problem is not None:
            log.warning(
                "%s cannot be split at block %d (%s): every step runs the whole model",
                backbone.name,
                self._lowest,
                problem,
            )
            backbone.restore()

    def _first_sound_cut(self) -> str | None:
        """Make the highest cut that passes the trial; return why there is none, else None."""
        if self.head is None:
            return "its logits are more than a linear layer of its final hidden states"
        first, *others = lora_layers(self.backbone.blocks[self._lowest])
        mlp = first if isinstance(first, MlpBlockLora) and not others else None
        if mlp is not None and self._try("after_block", mlp) is None:
            return None
        if (problem := self._try("before_block")) is None:
            return None
        self._use("whole")
        return problem

    def final_hidden(self, batch: dict[str, Any]) -> Tensor:
        """Hidden states (B, S, d) after the final norm; S is the length of the longest example without its last token.

        Args:
            batch: A batch of `pml.corpus.collate`; with `keys` from `content_keys`, nothing is copied from the device.
        """
        input_ids = batch["input_ids"]
        steps = max(input_ids.shape[1] - 1, 1)
        if self.cut == "whole":
            return self._trained(input_ids=input_ids[:, :steps])
        keys: ContentKeys = batch.get("keys") or content_keys(input_ids.cpu(), batch["lengths"].cpu())
        return self.above(self._below(batch, list(keys)), steps)

    @property
    def store(self) -> StateStore:
        """Kept states by content of the example, shared by all adapters that cut this backbone at the same place."""
        place = (self.cut, self._lowest, self.config.place, self.config.budget_gib)
        if place not in self.backbone.kept_states:
            self.backbone.kept_states[place] = StateStore(
                self.config, self.backbone.model.device, self._folder, self._processes
            )
        return self.backbone.kept_states[place]

    def keep(self, examples: Iterable[Example]) -> None:
        """Keep the states of all examples for which there is room.

        Streamed blocks move to the device once for many examples, if each block by itself gives what it gives in the
        whole model. For examples that are first met in a batch, all of them move for that batch alone.

        Args:
            examples: The whole training set: every rank has its own cache and may be handed any example.
        """
        if self.cut == "whole" or self.store.full:
            return
        missing: dict[bytes, Tensor] = {}
        # A rank that runs short of examples is handed the padding example.
        for example in (PADDING_EXAMPLE, *examples):
            batch = collate([example])
            (key,) = content_keys(batch["input_ids"], batch["lengths"])
            if key not in self.store:
                missing[key] = _without_last(batch, 0).to(self.backbone.model.device)
        with _for_training(), self._frozen():
            states = streamed_states(self.backbone, self._lowest, self._mlp, list(missing.values()))
            for key, kept in zip(missing, states, strict=True):
                # Examples without room are computed at every step.
                if self.store.full:
                    return
                self.store.put(key, kept)
                self.filled += 1

    def keep_and_release(self, examples: Iterable[Example]) -> None:
        """Keep the states of all examples and free the layers below the cut, or restore them if room ran out."""
        self.keep(examples)
        if self.cut != "whole" and self.store.full:
            self.backbone.restore()
        else:
            self.release()

    def release(self) -> None:
        """Free the weights below the cut; `Backbone.restore` brings them back."""
        if self.cut != "whole":
            self.backbone.release(self._first_above)
            give_back_memory()

    @property
    def weights_above(self) -> int:
        """Number of weights in the blocks that every step runs."""
        return sum(p.numel() for block in self.backbone.blocks[self._first_above :] for p in block.parameters())

    @property
    def _first_above(self) -> int:
        """Index of the first block above the cut."""
        return {"whole": 0, "before_block": self._lowest, "after_block": self._lowest + 1}[self.cut]

    def compile(self) -> None:
        """Compile what training runs, checked on a first batch. Evaluation, whose shapes vary, stays eager."""
        self._compiled = CompiledDecoder(self._suffix, tolerance=1e-4)

    def replay(self, wanted: bool = True) -> None:
        """Replay training above the cut as CUDA graphs, if the device has them; with `wanted=False`, stop doing so."""
        self._replayed = None
        if wanted and self.cut != "whole" and has_graphs(self.backbone.model.device):
            suffix = self._suffix

            def decoder(states: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
                return run_decoder(
                    lambda **inputs: functional_call(suffix, dict(parameters), (), inputs), inputs_embeds=states
                )

            trained = {name: p for name, p in suffix.named_parameters() if p.requires_grad}
            self._replayed = ReplayedDecoder(decoder, trained)

    # What `pml.cut_trial` tests ---------------------------------------------------------------------------------------

    def whole(self, input_ids: Tensor) -> Tensor:
        """Final hidden states (B, S, d) of the whole model."""
        return run_decoder(self.backbone.decoder, input_ids=input_ids)

    def below(self, input_ids: Tensor, adapted: bool = False) -> tuple[Tensor, ...]:
        """Tensors kept of one row, the states at the cut (S, d) first; `adapted` leaves the adapter on."""
        with nullcontext() if adapted else self._frozen():
            return states_below(self.backbone, self._lowest, self._mlp, input_ids)

    def at_cut(self, kept: Sequence[tuple[Tensor, ...]], steps: int) -> Tensor:
        """States (B, steps, d) at the cut with the adapter's update, from each example's kept tensors."""
        device = self.backbone.model.device
        hidden, *mlp_input = (_padded(rows, steps, device) for rows in zip(*kept, strict=True))
        if self._mlp is not None and (delta := self._mlp.delta(mlp_input[0])) is not None:
            hidden = hidden + delta.to(hidden.dtype)
        return hidden

    def above(self, kept: Sequence[tuple[Tensor, ...]], steps: int) -> Tensor:
        """Final hidden states (B, steps, d) from each example's kept tensors."""
        return self._trained(inputs_embeds=self.at_cut(kept, steps))

    # ------------------------------------------------------------------------------------------------------------------

    def _trained(self, **inputs: Tensor) -> Tensor:
        """Final hidden states, from the inputs of the blocks above the cut."""
        if torch.is_grad_enabled() and self._compiled is not None:
            first = next(iter(inputs.values()))
            with attention(first.shape[1], first.device), one_sequence_a_row():
                return self._compiled(**inputs)
        if torch.is_grad_enabled() and self._replayed is not None:
            return self._replayed(inputs["inputs_embeds"])
        return run_decoder(self._suffix, **inputs)

    def _below(self, batch: dict[str, Any], keys: Sequence[bytes]) -> list[tuple[Tensor, ...]]:
        """Kept tensors of each example of a batch, from the store or computed."""
        store = self.store
        missing = {key: row for row, key in enumerate(keys) if key not in store}
        if not missing:
            return [store[key] for key in keys]
        # Each row is computed alone: in a batch, rounding depends on the other rows, and kept states are shared by runs
        # that batch differently.
        with _for_training(), self._frozen():
            rows = [_without_last(batch, row).clone() for row in missing.values()]
            states = streamed_states(self.backbone, self._lowest, self._mlp, rows)
            new = dict(zip(missing, states, strict=True))
        for key, kept in new.items():
            store.put(key, kept)
        self.filled += len(new)
        return [new[key] if key in new else store[key] for key in keys]

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """Weights in place, adapter off and full float32 precision, since evaluation uses the kept states too."""
        if self.backbone.released and self.config.release:
            self.backbone.stream(self._lowest)
        elif self.backbone.released:
            self.backbone.restore()
        with self.model.disable_adapter(), float32_products("highest"):
            yield

    def _use(self, cut: Cut, mlp: MlpBlockLora | None = None) -> None:
        self.cut, self._mlp, self._suffix = cut, mlp, self.backbone.decoder
        if cut != "whole":
            self._suffix = with_blocks(self.backbone, slice(self._first_above, None))

    def _try(self, cut: Cut, mlp: MlpBlockLora | None = None) -> str | None:
        """Make a cut and compare it with the whole model; return what is wrong with it, else None."""
        with narrow_windows(self.backbone.decoder.config):
            self._use(cut, mlp)
            problem = find_mismatch(self, self.model)
        self._use(cut, mlp)  # again, since `with_blocks` copies the configuration, windows included
        place = (cut, self._lowest, len(self.backbone.blocks))
        if problem is None:
            log.info("frozen layers: cut %s %d of %d", *place)
        else:
            log.info("frozen layers: no cut %s %d of %d: %s", *place, problem)
        return problem


def stream_below(module: "Memorization") -> None:
    """With `frozen_prefix.release`, keep the blocks below the adapter on the host when the model moves to a device."""
    if module.frozen_prefix.release:
        module.backbone.stream(module.adapter.block_indices(len(module.backbone.blocks))[0])


def move_backbone(module: "Memorization", device: torch.device) -> None:
    """Move a module's backbone to its training device, except for the blocks that `stream_below` keeps on the host."""
    stream_below(module)
    nn.Module.to(module.backbone.model, device)


def split_for(trainer: Any, backbone: Backbone, model: PeftModel, config: CacheConfig) -> FrozenLayers:
    """The split of a model, set up for a trainer's fit.

    Args:
        trainer: A Lightning trainer, for its log folder and its number of processes on this machine; None means one.
        backbone: See `FrozenLayers`.
        model: See `FrozenLayers`.
        config: See `FrozenLayers`.

    Raises:
        InputError: If the model cannot be run as a causal decoder.
    """
    folder = Path(trainer.log_dir) if trainer is not None and trainer.log_dir else None
    try:
        return FrozenLayers(backbone, model, config, folder, 1 if trainer is None else trainer.num_devices)
    except AttributeError as error:
        # torch reports an AttributeError raised inside a property as a missing property, which would mislead.
        raise InputError(
            f"backbone {backbone.name}: {type(backbone.model).__name__} is not built like a causal decoder ({error}); "
            "use another backbone"
        ) from error


@contextmanager
def _for_training() -> Iterator[None]:
    """Compute without gradients, but with results that training can use.

    Tensors made under inference_mode, as in an earlier validation, cannot take part in training.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield


def _without_last(batch: dict[str, Tensor], row: int) -> Tensor:
    """Token ids (1, S) of one row of a batch without its last token, which predicts nothing."""
    used = max(int(batch["lengths"][row]) - 1, 1)
    return batch["input_ids"][row : row + 1, :used]


def _padded(rows: Sequence[Tensor], steps: int, device: torch.device) -> Tensor:
    """Stack (S_i, d) tensors into (B, steps, d) on a device; a lone full row is not copied."""
    if len(rows) == 1 and len(rows[0]) == steps:
        return rows[0].to(device, non_blocking=True)[None]
    batch = torch.zeros(len(rows), steps, rows[0].shape[1], dtype=rows[0].dtype, device=device)
    for row, values in zip(batch, rows, strict=True):
        row[: len(values)] = values
    return batch
