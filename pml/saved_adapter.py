"""Saved adapters: written atomically, read as data only, and rejected if they contradict their own configuration."""

import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pml.errors import InputError, first_line

__all__ = ["CARD_NAME", "CONFIG_NAME", "WEIGHTS_NAME", "check_weights", "read_saved_adapter", "save_adapter"]

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
CARD_NAME = "README.md"

BESIDE_LORA = {
    "modules_to_save": "whole layers beside the adapter",
    "trainable_token_indices": "trained embeddings",
    "layer_replication": "layers of the base that appear twice",
    "target_parameters": "updates of parameters that belong to no linear layer",
    "alora_invocation_tokens": "an adapter that only some tokens switch on",
    "kasa_config": "an update that needs the base's weights truncated",
}
"""PEFT settings that make an adapter more than A and B beside layers, and what each adds."""

CHANGED_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that change the base's weights, so that the adapter does not fit the published base."""

BLOCK = re.compile(r"\.(\d+)\.")
"""The first number in a weight's name is the index of its block, whatever a model calls its blocks."""


def save_adapter(model: PeftModel, folder: Path, card: str | None = None) -> None:
    """Save an adapter in PEFT's format, by way of a temporary folder so that it is never incomplete.

    Args:
        model: The model with the adapter; none of the base's weights are saved.
        folder: Folder to write; an adapter that is already there is replaced.
        card: Model card to use instead of PEFT's blank one.
    """
    partial, before = (folder.with_name(f".{folder.name}.{what}{os.getpid()}") for what in ("", "before"))
    try:
        model.save_pretrained(str(partial), save_embedding_layers=False)
        if card is not None:
            (partial / CARD_NAME).write_text(card, encoding="utf-8")
        for path in partial.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if folder.exists():
            folder.rename(before)
        partial.rename(folder)
    finally:
        if before.exists() and not folder.exists():
            before.rename(folder)
        for left in (partial, before):
            shutil.rmtree(left, ignore_errors=True)


def read_saved_adapter(folder: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Configuration and weights of a LoRA adapter that PEFT has saved; nothing is unpickled.

    If a run's record lies beside the folder, its rank, blocks and alpha must match.

    Args:
        folder: Folder written by `save_pretrained`.

    Raises:
        InputError: If a file is missing or broken, the adapter is not plain LoRA, a weight is not finite, or the record
            does not match.
    """
    if not (folder / CONFIG_NAME).is_file():
        raise InputError(f"{folder}: no {CONFIG_NAME} in it; expected a folder written by save_pretrained")
    if not (folder / WEIGHTS_NAME).is_file():
        raise InputError(f"{folder}: no {WEIGHTS_NAME} in it; other formats are not read")
    try:
        content = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        kind = str(content["peft_type"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{folder}: {CONFIG_NAME} is not the configuration of a PEFT adapter") from error
    if kind != "LORA":
        raise InputError(f"{folder}: the adapter is {kind}; expected LORA, the only kind that is read")
    for name, what in BESIDE_LORA.items():
        if content.get(name):
            raise InputError(f"{folder}: {name} is set, so it holds {what}; expected an adapter of A and B alone")
    start = str(content.get("init_lora_weights", "")).lower()
    if start.startswith(CHANGED_BASES):
        raise InputError(
            f"{folder}: init_lora_weights is {start}, which changes the base's weights; convert it to an ordinary LoRA "
            "(save_pretrained with path_initial_model_for_weight_conversion)"
        )
    if content.get("bias", "none") != "none":
        raise InputError(f"{folder}: bias is {content['bias']!r}; expected 'none', since biases belong to the base")
    try:
        config, weights = LoraConfig.from_pretrained(str(folder)), load_file(folder / WEIGHTS_NAME)
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise InputError(f"{folder}: the adapter cannot be read ({first_line(error)}); save it again") from error
    _check_settings(folder, config)
    for name, tensor in weights.items():
        if not tensor.is_floating_point():
            raise InputError(f"{folder}: {name} is {tensor.dtype}; expected a floating-point type, as PEFT saves it")
        if not torch.isfinite(tensor).all():
            raise InputError(f"{folder}: {name} has values that are not finite numbers; train it again")
    _check_record(folder, config, weights)
    return config, weights


def check_weights(folder: Path, weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuse weights that do not match what a configuration asks for on this backbone.

    Args:
        folder: Folder of the adapter, for messages.
        weights: The saved weights.
        expected: The weights that PEFT would save for such an adapter on this backbone.

    Raises:
        InputError: If a weight is missing, has no place, or has another shape.
    """
    if missing := sorted(expected.keys() - weights.keys()):
        raise InputError(
            f"{folder}: {len(missing)} of the {len(expected)} weights that its configuration asks for are missing, "
            f"such as {missing[0]}; expected a complete adapter for this backbone"
        )
    if unknown := sorted(weights.keys() - expected.keys()):
        raise InputError(
            f"{folder}: {len(unknown)} weights have no place in what its configuration asks for, such as {unknown[0]}; "
            "expected A and B of the layers that it names"
        )
    for name, tensor in expected.items():
        if weights[name].shape != tensor.shape:
            raise InputError(
                f"{folder}: {name} has shape {tuple(weights[name].shape)}, and its configuration on this backbone asks "
                f"for {tuple(tensor.shape)}; use the backbone and the rank that it was trained with"
            )


def _check_settings(folder: Path, config: LoraConfig) -> None:
    """Refuse values that PEFT reads from a file without checking and fails on later."""
    expected = {
        "r": isinstance(config.r, int) and config.r >= 1,
        "lora_alpha": isinstance(config.lora_alpha, int | float) and 0 < config.lora_alpha < math.inf,
        "target_modules": isinstance(config.target_modules, str | set | list | None),
        "rank_pattern": isinstance(config.rank_pattern, dict | None),
        "alpha_pattern": isinstance(config.alpha_pattern, dict | None)
        and all(isinstance(a, int | float) and 0 < a < math.inf for a in (config.alpha_pattern or {}).values()),
    }
    for name, fits in expected.items():
        if not fits:
            value = getattr(config, name)
            raise InputError(
                f"{folder}: {name} is {value!r} in {CONFIG_NAME}; expected what PEFT writes; save it again"
            )


def _check_record(folder: Path, config: LoraConfig, weights: Mapping[str, Tensor]) -> None:
    """Check an adapter against the record of its run, if it is in a run's folder."""
    path = folder.parent / "record.json"
    if folder.name != "adapter" or not path.is_file():
        return
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        rank, blocks = record["rank"], list(record["block"])
        alpha = record["method_settings"].get("alpha") or rank
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return  # a broken record is reported when the run is opened
    found = {
        "rank": (config.r, rank),
        "blocks": (sorted({int(match[1]) for name in weights if (match := BLOCK.search(name))}), blocks),
        "alpha": (config.lora_alpha, alpha),
        "alpha_pattern": (config.alpha_pattern or {}, {}),
        "rank_pattern": (config.rank_pattern or {}, {}),
        "use_rslora": (bool(config.use_rslora), False),
    }
    for name, (here, there) in found.items():
        if here != there:
            raise InputError(
                f"{folder}: the adapter has {name} {here}, but the record of its run {there}; one of them was replaced"
            )
