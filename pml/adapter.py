"""LoRA on a frozen backbone, through PEFT: placement, initialisation and effective parameters."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pml.backbone import Backbone
from pml.errors import InputError, first_line
from pml.guard import GuardConfig, guard_layers
from pml.plain import from_plain
from pml.saved_adapter import check_weights, read_saved_adapter

__all__ = [
    "AdapterConfig",
    "MlpBlockLora",
    "adapter_for",
    "adapter_parameters",
    "adapter_state",
    "attach_adapter",
    "detach_adapter",
    "load_adapter",
    "lora_layers",
    "lowest_adapted_block",
]

MLP_NAMES = ("mlp", "feed_forward", "ffn")
"""Attribute names under which decoder blocks hold their MLP."""


@dataclass
class AdapterConfig:
    """A LoRA adapter.

    Args:
        rank: LoRA rank r.
        placement: `mlp_block` puts one adapter in parallel with the whole MLP of a block, as published; a list of PEFT
            target modules, such as `[down_proj]`, puts one on each of these linear layers of a block.
        block: Decoder blocks to adapt: an index from 0, a list of indices, or a fraction of the depth between 0 and 1.
        init: `published` draws A from U(-1/sqrt(r), 1/sqrt(r)), `peft` from U(-1/sqrt(d), 1/sqrt(d)). B starts at zero.
        alpha: lora_alpha; the update is scaled by alpha / rank. None means alpha = rank, so the scale is 1.
        dropout: Dropout probability, on the adapter's output for `mlp_block` (as published), on its input otherwise.
        guard: Keeps the adapter from reading the directions that ordinary text uses most; see `pml.guard`.
    """

    rank: int = 4
    placement: str | list[str] = "mlp_block"
    block: int | float | list[int] = 2 / 3
    init: Literal["published", "peft"] = "published"
    alpha: float | None = None
    dropout: float = 0.0
    guard: GuardConfig | None = None

    def __post_init__(self) -> None:
        self.guard = from_plain(self.guard, GuardConfig)
        if self.rank < 1:
            raise InputError(f"adapter.rank is {self.rank}; expected at least 1")
        if self.alpha is not None and not self.alpha > 0:
            raise InputError(f"adapter.alpha is {self.alpha}; expected a number above 0, or null for the rank")
        if not 0.0 <= self.dropout < 1.0:
            raise InputError(f"adapter.dropout is {self.dropout}; expected a probability in [0, 1)")
        if self.init not in ("published", "peft"):
            raise InputError(f"adapter.init is {self.init!r}; expected 'published' or 'peft'")
        if isinstance(self.placement, str) and self.placement != "mlp_block":
            raise InputError(
                f"adapter.placement is {self.placement!r}; expected 'mlp_block' or a list of target modules such as "
                f"[{self.placement}]"
            )
        if not self.placement:
            raise InputError("adapter.placement is an empty list; expected 'mlp_block' or names of linear layers")

    def block_indices(self, depth: int) -> list[int]:
        """Indices of the adapted blocks in a backbone with `depth` blocks, in ascending order.

        Raises:
            InputError: If a block is no index or out of range, a fraction is not between 0 and 1, or the list is empty.
        """
        if isinstance(self.block, float):
            if not 0.0 < self.block < 1.0:
                raise InputError(f"adapter.block is {self.block}; expected a fraction of the depth between 0 and 1")
            return [min(round(self.block * depth), depth - 1)]
        blocks = self.block if isinstance(self.block, list) else [self.block]
        for block in blocks:
            if not isinstance(block, int) or isinstance(block, bool):
                raise InputError(f"adapter.block is {self.block!r}; expected an index, a list of them, or a fraction")
            if not 0 <= block < depth:
                raise InputError(f"adapter.block is {block}; this backbone has blocks 0 to {depth - 1}")
        if not blocks:
            raise InputError("adapter.block is an empty list; expected at least one block")
        return sorted(set(blocks))


class MlpBlockLora(nn.Module, LoraLayer):
    """A low-rank path in parallel with the whole MLP of a decoder block: y = MLP(x) + dropout(B A x) * alpha / r.

    This is the published adapter as a PEFT layer. It reads the MLP's input (after the block's norm) and adds to the
    MLP's output. The low-rank path runs in the adapter's own dtype (float32), whatever the backbone's dtype, and is
    cast once, when it is added.

    Args:
        base_layer: The block's MLP.
        adapter_name: PEFT's name of the adapter.
        config: PEFT's configuration.
        hidden_size: d, the width of the residual stream.
        r: Rank.
        lora_alpha: Scale times rank.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        *,
        hidden_size: int,
        r: int,
        lora_alpha: int,
        **_: Any,
    ) -> None:
        super().__init__()
        # LoraLayer asks for the layer's sizes in its constructor, and an MLP has no attributes for them.
        self._hidden_size = hidden_size
        LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config=config)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return self._hidden_size, self._hidden_size

    def delta(self, x: Tensor) -> Tensor | None:
        """The adapter's update for MLP inputs x (..., d), in the adapter's dtype; None while it is disabled."""
        if self.disable_adapters:
            return None
        total = None
        for name in self.active_adapters:
            if name in self.lora_A:
                a = self.lora_A[name]
                low = a(x.to(next(a.parameters()).dtype))
                path = self.lora_dropout[name](self.lora_B[name](low) * self.scaling[name])
                total = path if total is None else total + path
        return total

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = self.base_layer(x, *args, **kwargs)
        delta = self.delta(x)
        if delta is None:
            return result
        # An MLP may return router logits or a state beside its output, and may flatten batch and positions into one.
        output, *rest = result if isinstance(result, tuple) else (result,)
        output = output + delta.to(output.dtype).view(output.shape)
        return (output, *rest) if isinstance(result, tuple) else output


