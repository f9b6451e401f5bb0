"""Rate of the machine's matrix products, and memory in use."""

import platform
import time
from pathlib import Path

import torch

from pml.cpu import tune_cpu

__all__ = ["held_mib", "matmul_rate", "peak_mib", "reset_peak"]

MIB = 2**20


def matmul_rate(dtype: str = "float32", seconds: float = 1.0) -> float:
    """Rate of this machine's fastest product in bfloat16 or at float32 accuracy, in 10^9 operations per second."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        tune_cpu()
    best = 0.0
    for rows, inner, columns in ((2048, 2048, 2048), (1024, 576, 8192), (4096, 1024, 1024)):
        a = torch.randn(rows, inner, device=device, dtype=getattr(torch, dtype))
        b = torch.randn(inner, columns, device=device, dtype=getattr(torch, dtype))
        ends = time.perf_counter() + seconds / 3
        while time.perf_counter() < ends:
            started = time.perf_counter()
            a @ b
            if device.type == "cuda":
                torch.cuda.synchronize()
            best = max(best, 2 * rows * inner * columns / (time.perf_counter() - started) / 1e9)
    return best


def reset_peak(device: torch.device) -> None:
    """Reset the peak of memory in use."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif platform.system() == "Linux":
        Path("/proc/self/clear_refs").write_text("5")


def peak_mib(device: torch.device) -> float:
    """Peak memory since `reset_peak`, in MiB: allocated on the GPU, or resident in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / MIB
    return _status("VmHWM")


def held_mib(device: torch.device) -> float:
    """Current memory in MiB: allocated on the GPU, or resident in the process."""
    return torch.cuda.memory_allocated() / MIB if device.type == "cuda" else _status("VmRSS")


def _status(field: str) -> float:
    """A memory field of /proc/self/status in MiB; NaN on systems other than Linux."""
    if platform.system() != "Linux":
        return float("nan")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024
