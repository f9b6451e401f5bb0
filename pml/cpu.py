"""Faster float32 training on CPUs at the same accuracy.

By default PyTorch multiplies float32 matrices with MKL. Allowed a lower precision, it uses oneDNN: faster and no less
accurate on many CPUs, but on CPUs with matrix units it multiplies in bfloat16. So both are measured first. The C
library returns large buffers to the system after each step, and the next step faults them in again. On short
sequences, the backward pass of fused attention is several times slower than plain products.
"""

import ctypes
import functools
import logging
import platform
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["CpuChoice", "CpuConfig", "attention", "give_back_memory", "tune_cpu"]

log = logging.getLogger(__name__)

ACCURATE = 1e-6
"""Largest relative error against float64 of a product that counts as float32; rounding alone gives 2e-7 to 4e-7."""

SHORT_TOKENS = 320
"""Longest sequence on which plain attention is at least as fast as fused attention, forward and backward. With 9 heads
it takes 0.2 to 0.4 of the time at 50 to 100 tokens, about the same at 300, and twice the time at 1000."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Numbers of glibc's `mallopt` parameters, from malloc.h."""


_plain_attention = False


@dataclass(frozen=True)
class CpuConfig:
    """Optimisations that are allowed on a CPU; other devices are not affected.

    Attributes:
        products: Multiply float32 matrices with oneDNN if it measures faster and as accurate on this machine.
        buffers: Keep freed buffers for the next step instead of returning them to the system.
        attention: Use plain products for attention over short sequences.
    """

    products: bool = True
    buffers: bool = True
    attention: bool = True


@dataclass(frozen=True)
class CpuChoice:
    """The optimisations chosen, with the measurements behind them.

    Attributes:
        onednn: Whether float32 products use oneDNN.
        speedup: Time of a product with PyTorch's default divided by its time with oneDNN; None if not measured.
        error: Relative error of oneDNN's product against float64; None if not measured.
        keeps_buffers: Whether the process keeps freed buffers.
        plain_attention: Whether attention over short sequences uses plain products.
    """

    onednn: bool
    speedup: float | None
    error: float | None
    keeps_buffers: bool
    plain_attention: bool


def tune_cpu(config: CpuConfig | None = None, onednn: bool | None = None) -> CpuChoice:
    """Choose how the CPU multiplies float32 matrices and computes attention, and whether freed memory is kept.

    Changes process-wide settings of PyTorch's CPU backend and of the C library, and logs each choice. Measurements
    take 0.2 s and are made once per process.

    Args:
        config: What may be chosen.
        onednn: Earlier choice that a resumed fit keeps, whichever is faster; oneDNN still has to be accurate.
    """
    global _plain_attention
    config = config or CpuConfig()
    speedup, error = _measured_onednn() if config.products else (None, None)
    accurate = error is not None and error <= ACCURATE
    faster = speedup is not None and speedup > 1.05
    onednn = accurate and (faster if onednn is None else onednn)
    _use_onednn(onednn)
    _plain_attention = config.attention
    choice = CpuChoice(onednn, speedup, error, config.buffers and _keep_buffers(), config.attention)
    _log_choice(choice)
    return choice


def attention(tokens: int, device: torch.device) -> AbstractContextManager[None]:
    """Context that uses the faster attention for this sequence length; PyTorch's default before `tune_cpu`."""
    if device.type == "cpu" and tokens <= SHORT_TOKENS and _plain_attention:
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def give_back_memory() -> None:
    """Return freed memory to the system, which a process that keeps its buffers never does by itself."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _log_choice(choice: CpuChoice) -> None:
    if choice.speedup is None:
        reason = "not measured"
    else:
        reason = f"oneDNN {choice.speedup:.2f} times as fast as the default, relative error {choice.error:.1e}"
    log.info(
        "float32 products: %s (%s); freed buffers: %s; attention up to %d tokens: %s",
        "oneDNN" if choice.onednn else "default",
        reason,
        "kept" if choice.keeps_buffers else "given back",
        SHORT_TOKENS,
        "plain" if choice.plain_attention else "default",
    )


@functools.cache
def _measured_onednn() -> tuple[float, float]:
    return _measure_onednn()


def _use_onednn(yes: bool) -> None:
    # PyTorch uses oneDNN only when bfloat16 is allowed; oneDNN then uses bfloat16 only on CPUs with units for it.
    mkldnn: Any = torch.backends.mkldnn
    mkldnn.matmul.fp32_precision = "bf16" if yes else "none"


def _measure_onednn() -> tuple[float, float]:
    """Speed of oneDNN's float32 product relative to the default, and its relative error against float64."""
    generator = torch.Generator().manual_seed(0)
    # Typical of a decoder: a few hundred tokens, the hidden size, and a few times as many features.
    a = torch.randn(192, 768, generator=generator)
    b = torch.randn(768, 3072, generator=generator)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    product = a
    for _ in range(4):
        for onednn, times in seconds.items():
            _use_onednn(onednn)
            started = time.perf_counter()
            product = a @ b
            times.append(time.perf_counter() - started)
    exact = a.double() @ b.double()
    error = ((product.double() - exact).norm() / exact.norm()).item()
    return min(seconds[False]) / min(seconds[True]), error


def _keep_buffers() -> bool:
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # Older versions refuse a threshold above 32 MiB.
    kept = mallopt(M_MMAP_THRESHOLD, 2**30) or mallopt(M_MMAP_THRESHOLD, 2**25)
    return bool(kept and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
