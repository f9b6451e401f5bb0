"""Faster float32 training on a CPU at the same accuracy; what is chosen is measured on the machine first.

PyTorch multiplies float32 matrices with MKL unless told that less precision will do; then it asks oneDNN, which on
many CPUs is faster and no less accurate, and on CPUs with matrix units multiplies in bfloat16, which is not. The C
library gives large buffers back to the system after each step, only to have them faulted in again at the next. And the
fused attention goes back through short sequences several times slower than plain products do.
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
"""Relative error against float64 up to which a product counts as float32: rounding alone gives 2e-7 to 4e-7."""

SHORT_TOKENS = 320
"""Longest sequence for which plain attention is at least as fast as the fused one, forward and back: with 9 heads it
takes 0.2 to 0.4 of the time at 50 to 100 tokens, about the same at 300, and twice the time at 1000."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Names of glibc's `mallopt` parameters, from malloc.h."""


_plain_attention = False


@dataclass(frozen=True)
class CpuConfig:
    """What may be chosen on a CPU; other devices are not affected.

    Attributes:
        products: Multiply float32 matrices with oneDNN where that is faster and as accurate here.
        buffers: Keep freed buffers for the next step in place of giving them back to the system.
        attention: Attend over short sequences with plain products.
    """

    products: bool = True
    buffers: bool = True
    attention: bool = True


@dataclass(frozen=True)
class CpuChoice:
    """What was chosen, and why.

    Attributes:
        onednn: Whether float32 products go to oneDNN.
        speedup: Time of a product as PyTorch comes, divided by its time in oneDNN; None where it was not measured.
        error: Relative error of oneDNN's product against float64; None likewise.
        keeps_buffers: Whether freed buffers stay with the process.
        plain_attention: Whether short sequences are attended over with plain products.
    """

    onednn: bool
    speedup: float | None
    error: float | None
    keeps_buffers: bool
    plain_attention: bool


def tune_cpu(config: CpuConfig | None = None, onednn: bool | None = None) -> CpuChoice:
    """Choose how float32 matrices are multiplied on the CPU, whether freed memory is kept, and how to attend.

    Changes process-wide settings of PyTorch's CPU backend and of the C library. What has to be measured is measured
    once per process, in 0.2 s. Every choice is logged.

    Args:
        config: What may be chosen.
        onednn: Multiply with oneDNN, where it is accurate, or not, whichever is faster: what a fit goes on with.
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
    """The faster way to attend over sequences of so many tokens; PyTorch's own choice unless `tune_cpu` was called."""
    if device.type == "cpu" and tokens <= SHORT_TOKENS and _plain_attention:
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def give_back_memory() -> None:
    """Give freed memory back to the system, which a process that keeps its buffers never does by itself."""
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
    # Allowing bfloat16 is how PyTorch is told to ask oneDNN, which takes it up only where the CPU has units for it.
    mkldnn: Any = torch.backends.mkldnn
    mkldnn.matmul.fp32_precision = "bf16" if yes else "none"


def _measure_onednn() -> tuple[float, float]:
    """Speed of oneDNN's float32 product relative to the default, and its error relative to float64."""
    generator = torch.Generator().manual_seed(0)
    # The shape of a decoder's products: some hundred tokens, a width, and a few times as many features.
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
    return bool(mallopt(M_MMAP_THRESHOLD, 2**30) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
