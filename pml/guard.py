"""The guard: keeps an adapter from reading the input directions that ordinary text uses.

A LoRA update is B A x, so it changes other text only as far as A responds to that text's inputs x. The guard keeps
every row of A orthogonal to the k largest principal directions of the adapted layer's inputs on ordinary text; there
A x is close to 0 whatever B is. A is trained in coordinates of the other, free directions: A = C Q^T with orthonormal
columns Q. AdamW's moments live in the free subspace, and the saved adapter is an ordinary LoRA.

Related work: AlphaEdit (arXiv 2410.02355) projects the weight changes of model editing onto the null space of the keys
to preserve. LoRA-Null (arXiv 2503.02659) initialises A in the null space of pre-training activations, and A may
leave it.
"""

import hashlib
import logging
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from pml.atomic import whole_file
from pml.backbone import Backbone
from pml.default_backbone import cache_folder
from pml.errors import InputError, not_finite
from pml.evaluating import evaluating
from pml.ordinary_text import ordinary_passages, text_examples

__all__ = ["GuardConfig", "GuardedA", "free_directions", "guard_layers", "input_moments"]

log = logging.getLogger(__name__)


@dataclass
class GuardConfig:
    """Which directions of a layer's inputs an adapter must not read.

    Args:
        variance: Share of the second moment of ordinary text that the guarded directions cover, in (0, 1).
        directions: Number k of guarded directions, the largest first; replaces `variance` if given.
        text: UTF-8 files of ordinary text; null takes the packaged prose, code and chats.
    """

    variance: float = 0.99
    directions: int | None = None
    text: str | list[str] | None = None

    def __post_init__(self) -> None:
        if not 0.0 < self.variance < 1.0:
            raise InputError(f"adapter.guard.variance is {self.variance}; expected a share between 0 and 1")
        if self.directions is not None and self.directions < 1:
            raise InputError(f"adapter.guard.directions is {self.directions}; expected at least 1, or null for a share")


def free_directions(moment: Tensor, variance: float, directions: int | None = None) -> Tensor:
    """The directions that are not guarded, as orthonormal columns (d, d - k).

    Principal directions are eigenvectors of the second moment. The mean is not subtracted, since an adapter that reads
    the mean would shift every token.

    Args:
        moment: Second moment (d, d) of a layer's inputs x, the sum of x x^T over tokens.
        variance: Least share of the trace that the k guarded directions cover.
        directions: k itself; replaces `variance` if given.

    Example:
        >>> free_directions(torch.diag(torch.tensor([1.0, 8.0, 1.0])), variance=0.8).abs().tolist()
        [[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]
    """
    values, vectors = torch.linalg.eigh(moment.double())
    if directions is None:
        shares = values.flip(0).clamp(min=0).cumsum(0) / values.clamp(min=0).sum()
        directions = int((shares < variance).sum()) + 1
    return vectors[:, : max(len(moment) - directions, 0)].float().contiguous()


class GuardedA(nn.Module):
    """LoRA's A in coordinates of the free directions, A = C Q^T; from outside, a linear layer with the weight A.

    State dictionaries hold only `weight`, so PEFT saves and loads an ordinary LoRA.

    Args:
        weight: Initial A (r, d); its components in guarded directions are dropped.
        basis: Q (d, m), orthonormal columns that span the free directions.
    """

    def __init__(self, weight: Tensor, basis: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.coordinates = nn.Parameter(weight.detach() @ basis)
        # A buffer, so that DDP broadcasts the first rank's basis and checkpoints of the module hold it.
        self.register_buffer("basis", basis)

    @property
    def weight(self) -> Tensor:
        """A (r, d)."""
        basis: Any = self.basis
        return self.coordinates @ basis.T

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.detach()

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: Any, *rest: Any
    ) -> None:
        weight = state_dict.get(f"{prefix}weight")
        if weight is None:
            missing_keys.append(f"{prefix}weight")
        else:
            with torch.no_grad():
                self.coordinates.copy_(weight @ self.basis)