def _mlp_name(block: nn.Module) -> str:
    for name in MLP_NAMES:
        if isinstance(getattr(block, name, None), nn.Module):
            return name
    raise InputError(
        f"placement mlp_block: {type(block).__name__} has no module named {', '.join(MLP_NAMES)}; "
        "name its linear layers in adapter.placement instead"
    )


def _target_modules(config: AdapterConfig, backbone: Backbone, blocks: list[int]) -> list[str]:
    """Full paths of the modules to adapt, for PEFT to match exactly."""
    targets = []
    for index in blocks:
        block, path = backbone.blocks[index], f"{backbone.blocks_path}.{index}"
        if config.placement == "mlp_block":
            targets.append(f"{path}.{_mlp_name(block)}")
            continue
        names = [name for name, module in block.named_modules() if name and not list(module.children())]
        for wanted in config.placement:
            found = [name for name in names if name == wanted or name.endswith(f".{wanted}")]
            if not found:
                have = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))
                raise InputError(f"adapter.placement names {wanted!r}, which block {index} lacks; it has {have}")
            targets.extend(f"{path}.{name}" for name in found)
    return targets


def adapter_for(
    backbone: Backbone, placement: str | list[str] | None, block: int | float | list[int], guard: GuardConfig | None
) -> AdapterConfig:
    """Configuration of an adapter; without a placement, it adapts all linear layers of its block."""
    if placement is None:
        placement = _linear_layers(backbone, AdapterConfig(block=block).block_indices(len(backbone.blocks))[0])
    return AdapterConfig(placement=placement, block=block, guard=guard)


def _linear_layers(backbone: Backbone, block: int) -> list[str]:
    modules = backbone.blocks[block].named_modules()
    names = (name.rsplit(".", 1)[-1] for name, module in modules if isinstance(module, (nn.Linear, Conv1D)))
    return list(dict.fromkeys(names))


def _register_mlp_block(config: LoraConfig, model: PreTrainedModel, targets: list[str]) -> None:
    """Tell PEFT how to wrap whole MLPs; the mapping is not part of the saved configuration."""
    layer: Any = partial(MlpBlockLora, hidden_size=int(model.config.get_text_config().hidden_size))
    config._register_custom_module({type(model.get_submodule(name)): layer for name in targets})


