"""Float32 matrix products of less precision, for training steps alone: what is reported is computed in the highest."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch

from pml.errors import InputError

__all__ = ["MatmulPrecision", "check_matmul_precision", "float32_products", "highest_products"]

MatmulPrecision = Literal["highest", "high", "medium"]
WORDS: tuple[MatmulPrecision, ...] = ("highest", "high", "medium")


class _Settings(NamedTuple):
    """PyTorch's settings, which are the process': its word for GPUs, and what CPUs go by, which `pml.cpu` tunes."""

    word: str
    cpu: str


_outside: _Settings | None = None
"""What was in force before the outermost `float32_products`; None outside of all."""


def check_matmul_precision(precision: str) -> None:
    """Refuse words that are not PyTorch's.

    Raises:
        InputError: If the precision is none of them.
    """
    if precision not in WORDS:
        raise InputError(f"matmul_precision is {precision!r}; expected {', '.join(WORDS)}")


def highest_products() -> None:
    """Multiply float32 matrices on GPUs as float32 from here on, whatever this process was told before."""
    _apply(_now()._replace(word="highest"))


@contextmanager
def float32_products(precision: MatmulPrecision) -> Iterator[None]:
    """Multiply float32 matrices in some precision for a while.

    Args:
        precision: In the words of `torch.set_float32_matmul_precision`. `highest` is what was in force outside of any
            lower one: on a CPU that may be a product that was measured to be as accurate (`pml.cpu`).
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
    # PyTorch's own getter refuses to answer where CPU and GPU are set to different things.
    return _Settings("high" if cuda.fp32_precision == "tf32" else "highest", mkldnn.matmul.fp32_precision)


def _apply(settings: _Settings) -> None:
    mkldnn: Any = torch.backends.mkldnn
    if _now() != settings:
        torch.set_float32_matmul_precision(settings.word)
        mkldnn.matmul.fp32_precision = settings.cpu
