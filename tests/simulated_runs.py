"""Simulated run folders with consistent records and per-token results, for tests that evaluate many runs."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from record_factory import make_record

from pml.last_seen import TokenStates
from pml.records import write_record
from pml.token_history import HISTORY_NAME, HistoryRecorder

__all__ = ["write_diverged_run", "write_history", "write_simulated_grid", "write_simulated_run"]

VOCABULARY = 49152
FROZEN_LOSS = 13.6
PARAMETERS_PER_RANK = 1152
METHODS: dict[str, dict[str, Any]] = {
    "sft": {"weighting": {"class_path": "pml.weighting.Uniform", "init_args": {}}, "learning_rate": 0.2},
    "memft": {"weighting": {"class_path": "pml.weighting.OnlyThreshold", "init_args": {}}, "learning_rate": 0.2},
}


def write_simulated_run(
    folder: Path, rank: int, length: int, seed: int = 0, method: str = "sft", pairs: int = 1, **fields: Any
) -> Path:
    """Write a finished run whose loss falls by 60 (r / l)^0.5 + 0.5 with 2 % noise, but not below 0.05.

    Token losses scatter around the mean. A token is right if its loss is below ln 2, and half of the time if it is
    below 1.5.
    """
    rng = np.random.default_rng([rank, length, seed, len(method)])
    reduction = (60 * (rank / length) ** 0.5 + 0.5) * math.exp(0.02 * rng.standard_normal())
    mean = max(FROZEN_LOSS - reduction, 0.05)
    losses = rng.gamma(0.7, mean / 0.7, length)
    losses *= mean / losses.mean()
    correct = (losses < math.log(2)) | ((losses < 1.5) & (rng.random(length) < 0.5))
    examples = np.sort(np.arange(length) % pairs)
    positions = np.concatenate([np.arange(n) for n in np.bincount(examples)])
    entropy = length * math.log2(VOCABULARY)
    stored = max(0.0, entropy - mean * length / math.log(2))
    by_example = [correct[examples == example] for example in range(pairs)]
    content: dict[str, Any] = {
        "rank": rank,
        "effective_parameters": PARAMETERS_PER_RANK * rank,
        "target_tokens": length,
        "pairs": pairs,
        "seed": seed,
        "method": method,
        "method_settings": METHODS[method],
        "corpus_hash": f"{length:08x}{seed:08x}",
        "corpus_settings": {"length": length, "seed": seed},
        "corpus_entropy_bits": entropy,
        "initial_loss": FROZEN_LOSS,
        "final_loss": mean,
        "token_accuracy": float(correct.mean()),
        "exact_match": float(np.mean([right.all() for right in by_example])),
        "generated_exact_match": None,
        "generated_token_accuracy": None,
        "sub_threshold_fraction": float((losses >= math.log(2)).mean()),
        "min_target_probability": float(np.exp(-losses.max())),
        "memorized_bits": stored,
        "bits_per_parameter": stored / (PARAMETERS_PER_RANK * rank),
        "late_loss_drop": 0.01,
        "learning_rate_left": 0.005,
    }
    folder.mkdir(parents=True, exist_ok=True)
    columns = {
        "example_id": pa.array(examples, pa.int32()),
        "position": pa.array(positions, pa.int32()),
        "token_id": pa.array(rng.integers(0, VOCABULARY, length), pa.int32()),
        "loss": pa.array(losses, pa.float32()),
        "correct": pa.array(correct, pa.bool_()),
    }
    pq.write_table(pa.table(columns), folder / "tokens.parquet")
    write_record(folder, make_record(**(content | fields)))
    return folder


def write_diverged_run(folder: Path, rank: int, length: int, **fields: Any) -> Path:
    """Write a diverged run: its adapter yields only NaN, so neither the run nor any of its tokens has a loss."""
    lost = ("final_loss", "loss_reduction", "min_target_probability", "memorized_bits", "bits_per_parameter")
    shares = {"token_accuracy": 0.0, "exact_match": 0.0, "sub_threshold_fraction": 1.0}
    without = {**dict.fromkeys(lost), "late_loss_drop": None, **shares, "status": "diverged"}
    write_simulated_run(folder, rank, length, **{**without, **fields})
    tokens = pq.read_table(folder / "tokens.parquet")
    place = tokens.column_names.index("loss")
    tokens = tokens.set_column(place, "loss", pa.array([math.nan] * length, pa.float32()))
    pq.write_table(tokens, folder / "tokens.parquet")
    return folder


def write_simulated_grid(
    folder: Path,
    ranks: tuple[int, ...] = (1, 2, 4, 6),
    lengths: tuple[int, ...] = (64, 128, 256),
    seeds: tuple[int, ...] = (0, 1),
    methods: tuple[str, ...] = ("sft",),
    **fields: Any,
) -> Path:
    """Write a run for every combination of rank, length, seed and method."""
    for method in methods:
        for rank in ranks:
            for length in lengths:
                for seed in seeds:
                    name = f"{method}-rank-{rank}-length-{length}-seed-{seed}"
                    write_simulated_run(folder / name, rank, length, seed, method, **fields)
    return folder


def write_history(folder: Path) -> Path:
    """Write a history of three looks beside a run's tokens: all tokens wrong, then the first half of each target right.

    At the last look the first target fails at its second token, the next one at its third, and so on; the last target
    does not fail.
    """
    tokens = pq.read_table(folder / "tokens.parquet")
    example, position = (tokens[name].to_numpy() for name in ("example_id", "position"))
    sizes = np.bincount(example)
    fails = (position == example + 1) & (example < example.max())
    recorder = HistoryRecorder([list(range(size)) for size in sizes])
    half = position < sizes[example] / 2
    for step, certain in ((0, np.zeros_like(half)), (10, half), (100, ~fails)):
        probability = np.where(certain, 0.9, 0.05).astype(np.float32)
        margin = np.where(certain, 2.0, -1.5).astype(np.float32)
        unknown = np.full(len(example), -1, np.int32)
        recorder.add(step, TokenStates(probability, certain, margin, unknown, np.full(len(sizes), -1)))
    recorder.write(folder / HISTORY_NAME)
    return folder
