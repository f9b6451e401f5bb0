"""The trial of a cut: whether a cut model matches the whole one, tested so that any omission shows in every dtype.

A single tolerance would have to allow for rounding, and would let small mistakes through: in bfloat16, a position
embedding added twice changes states by less than rounding. So each check compares values that should be equal bit for
bit, or nearly so:

1. With the adapter, the states at the cut differ only by the order of two additions. If a norm or a multiplier changes
   the update on its way, the difference is as large as the update.
2. Without the adapter, a single row runs through the same kernels at the same shapes, split or whole. Only something
   omitted between embeddings and head (a norm, a position embedding, a multiplier, a mask) can make a difference.
3. A padded batch with the adapter matches the whole model up to rounding, which is measured on that batch.

The trial runs with float32 weights if memory allows, else in the weights' own dtype.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import Tensor, nn

from pml.adapter import lora_layers
from pml.cpu import give_back_memory
from pml.errors import named_line
from pml.evaluating import evaluating
from pml.host_memory import available_bytes

__all__ = ["FAILURES", "CutModel", "deterministic_eval", "find_mismatch", "in_float32", "narrow_windows"]

log = logging.getLogger(__name__)

LENGTHS = (11, 6)
"""Tokens in the rows of the trial."""

WINDOW = 4
"""Width of sliding windows during the trial, in tokens: shorter than the trial's rows."""

WINDOW_SETTINGS = ("sliding_window", "attention_chunk_size")
"""Names in configurations for the width of a sliding window, from which masks are made."""

SAME = 1e-5
"""Relative difference up to which states count as equal. In 16 bits, changing the last digit of one feature among
hundreds exceeds it."""

FAILURES = (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError)
"""Exceptions raised by model code when it gets blocks, states or a dtype that it does not expect."""

MEMORY_SHARE = 0.8
"""Share of the free memory that the float32 weights may take."""


class CutModel(Protocol):
    """What the trial needs of a cut model. Unless stated otherwise, states are (B, S, d)."""

    def whole(self, input_ids: Tensor) -> Tensor:
        """Final hidden states of the whole model."""

    def below(self, input_ids: Tensor, adapted: bool = False) -> tuple[Tensor, ...]:
        """Tensors kept of one row, the states at the cut (S, d) first; `adapted` leaves the adapter on."""

    def at_cut(self, kept: Sequence[tuple[Tensor, ...]], steps: int) -> Tensor:
        """States at the cut with the adapter's update, from each row's kept tensors."""

    def above(self, kept: Sequence[tuple[Tensor, ...]], steps: int) -> Tensor:
        """Final hidden states from each row's kept tensors."""


def find_mismatch(cut: CutModel, model: PeftModel) -> str | None:
    """What is wrong with a cut, as a phrase; None if it matches the whole model.

    Args:
        cut: The cut model.
        model: The PEFT model under it. During the trial its adapter has other values, and its weights another dtype.
    """
    base: Any = model.get_base_model()
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(base.config.get_text_config().vocab_size)
    input_ids = torch.randint(vocabulary, (len(LENGTHS), max(LENGTHS)), generator=generator).to(base.device)
    try:
        with deterministic_eval(model), _random_adapter(model):
            if _narrow_tensors(model) and _float32_fits(model):
                # An overflow in the weights' own dtype would not show in float32.
                alone = input_ids[:1]
                if not cut.above([cut.below(alone)], alone.shape[1]).isfinite().all():
                    return f"hidden states are not finite in {base.dtype}"
                try:
                    with in_float32(model):
                        return _compare(cut, model, input_ids)
                except FAILURES as error:
                    # A model's code may have its dtype fixed elsewhere than in the weights.
                    log.info("frozen layers: no trial in float32: %s", error)
            return _compare(cut, model, input_ids)
    except FAILURES as error:
        return named_line(error)


def _compare(cut: CutModel, model: PeftModel, input_ids: Tensor) -> str | None:
    rows = [ids[None, :length] for ids, length in zip(input_ids, LENGTHS, strict=True)]
    kept = [cut.below(row) for row in rows]
    alone, steps, below = rows[0], rows[0].shape[1], kept[0][0]
    rounding = torch.finfo(below.dtype).eps

    if float(_difference(cut.at_cut(kept[:1], steps)[0], below).max()) > 0:
        _as_large_as_states(model, cut, kept[0])
        ours, theirs = cut.at_cut(kept[:1], steps)[0], cut.below(alone, adapted=True)[0]
        worst = float(_difference(ours, theirs, scale=_size(theirs) + _size(theirs - below)).max())
        if not worst <= max(SAME, 4 * rounding):
            return f"the adapter's update reaches the cut changed: states there differ by {worst:.1e} of their size"

    with model.disable_adapter():
        whole = cut.whole(alone)
        worst = float(_difference(cut.above(kept[:1], steps), whole).max())
        # Some devices are not deterministic.
        if not worst <= SAME and not worst <= 4 * float(_difference(cut.whole(alone), whole).max()):
            return f"hidden states without the adapter differ by {worst:.1e} of their size"

    real = torch.arange(steps) < torch.tensor(LENGTHS)[:, None]
    padded = cut.above(kept, steps)[real]
    if below.dtype == torch.float32:
        expected = cut.whole(input_ids)[real]
    else:
        # Many blocks can amplify how two additions at the cut were rounded, so this checks only the padding.
        expected = torch.cat([cut.above([one], len(one[0]))[0] for one in kept])
    # The median position, since rounding may send a token to another expert where a router's choice is close.
    typical = float(_difference(padded, expected).median())
    if not typical <= max(1e-4, 2 * rounding):
        noise = _noise(cut, rows, input_ids, real)
        if not typical <= 4 * noise:
            return (
                f"hidden states of a padded batch differ by {typical:.1e} of their size, "
                f"where batching otherwise changes them by {noise:.1e}"
            )
    return None