def guard_layers(backbone: Backbone, layers: Mapping[str, Any], config: GuardConfig, rank: int) -> None:
    """Replace A by a guarded A in LoRA layers that have not been trained yet.

    Args:
        backbone: The model that carries the layers.
        layers: PEFT's LoRA layers by their path in the backbone.
        config: What to guard.
        rank: LoRA rank; every layer needs at least as many free directions.

    Raises:
        InputError: If a layer has fewer free directions than the rank, or the text cannot be read.
    """
    moments = input_moments(backbone, list(layers), config)
    for name, layer in layers.items():
        basis = _free_directions(backbone, moments[name], config)
        width, free = basis.shape
        if free < rank:
            raise InputError(
                f"the guard leaves {free} of {width} directions of {name} free, and the rank is {rank}; take a lower "
                "rank or guard.variance, or do without a guard"
            )
        log.info("guard: %d of %d directions of %s are guarded", width - free, width, name)
        for adapter, linear in layer.lora_A.items():
            # A copy, since loading a checkpoint overwrites it.
            layer.lora_A[adapter] = GuardedA(linear.weight, basis.to(linear.weight.device, copy=True))


def _free_directions(backbone: Backbone, moment: Tensor, config: GuardConfig) -> Tensor:
    """`free_directions`, computed once for layers with the same inputs and for adapters one after another."""
    key = (hashlib.sha256(moment.numpy().tobytes()).digest(), config.variance, config.directions)
    if key not in backbone.free_directions:
        backbone.free_directions[key] = free_directions(moment, config.variance, config.directions)
    return backbone.free_directions[key]


def input_moments(backbone: Backbone, names: Sequence[str], config: GuardConfig) -> dict[str, Tensor]:
    """Second moments (d, d), in float32, of the inputs of layers on ordinary text; read from the cache or computed.

    Args:
        backbone: The model; an adapter on it must not have been trained yet.
        names: Paths of the layers in the backbone.
        config: Which text to use.

    Raises:
        InputError: If the text cannot be read, or an input is not finite.
    """
    passages = ordinary_passages(config.text, "guard")
    examples = text_examples(passages, backbone.tokenizer, backbone.max_positions, backbone.vocab_size)
    rows = [example.prompt_ids + example.target_ids for example in examples]
    files = {name: _cache_file(backbone, name, rows) for name in names}
    found = {name: moment for name, path in files.items() if (moment := _read(path)) is not None}
    if missing := [name for name in names if name not in found]:
        log.info("guard: running %d passages of ordinary text through %s once", len(rows), backbone.name)
        found |= _computed(backbone, missing, rows)
    if not all(moment.isfinite().all() for moment in found.values()):
        raise not_finite(backbone.name, "states", backbone.model.dtype)
    for name in missing:
        _write(files[name], found[name])
    return found


class _AllSeen(Exception):
    """Ends a forward pass when every layer has received its input."""


def _computed(backbone: Backbone, names: Sequence[str], rows: Sequence[tuple[int, ...]]) -> dict[str, Tensor]:
    if backbone.released:
        backbone.restore()
    sums: dict[str, Tensor] = {}
    left: set[str] = set()

    def adding(name: str) -> Any:
        def add(_: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach().flatten(0, -2).float()
            product = (x.T @ x).cpu().double()
            sums[name] = sums[name] + product if name in sums else product
            left.discard(name)
            if not left:
                raise _AllSeen

        return add

    # In evaluation mode, since the dropout of an attached adapter would advance the generator that training uses.
    with _hooks(backbone.model, {n: adding(n) for n in names}), torch.no_grad(), evaluating(backbone.model):
        for row in rows:
            left.update(names)
            # The pass stops at the highest of these layers.
            with suppress(_AllSeen):
                backbone.decoder(input_ids=torch.tensor([row], device=backbone.model.device), use_cache=False)
    return {name: moment.float().cpu() for name, moment in sums.items()}


@contextmanager
def _hooks(model: nn.Module, by_name: Mapping[str, Any]) -> Iterator[None]:
    hooks = [model.get_submodule(name).register_forward_pre_hook(hook) for name, hook in by_name.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _cache_file(backbone: Backbone, name: str, rows: Sequence[tuple[int, ...]]) -> Path:
    """Cache file of one backbone, layer and text; its name hashes everything that the moment depends on."""
    digest = hashlib.sha256(f"{backbone.content_hash}\0{backbone.model.dtype}\0{name}\0".encode())
    for row in rows:
        digest.update(struct.pack(f"<I{len(row)}I", len(row), *row))
    return cache_folder() / "guard" / f"{digest.hexdigest()[:32]}.safetensors"


def _read(path: Path) -> Tensor | None:
    try:
        return load_file(path)["moment"]
    except (OSError, SafetensorError, KeyError):
        return None


def _write(path: Path, moment: Tensor) -> None:
    try:
        with whole_file(path) as file:
            file.write(save({"moment": moment.contiguous()}))
    except OSError as error:
        log.warning("guard: %s cannot be written (%s); it will be computed again next time", path, error.strerror)
