"""Compiling the blocks above the adapter, if the fit is long enough to pay for it."""

import importlib.util
import logging
import math
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, Timer
from torch import Tensor, nn

from pml.errors import InputError, named_line
from pml.evaluating import evaluating
from pml.products import float32_products
from pml.schedule import total_steps

if TYPE_CHECKING:
    from pml.frozen_layers import FrozenLayers

__all__ = [
    "CompileMode",
    "CompiledDecoder",
    "Compiling",
    "FitSize",
    "break_even_batches",
    "check_compile_mode",
    "reason_not_to_compile",
    "warmup_batches",
]

log = logging.getLogger(__name__)

CompileMode = Literal["auto", "always", "never"]

CPU_WORK = 3e13
"""Weights times tokens that a fit on a CPU has to process for compiling to pay off, such as 3000 batches of 300 tokens
through 32 million weights. On two cores, compiling took 20 to 35 s and saved 5 % (float32) to 18 % (bfloat16) of a step
of 0.35 to 0.5 s, so it paid off after 300 to 1400 steps."""

ACCELERATOR_BATCHES = 10_000
"""Batches from which compiling may pay off on accelerators, whatever their size. Estimated, not measured: a minute of
compiling, against about 6 ms by which launching the kernels of a short step takes longer than running them."""

LEAST_SECONDS = 700.0
"""Shortest time limit for compiling: below it, saving 5 % of the time cannot make up for 35 s of compiling."""

ROUNDINGS = 8
"""Tolerance for compiled states, as a multiple of what one rounding of the inputs changes. Fused kernels round in fewer
places, so their states differ by a few such changes."""

COMPILERS = ("c++", "g++", "clang++", "cl")


@dataclass(frozen=True)
class FitSize:
    """How much computation a fit runs through the blocks above the adapter.

    Attributes:
        batches: Batches of the whole fit; infinity if it has no end.
        lengths: Tokens in each example.
        work: Weights in those blocks times the tokens of one batch.
        seconds: Time limit of the fit.
        may_end_early: Whether a callback may end the fit early, such as at certain recall.
        linear_head: Whether the logits are a linear layer of the final hidden states, which alone are compiled.
    """

    batches: float
    lengths: Collection[int]
    work: float
    seconds: float = math.inf
    may_end_early: bool = False
    linear_head: bool = True


def check_compile_mode(mode: str) -> None:
    """Check that a mode is one of `CompileMode`.

    Raises:
        InputError: If it is not.
    """
    if mode not in get_args(CompileMode):
        raise InputError(f"compile is {mode!r}; expected {', '.join(get_args(CompileMode))}")


def reason_not_to_compile(mode: CompileMode, fit: FitSize, device: torch.device) -> str | None:
    """Why a fit should not be compiled, as a phrase; None if it should.

    Args:
        mode: `always` checks only whether compiling is possible.
        fit: Size of the fit.
        device: Device of the model.
    """
    if mode == "never":
        return "turned off"
    if not fit.linear_head:
        return "the logits are more than a linear layer of the final hidden states"
    if device.type == "cpu" and not any(map(shutil.which, COMPILERS)):
        return f"there is no C++ compiler ({', '.join(COMPILERS)})"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if mode == "always":
        return None
    if not fit.work:
        return "no block lies above the adapter"
    if fit.seconds < LEAST_SECONDS:
        return f"a limit of {fit.seconds:.0f} s is too short to earn it back"
    enough = warmup_batches(fit, device) + break_even_batches(fit, device)
    if fit.batches < enough:
        return f"{fit.batches:.0f} batches are too few to earn it back, {enough:.0f} would do"
    if len(set(fit.lengths)) > 1:
        return "the examples are of different lengths, and each shape is compiled anew"
    return None


def break_even_batches(fit: FitSize, device: torch.device) -> int:
    """Batches after which compiling has paid off."""
    return math.ceil(CPU_WORK / fit.work) if device.type == "cpu" else ACCELERATOR_BATCHES


def warmup_batches(fit: FitSize, device: torch.device) -> int:
    """Batches to run before compiling: a fit that may end early is expected to last as long again as it has so far.

    Batches rather than seconds, so that two runs of the same fit are compiled at the same step and round alike.
    """
    return break_even_batches(fit, device) if fit.may_end_early else 0