def lora_layers(model: nn.Module) -> Iterator[LoraLayer]:
    """The LoRA layers of a PEFT model, from the lowest block up."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            yield module


def lowest_adapted_block(backbone: Backbone) -> int:
    """Number of the lowest decoder block that carries a LoRA layer."""
    for number, block in enumerate(backbone.blocks):
        if next(lora_layers(block), None) is not None:
            return number
    raise ValueError("the backbone carries no adapter")


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters by name; their sizes add up to the effective parameters, 2 d r for `mlp_block`.

    A guarded A is represented by its free coordinates.
    """
    return {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors for a checkpoint: its parameters, and the basis that a guard has fixed for A."""
    return dict(adapter_parameters(model)) | {name: b for name, b in model.named_buffers() if "lora_" in name}


def _initialise(model: PeftModel, config: AdapterConfig, seed: int) -> None:
    """Draw A from its own generator, so that a seed gives the same adapter whatever was drawn before."""
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model):
        for linear in layer.lora_A.values():
            (weight,) = linear.parameters()
            rank, width = weight.shape
            bound = 1 / math.sqrt(rank if config.init == "published" else width)
            # Drawn as (d, r), the published layout, so that a seed reproduces the published adapter's values.
            with torch.no_grad():
                weight.copy_(torch.empty(width, rank).uniform_(-bound, bound, generator=generator).T)


def attach_adapter(backbone: Backbone, config: AdapterConfig, seed: int = 42) -> PeftModel:
    """Attach a new adapter to a backbone. Only the adapter is trainable; it is float32 whatever the backbone's dtype.

    Args:
        backbone: The frozen model; changed in place until `detach_adapter`.
        config: Rank, placement and initialisation.
        seed: Seed of the initial A.

    Raises:
        InputError: If the rank exceeds the width, a block or a target module does not exist, PEFT cannot adapt it, the
            guard leaves fewer free directions than the rank, or the backbone already carries an adapter.
    """
    _refuse_second(backbone.model, backbone.name)
    if config.rank > backbone.hidden_size:
        raise InputError(
            f"adapter.rank is {config.rank}; above the width {backbone.hidden_size} of this backbone a low-rank "
            "update saves nothing"
        )
    targets = _target_modules(config, backbone, config.block_indices(len(backbone.blocks)))
    peft_config = LoraConfig(
        r=config.rank,
        lora_alpha=cast(int, config.alpha if config.alpha is not None else config.rank),  # PEFT accepts any number
        lora_dropout=config.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    if config.placement == "mlp_block":
        _register_mlp_block(peft_config, backbone.model, targets)
    try:
        model = get_peft_model(backbone.model, peft_config)
    except ValueError as error:
        # PEFT refuses layers whose weights a model reads without calling them; by then it has wrapped other layers.
        _unwrap(backbone.model)
        reason = first_line(error).rstrip(".")
        raise InputError(f"adapter.placement: {reason}; name other linear layers of {backbone.name}") from error
    _initialise(model, config, seed)
    if config.guard is not None:
        layers = {name: backbone.model.get_submodule(name) for name in targets}
        try:
            guard_layers(backbone, layers, config.guard, config.rank)
        except InputError:
            detach_adapter(model)
            raise
    return model


OF_BASE = re.compile(r"base_model\.model\.(.+)\.base_layer\.(weight|bias)")


def load_adapter(backbone: Backbone | PreTrainedModel, folder: str | Path) -> PeftModel:
    """Attach a saved adapter, from pml or from PEFT alone, to a backbone for inference.

    Args:
        backbone: A backbone, or any model loaded by transformers; changed in place until `detach_adapter`.
        folder: Folder written by `save_pretrained`.

    Raises:
        InputError: If the folder holds no LoRA adapter of PEFT, or one that contradicts its configuration or its run's
            record, or does not fit this backbone.
    """
    model, name = (backbone.model, backbone.name) if isinstance(backbone, Backbone) else (backbone, "this model")
    _refuse_second(model, name)
    folder = Path(folder)
    config, weights = read_saved_adapter(folder)
    weights = _without_base_weights(folder, weights, model)
    named = config.target_modules if isinstance(config.target_modules, (set, list)) else []
    # From twenty names on, PEFT saves their shortest distinctive suffixes instead of the names.
    endings = tuple(f".{name}" for name in named)
    targets = {name: module for name, module in model.named_modules() if f".{name}".endswith(endings)}
    if targets and all(list(module.children()) for module in targets.values()):
        _register_mlp_block(config, model, list(targets))
    try:
        adapted = get_peft_model(model, config)
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, re.error) as error:
        _unwrap(model)
        raise InputError(f"{folder}: the adapter does not fit {name}: {first_line(error)}") from error
    try:
        check_weights(folder, weights, get_peft_model_state_dict(adapted, save_embedding_layers=False))
    except InputError:
        detach_adapter(adapted)
        raise
    set_peft_model_state_dict(adapted, weights)
    return adapted.eval()


def _without_base_weights(folder: Path, weights: dict[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """Drop the base's own weights, which PEFT copies into the file where embeddings or the head are adapted."""
    kept = {}
    for name, weight in weights.items():
        if (found := OF_BASE.fullmatch(name)) is None:
            kept[name] = weight
            continue
        own = getattr(dict(model.named_modules()).get(found[1]), found[2], None)
        if not isinstance(own, Tensor) or not _rounds_to(own, weight):
            raise InputError(
                f"{folder}: the adapter was trained on another {found[1]} than this backbone's; use the backbone that "
                "it was trained on"
            )
    return kept


def _rounds_to(own: Tensor, saved: Tensor) -> bool:
    """Whether two weights are equal once both are rounded to the narrower of their dtypes."""
    least = min(own.dtype, saved.dtype, key=lambda dtype: torch.finfo(dtype).bits)
    return own.shape == saved.shape and torch.equal(own.detach().cpu().to(least), saved.to(least))


def _unwrap(model: PreTrainedModel) -> None:
    """Remove the LoRA layers that PEFT left behind when it failed."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer):
            model.set_submodule(name, layer.get_base_layer())


def detach_adapter(model: PeftModel) -> None:
    """Remove an adapter; the backbone is bit for bit what it was before, with every parameter frozen."""
    model.unload().requires_grad_(False)


def _refuse_second(model: PreTrainedModel, name: str) -> None:
    if next(lora_layers(model), None) is not None:
        raise InputError(f"backbone {name} already carries an adapter; detach it first, or load the backbone again")
