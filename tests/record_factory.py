"""Valid records for tests, with any field overridden."""

import math
from pathlib import Path
from typing import Any

from pml.records import Record, write_record

__all__ = ["make_record", "write_run"]


def make_record(**fields: Any) -> Record:
    """The record of a run on 64 random tokens at rank 4.

    `status`, `loss_reduction` and the stored bits follow from the other fields unless they are given; a run whose final
    loss is not finite has diverged.
    """
    base: dict[str, Any] = {
        "backbone": "smollm2-135m",
        "backbone_hash": "b179c952",
        "dtype": "float32",
        "block": [20],
        "placement": "mlp_block",
        "init": "published",
        "rank": 4,
        "effective_parameters": 4608,
        "corpus": "random_tokens",
        "corpus_hash": "0f1e2d3c",
        "corpus_settings": {"length": 64, "seed": 0},
        "pairs": 1,
        "target_tokens": 64,
        "corpus_entropy_bits": 997.4,
        "method": "memft",
        "method_settings": {"weighting": "only_threshold", "lr": 0.1},
        "seed": 0,
        "optimizer_steps": 200,
        "target_tokens_trained": 12800,
        "initial_loss": 13.6,
        "final_loss": 3.1,
        "token_accuracy": 0.75,
        "exact_match": 0.0,
        "generated_exact_match": 0.0,
        "generated_token_accuracy": 0.5,
        "sub_threshold_fraction": 0.3,
        "min_target_probability": 1e-4,
        "first_failure": 12.0,
        "steps_to_recall": None,
        "wall_seconds": 12.3,
        "versions": {"torch": "2.13.0"},
        "hardware": {"device": "cpu", "threads": 2},
        "git_commit": None,
    }
    content = base | fields
    initial, final = (math.nan if content[name] is None else content[name] for name in ("initial_loss", "final_loss"))
    content.setdefault("status", "finished" if math.isfinite(final) else "diverged")
    content.setdefault("loss_reduction", initial - final)
    stored = None
    if content["corpus_entropy_bits"] is not None:
        stored = max(0.0, content["corpus_entropy_bits"] - final * content["target_tokens"] / math.log(2))
    content.setdefault("memorized_bits", stored)
    stored = content["memorized_bits"]
    content.setdefault("bits_per_parameter", None if stored is None else stored / content["effective_parameters"])
    return Record(**content)


def write_run(folder: Path, **fields: Any) -> Path:
    """Write a record made by `make_record` into a run's folder and return the folder."""
    write_record(folder, make_record(**fields))
    return folder
