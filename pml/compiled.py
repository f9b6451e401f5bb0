"""Compiling the blocks above the adapter, where a fit is long enough to pay for it."""

import importlib.util
import logging
import shutil
from collections.abc import Callable, Collection
from typing import Literal

import torch
from torch import Tensor, nn

__all__ = ["LONG_STEPS", "CompileMode", "CompiledDecoder", "reason_not_to_compile"]

log = logging.getLogger(__name__)

CompileMode = Literal["auto", "always", "never"]

LONG_STEPS = 3000
"""Batches from which compiling pays. On two CPU cores it took 20 to 35 s and then saved 5 % (float32) to 18 %
(bfloat16) of a step of 0.35 to 0.5 s at 300 tokens, so it is earned back after 300 to 1400 steps."""

ROUNDINGS = 8
"""Compiled states may differ by as much as this many roundings of the inputs move them. Fused kernels round at fewer
places, so that their states differ by a few."""

COMPILERS = ("c++", "g++", "clang++", "cl")


def reason_not_to_compile(
    mode: CompileMode, batches: float, lengths: Collection[int], device: torch.device
) -> str | None:
    """Why a fit should not be compiled; None where it should.

    Args:
        mode: `always` asks only whether it can be done.
        batches: Batches of the whole fit, infinity where it has no end.
        lengths: Tokens in each example.
        device: Where the model is.
    """
    if mode == "never":
        return "turned off"
    if device.type == "cpu" and not any(map(shutil.which, COMPILERS)):
        return f"there is no C++ compiler ({', '.join(COMPILERS)})"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if mode == "always":
        return None
    if batches < LONG_STEPS:
        return f"{batches:.0f} batches are too few to earn it back, {LONG_STEPS} would do"
    if len(set(lengths)) > 1:
        return "the examples are of different lengths, and each shape is compiled anew"
    return None


class CompiledDecoder:
    """A decoder that is compiled at its first call, and given up for the plain one if that fails or differs.

    Args:
        decoder: Called with `inputs_embeds`, gives an output with `last_hidden_state`.
        tolerance: Difference to the plain decoder's states, relative to the largest of them, that always passes; a
            larger one does where rounding explains it.
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
        self._call = self._plain
        expected = self._plain(**inputs)
        try:
            compiled = torch.compile(self._plain)
            states = compiled(**inputs)
        # Compilers fail in many ways, none of which is a reason not to train.
        except Exception as error:
            log.warning(
                "the blocks above the adapter cannot be compiled (%s); they run as they are", _first_line(error)
            )
            return expected
        worst = _difference(states, expected)
        if worst > self.tolerance and worst > ROUNDINGS * self._rounding(expected, **inputs):
            log.warning("the compiled blocks differ by %.1e of their states' size; they run as they are", worst)
            return expected
        self._call = compiled
        return states

    def _rounding(self, expected: Tensor, **inputs: Tensor) -> float:
        """How far the states move when the last digit of each input does, in the dtype that is multiplied in."""
        moved = {}
        for name, values in inputs.items():
            kind = values.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else values.dtype
            if values.is_floating_point():
                sign = torch.randn(values.shape, generator=torch.Generator().manual_seed(0)).sign().to(values)
                values = values * (1 + torch.finfo(dtype).eps * sign)
            moved[name] = values
        with torch.no_grad():
            return _difference(self._plain(**moved), expected)


def _difference(states: Tensor, expected: Tensor) -> float:
    return ((states - expected).abs().max() / expected.abs().max()).item()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
