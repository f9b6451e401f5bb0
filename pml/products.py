"""Float32 matrix products at reduced precision, for training steps only: all reported values use the highest."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch

from pml.errors import InputError

__all__ = ["MatmulPrecision", "check_matmul_precision", "float32_products", "highest_products"]

MatmulPrecision = Literal["highest", "high", "medium"]
WORDS: tuple[MatmulPrecision, ...] = ("highest", "high", "medium")


class _Settings(NamedTuple):
    """PyTorch's process-wide settings: its word for GPUs, and the mode of CPUs, which `pml.cpu` tunes."""

    word: str
    cpu: str


_outside: _Settings | None = None
"""Settings before the outermost `float32_products`; None outside it."""


def check_matmul_precision(precision: str) -> None:
    """Check that a precision is one of PyTorch's words.

    Raises:
        InputError: If it is not.
    """
    if precision not in WORDS:
        raise InputError(f"matmul_precision is {precision!r}; expected {', '.join(WORDS)}")


def highest_products() -> None:
    """From here on multiply float32 matrices on GPUs in full float32, whatever this process has set before."""
    _apply(_now()._replace(word="highest"))


@contextmanager
def float32_products(precision: MatmulPrecision) -> Iterator[None]:
    """Multiply float32 matrices in a given precision within this context.

    Args:
        precision: A word of `torch.set_float32_matmul_precision`. `highest` restores the settings before the outermost
            of these contexts; on a CPU they may use oneDNN, if that measured as accurate (`pml.cpu`).
    """
    global _outside
    before = _now()
    outermost = _outside is None
    highest = _outside or before
    _outside = highest
    if precision == "highest":
        _apply(highest)
    else:
        torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        _apply(before)
        if outermost:
            _outside = None


def _now() -> _Settings:
    cuda: Any = torch.backends.cuda.matmul
    mkldnn: Any = torch.backends.mkldnn
    # PyTorch's own getter raises if the settings of CPU and GPU differ.
    return _Settings("high" if cuda.fp32_precision == "tf32" else "highest", mkldnn.matmul.fp32_precision)


def _apply(settings: _Settings) -> None:
    mkldnn: Any = torch.backends.mkldnn
    if _now() != settings:
        torch.set_float32_matmul_precision(settings.word)
        mkldnn.matmul.fp32_precision = settings.cpu