def _noise(cut: CutModel, rows: list[Tensor], input_ids: Tensor, real: Tensor) -> float:
    """Relative change in the whole model's states when the same rows run in another order, or one by one."""
    padded = cut.whole(input_ids)[real]
    swapped = cut.whole(input_ids.flip(0)).flip(0)[real]
    single = torch.cat([cut.whole(row)[0] for row in rows])
    return max(float(_difference(other, padded).median()) for other in (swapped, single))


def _difference(ours: Tensor, theirs: Tensor, scale: Tensor | None = None) -> Tensor:
    """Distance between states (..., d), per position, relative to `scale` (...) or else to the norms of `theirs`.

    Being per position, it lets no outlier hide another difference. States may be zero, for example after padding.
    """
    scale = _size(theirs) if scale is None else scale
    return _size(ours.float() - theirs.float()) / scale.clamp(min=torch.finfo(torch.float32).tiny)


def _size(states: Tensor) -> Tensor:
    return states.float().norm(dim=-1)


def _as_large_as_states(model: PeftModel, cut: CutModel, kept: tuple[Tensor, ...]) -> None:
    """Scale the adapter's update at the cut to the size of the states there, so that neither hides the other."""
    update = float(_difference(cut.at_cut([kept], len(kept[0]))[0], kept[0]).median())
    for weight in _b_weights(model):
        weight.data.div_(update)


@contextmanager
def deterministic_eval(model: nn.Module) -> Iterator[None]:
    """Context for comparisons: no dropout, autocast or gradients, and tensors that training can use afterwards."""
    device = next(model.parameters()).device.type
    with torch.inference_mode(False), torch.no_grad(), evaluating(model), torch.autocast(device, enabled=False):
        yield


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Cast 16-bit weights to float32 within this context; afterwards they are back in their original memory."""
    narrow = [(tensor, tensor.data) for tensor in _narrow_tensors(model)]
    try:
        for tensor, data in narrow:
            tensor.data = data.float()
        yield
    finally:
        for tensor, data in narrow:
            tensor.data = data
        if narrow:
            give_back_memory()


def _narrow_tensors(model: nn.Module) -> list[Tensor]:
    return [t for t in (*model.parameters(), *model.buffers()) if t.dtype in (torch.bfloat16, torch.float16)]


def _float32_fits(model: nn.Module) -> bool:
    """Whether a float32 copy of the weights fits in memory; never for quantised weights."""
    if any(p.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64) for p in model.parameters()):
        return False
    needed: dict[torch.device, int] = {}
    for tensor in _narrow_tensors(model):
        needed[tensor.device] = needed.get(tensor.device, 0) + 4 * tensor.numel()
    return all(bytes_ <= MEMORY_SHARE * _free_memory(device) for device, bytes_ in needed.items())


def _free_memory(device: torch.device) -> float:
    if device.type == "cpu":
        return available_bytes()
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + idle
    return 0.0


@contextmanager
def narrow_windows(config: Any) -> Iterator[None]:
    """Narrow all sliding windows within this context, so that short rows show the effect of a mask."""
    wide = {
        name: width for name in WINDOW_SETTINGS if isinstance(width := vars(config).get(name), int) and width > WINDOW
    }
    try:
        for name in wide:
            setattr(config, name, WINDOW)
        yield
    finally:
        for name, width in wide.items():
            setattr(config, name, width)


def _b_weights(model: PeftModel) -> list[Tensor]:
    return [weight for layer in lora_layers(model) for b in layer.lora_B.values() for weight in b.parameters()]


@contextmanager
def _random_adapter(model: PeftModel) -> Iterator[None]:
    """Give B random values within this context, since a zero update would agree with anything."""
    generator = torch.Generator().manual_seed(1)
    weights = _b_weights(model)
    saved = [weight.detach().clone() for weight in weights]
    try:
        for weight in weights:
            weight.data.copy_(torch.randn(weight.shape, generator=generator))
        yield
    finally:
        for weight, values in zip(weights, saved, strict=True):
            weight.data.copy_(values)
