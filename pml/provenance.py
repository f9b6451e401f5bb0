"""Provenance of a run: its settings as they took effect, package versions, hardware and commit."""

import functools
import platform
import subprocess
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch
from lightning.pytorch import Trainer

from pml.adapter import adapter_parameters
from pml.corpus import Corpus
from pml.modules import Memorization

__all__ = ["git_commit", "hardware", "run_settings", "training_settings", "versions"]

PACKAGES = ("pml", "torch", "lightning", "transformers", "peft", "torchmetrics")


def run_settings(trainer: Trainer, module: Memorization, corpus: Corpus) -> dict[str, Any]:
    """Settings of a run, as fields of the record."""
    return {
        "backbone": module.backbone.name,
        "backbone_hash": module.backbone.content_hash,
        "dtype": module.dtype_name,
        "block": module.adapter.block_indices(len(module.backbone.blocks)),
        "placement": module.adapter.placement,
        "init": module.adapter.init,
        "rank": module.adapter.rank,
        "effective_parameters": sum(p.numel() for p in adapter_parameters(module.model).values()),
        "corpus": corpus.name,
        "corpus_hash": corpus.content_hash,
        "corpus_encoding": corpus.encoding,
        "corpus_settings": corpus.settings,
        "pairs": len(corpus),
        "target_tokens": corpus.target_tokens,
        "corpus_entropy_bits": corpus.entropy_bits,
        "method": module.method,
        "method_settings": module.settings(),
        "training": training_settings(trainer),
        "seed": module.seed,
        "optimizer_steps": trainer.global_step - module.skipped_steps,
        "skipped_steps": module.skipped_steps,
        "resumed": module.resumed,
    }


def training_settings(trainer: Trainer) -> dict[str, Any]:
    """Settings of the trainer and of batches that affect the result; batch sizes in examples, -1 for no limit."""
    sampler: Any = getattr(trainer.train_dataloader, "sampler", None)
    global_batch = getattr(sampler, "examples_per_batch", None)
    return {
        "batch_size": getattr(sampler, "examples_per_rank", None),
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "global_batch_size": None if global_batch is None else global_batch * trainer.accumulate_grad_batches,
        "max_epochs": trainer.max_epochs,
        "max_steps": trainer.max_steps,
        "limit_train_batches": trainer.limit_train_batches,
        "gradient_clip_val": trainer.gradient_clip_val,
        "gradient_clip_algorithm": str(trainer.gradient_clip_algorithm or "norm"),
        "precision": str(trainer.precision),
        "strategy": type(trainer.strategy).__name__,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


_version = functools.cache(version)  # reads and parses the package's metadata


def hardware(trainer: Trainer, module: Memorization) -> dict[str, Any]:
    """Device type, name and count, CPU threads, and the choices of `pml.cpu`."""
    device = module.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": device.type,
        "name": name,
        "devices": trainer.world_size,
        "threads": torch.get_num_threads(),
        "cpu_choice": asdict(module.cpu_choice) if module.cpu_choice is not None else None,
    }


def git_commit() -> str | None:
    """Commit of the working directory, with `+` if it has uncommitted changes; None outside a repository."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
