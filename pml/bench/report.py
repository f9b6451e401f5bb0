"""Benchmark results as JSON."""

import platform
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from pml.bench.fits import FitCost, RecallRun
from pml.bench.steps import Measurement
from pml.cpu import tune_cpu

__all__ = ["as_json"]


def as_json(
    measurements: Sequence[Measurement],
    fits: Sequence[FitCost],
    rates: dict[str, float],
    recall: Sequence[RecallRun],
) -> dict[str, Any]:
    """All results as a dictionary for JSON; `rates` are in 10^9 operations per second."""
    choice = tune_cpu() if not torch.cuda.is_available() else None
    return {
        "schema_version": 3,
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "cpu_choice": asdict(choice) if choice is not None else None,
        "matmul_gflop_per_second": rates,
        "steps": [asdict(m) for m in measurements],
        "fits": [asdict(fit) for fit in fits],
        "recall": [asdict(run) for run in recall],
    }
