"""A stand-in for an accelerator: PyTorch's `meta` device, whose tensors have shapes but no values.

A step that mixes in a host tensor fails there, and so does reading a value: whatever would make a GPU wait raises. So
that fits run all the same, `Waits` makes values up and counts how often one was read.
"""

import sys
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils._python_dispatch import TorchDispatchMode

import pml.optimizer
from pml.corpus import collate
from pml.modules import Memorization
from tests.tiny_runs import Ids, make_trainer

__all__ = ["Waits", "fit", "pretend_that_adamw_is_one_kernel"]

META = torch.device("meta")


class _StandIn(Accelerator):
    @staticmethod
    def name() -> str:
        return "stand-in"

    def setup_device(self, device: torch.device) -> None: ...

    def teardown(self) -> None: ...

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [META]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True


class Waits(TorchDispatchMode):
    """Counts all operations while it is active, and those that would make the host wait for its device.

    Attributes:
        waits: Number of waits by operation and by the line of the project that caused it.
        operations: Number of operations by name.
        float_running_sums: Number of cumulative sums of floats.
        dtypes: Dtypes of all results on the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        self.waits: Counter[str] = Counter()
        self.operations: Counter[str] = Counter()
        self.float_running_sums = 0
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        self.operations[name] += 1
        if name == "cumsum" and args[0].is_floating_point():
            self.float_running_sums += 1
        if not _on_device(args):
            return func(*args, **kwargs)
        if name == "_local_scalar_dense":
            self.waits[f"item at {_asked_by()}"] += 1
            return {True: 1.0}.get(args[0].is_floating_point(), 0 if args[0].dtype == torch.bool else 1)
        if name in ("_to_copy", "copy_") and _to_host(args, kwargs):
            self.waits[f"copy to the host at {_asked_by()}"] += 1
            return args[0] if name == "copy_" else torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        result = func(*args, **kwargs)
        if isinstance(result, torch.Tensor) and result.device == META:
            self.dtypes.add(result.dtype)
        return result


def _on_device(args: Any) -> bool:
    return any(isinstance(a, torch.Tensor) and a.device == META for a in args)


def _to_host(args: Any, kwargs: Any) -> bool:
    if len(args) > 1 and isinstance(args[1], torch.Tensor):
        return bool(args[0].device.type == "cpu")
    return "device" in kwargs and torch.device(kwargs["device"]).type == "cpu"


def _asked_by() -> str:
    """The innermost calling line outside PyTorch and this file."""
    frame: Any = sys._getframe(2)
    while frame.f_back is not None and ("/torch/" in (name := frame.f_code.co_filename) or name == __file__):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


class _OnlySteps(Callback):
    """Keeps the counts of `steps` whole optimiser steps, from the start of one batch to the start of another."""

    def __init__(self, counts: Waits, first: int, steps: int) -> None:
        self.counts, self.first, self.last = counts, first, first + steps

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.first:
            self.counts.reset()
        if trainer.global_step == self.last:
            counts = self.counts
            self.waits, self.operations = counts.waits.copy(), counts.operations.copy()
            self.dtypes, self.float_running_sums = set(counts.dtypes), counts.float_running_sums


def pretend_that_adamw_is_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make AdamW fused on the stand-in, as it is on a GPU."""
    monkeypatch.setattr(pml.optimizer, "FUSED", (META.type,))
    optimizer = import_module("torch.optim.optimizer")  # torch.optim does not expose this submodule
    monkeypatch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: [META.type])


def fit(module: Memorization, data: Ids, folder: Path, steps: int = 3, callbacks: Any = ()) -> _OnlySteps:
    """Fit with a real Trainer on the stand-in, one batch per epoch, and return the counts of `steps` steps in between.

    The frozen layers are cut, and run for every example, on the CPU first: both need values.
    """
    module.configure_model()
    data.build(module.tokenizer, module.vocab_size)
    with torch.no_grad():
        module.score(collate(data.corpus.examples))
    counts = Waits()
    watch = _OnlySteps(counts, first=2, steps=steps)
    strategy = SingleDeviceStrategy(META, accelerator=_StandIn())
    options: dict[str, Any] = {"accelerator": "auto", "strategy": strategy, "gradient_clip_val": 1.0}
    trainer = make_trainer(folder, max_epochs=steps + 4, callbacks=[watch, *callbacks], **options)
    with counts:
        trainer.fit(module, datamodule=data)
    assert trainer.global_step == steps + 4
    return watch