class Compiling:
    """Decides whether and when a fit compiles the blocks above the adapter, and logs the decision.

    Args:
        mode: Whether to compile always, never, or if it pays off.
        trainer: The fit's trainer, set up.
        frozen_layers: The adapted model, split at the cut.
        curriculum: See `pml.schedule.total_steps`.
    """

    def __init__(
        self, mode: CompileMode, trainer: Trainer, frozen_layers: "FrozenLayers", curriculum: Any = None
    ) -> None:
        fit, device = _size(trainer, frozen_layers, curriculum), trainer.strategy.root_device
        self._accumulated = trainer.accumulate_grad_batches
        self._first: int | None = None
        reason = reason_not_to_compile(mode, fit, device)
        if reason is not None:
            log.info("the blocks above the adapter are not compiled: %s", reason)
            return
        self._first = 0 if mode == "always" else warmup_batches(fit, device)
        log.info("the blocks above the adapter are compiled%s", f" after {self._first} batches" if self._first else "")

    def is_due(self, steps: int) -> bool:
        """Whether to compile now, after `steps` optimiser steps; True at most once."""
        if self._first is None or steps * self._accumulated < self._first:
            return False
        self._first = None
        return True


def _size(trainer: Trainer, frozen_layers: "FrozenLayers", curriculum: Any) -> FitSize:
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    endless = trainer.max_epochs == -1 and trainer.max_steps == -1
    lengths = [len(example) for example in data.corpus.examples]
    per_batch = min(data.batch_size or len(lengths), len(lengths)) / (1 if data.batch_size else trainer.world_size)
    limits = [callback.time_remaining() for callback in callbacks if isinstance(callback, Timer)]
    return FitSize(
        batches=math.inf if endless else total_steps(trainer, curriculum) * trainer.accumulate_grad_batches,
        lengths=lengths,
        work=frozen_layers.weights_above * per_batch * sum(lengths) / len(lengths),
        seconds=min((limit for limit in limits if limit is not None), default=math.inf),
        may_end_early=any(isinstance(c, EarlyStopping) or hasattr(c, "steps_to_recall") for c in callbacks),
        linear_head=frozen_layers.head is not None,
    )


class CompiledDecoder:
    """A decoder that is compiled at its first call; it runs uncompiled if that fails or changes its states.

    Args:
        decoder: Called with `inputs_embeds` or `input_ids`, returns an output with `last_hidden_state`.
        tolerance: Accepted difference from the uncompiled states, relative to the largest of them. A larger difference
            passes only if rounding explains it.
    """

    def __init__(self, decoder: nn.Module, tolerance: float) -> None:
        self.decoder = decoder
        self.tolerance = tolerance
        self._call: Callable[..., Tensor] = self._first_call

    def __call__(self, **inputs: Tensor) -> Tensor:
        """Final hidden states (B, S, d)."""
        return self._call(**inputs)

    def _plain(self, **inputs: Tensor) -> Tensor:
        return self.decoder(**inputs, use_cache=False).last_hidden_state

    def _first_call(self, **inputs: Tensor) -> Tensor:
        # In lower precision, rounding differences would hide real errors.
        with float32_products("highest"):
            return self._tried(**inputs)

    def _tried(self, **inputs: Tensor) -> Tensor:
        self._call = self._plain
        try:
            compiled = torch.compile(self._plain)
            # Dropout would make the passes differ, and its draws would shift those of training.
            with evaluating(self.decoder):
                expected, states = self._plain(**inputs), compiled(**inputs)
                worst = _difference(states, expected)
                agrees = worst <= self.tolerance or worst <= ROUNDINGS * self._rounding(expected, **inputs)
            if agrees:
                states = compiled(**inputs)  # with dropout, which compiles another graph
                self._call = compiled
                return states
            log.warning("the compiled blocks differ by %.1e of their states' size; they run uncompiled", worst)
        # Compilers fail in many ways, none of which should stop training.
        except Exception as error:
            log.warning("the blocks above the adapter cannot be compiled (%s); they run uncompiled", named_line(error))
        return self._plain(**inputs)

    def _rounding(self, expected: Tensor, **inputs: Tensor) -> float:
        """Relative change of the states when the input, or the embedding of token ids, moves by one rounding step."""
        decoder: Any = self.decoder
        with torch.no_grad():
            ids = inputs.get("input_ids")
            values = inputs["inputs_embeds"] if ids is None else decoder.get_input_embeddings()(ids)
            sign = torch.randn(values.shape, generator=torch.Generator().manual_seed(0)).sign().to(values)
            moved = values * (1 + torch.finfo(values.dtype).eps * sign)
            return _difference(self._plain(inputs_embeds=moved), expected)


def _difference(states: Tensor, expected: Tensor) -> float:
    return ((states - expected).abs().max() / expected.abs().max()).item()
