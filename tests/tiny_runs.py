"""Small corpora of token ids and trainers that write no files, shared by tests of modules, callbacks and loops."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from transformers import PreTrainedTokenizerBase

from data_modules import MemorizationDataModule
from pml.corpus import Corpus, Example


class Ids(MemorizationDataModule):
    """Examples given as token ids."""

    def __init__(self, examples: Sequence[tuple[Sequence[int], Sequence[int]]], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.examples = [Example(i, tuple(p), tuple(t)) for i, (p, t) in enumerate(examples)]

    def make_corpus(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Corpus:
        return Corpus("ids", self.examples, entropy_bits=8.0 * sum(len(e.target_ids) for e in self.examples))


def uneven(count: int, seed: int = 5) -> list[tuple[list[int], list[int]]]:
    """Random examples with prompts of 3 to 6 tokens and targets of 1 to 7."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(0, 256, (length,), generator=generator).tolist()

    return [(draw(3, 7), draw(1, 8)) for _ in range(count)]


def make_trainer(folder: Path, **arguments: Any) -> Trainer:
    """A quiet trainer on one CPU process unless told otherwise."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "max_epochs": 1,
        "default_root_dir": folder,
        "use_distributed_sampler": False,
    }
    return Trainer(**{**defaults, **arguments})
