"""What all data modules do: make the corpus once, check that it fits the backbone, split it over ranks and epochs."""

import multiprocessing
import os
import re
import warnings
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning import LightningModule, Trainer
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import data_modules
from data_modules import Biographies, LinearRule, MemorizationDataModule, NaturalText
from pml.corpus import Corpus, Example
from pml.curriculum import PrefixRatio
from pml.errors import InputError

CORPORA = [getattr(data_modules, name) for name in data_modules.__all__ if name != "MemorizationDataModule"]


class Numbered(MemorizationDataModule):
    """Makes examples of increasing length and counts how often the corpus is made."""

    def __init__(self, pairs: int = 11, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.pairs = pairs
        self.made = 0

    def make_corpus(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Corpus:
        self.made += 1
        return Corpus("numbered", [Example(i, (1 + i % 7, i // 7), (3,) * (i + 1)) for i in range(self.pairs)])


class Observer(LightningModule):
    """Learns nothing and records the examples in each batch."""

    vocab_size = 8
    max_positions = 16

    def __init__(self, tokenizer: PreTrainedTokenizerBase, curriculum: PrefixRatio | None = None) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.curriculum = curriculum
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained: list[list[list[int]]] = []
        self.last_batches: list[bool] = []
        self.validated: list[int] = []

    def on_train_epoch_start(self) -> None:
        self.trained.append([])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.trained[-1].append(batch["example_id"].tolist())
        self.last_batches.append(self.trainer.is_last_batch)
        return self.weight

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.validated += batch["example_id"].tolist()

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> list[int]:
        return batch["example_id"].tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def trainer(tmp_path: Path, **options: Any) -> Trainer:
    options = {"max_epochs": 1, "num_sanity_val_steps": 0, **options}
    return Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def ids_of(batches: Any) -> list[list[int]]:
    return [batch["example_id"].tolist() for batch in batches]


def on_rank(rank: int, world_size: int, tokenizer: PreTrainedTokenizerBase, **options: Any) -> Numbered:
    """A data module as set up on one of several ranks."""
    module = SimpleNamespace(tokenizer=tokenizer, vocab_size=8, max_positions=None)
    data = Numbered(**options)
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        world_size=world_size, global_rank=rank, current_epoch=0, accumulate_grad_batches=1, lightning_module=module
    )
    data.setup("fit")
    return data


def test_without_a_trainer_the_dataloader_covers_the_whole_corpus(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    data = Numbered(pairs=5, batch_size=2, shuffle=False)
    corpus = data.build(tiny_tokenizer, vocab_size=8)
    assert data.corpus is corpus
    assert ids_of(data.train_dataloader()) == [[0, 1], [2, 3], [4]]


def test_a_batch_size_of_null_puts_the_share_of_each_rank_into_one_batch(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    data = Numbered(pairs=5, batch_size=None)
    data.build(tiny_tokenizer, vocab_size=8)
    assert [sorted(ids) for ids in ids_of(data.train_dataloader())] == [[0, 1, 2, 3, 4]]
    shares = [ids_of(on_rank(r, 2, tiny_tokenizer, pairs=5, batch_size=None).val_dataloader()) for r in range(2)]
    assert shares == [[[0, 1, 2]], [[3, 4]]]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("loader", ["train", "val", "test", "predict"])
def test_ranks_together_see_each_example_once_in_equal_numbers_of_batches(
    tiny_tokenizer: PreTrainedTokenizerBase, world_size: int, loader: str
) -> None:
    ranks = [
        ids_of(getattr(on_rank(rank, world_size, tiny_tokenizer, batch_size=2), f"{loader}_dataloader")())
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    seen = [i for batches in ranks for batch in batches for i in batch if i != -1]
    assert sorted(seen) == list(range(11))


def test_training_is_reshuffled_each_epoch_and_validation_is_in_order(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    module = Observer(tiny_tokenizer)
    trainer(tmp_path, max_epochs=3).fit(module, datamodule=Numbered(batch_size=4))
    assert len({str(epoch) for epoch in module.trained}) == 3
    assert all(sorted(chain(*epoch)) == list(range(11)) for epoch in module.trained)
    assert module.validated == list(range(11)) * 3


def test_epochs_grow_under_a_curriculum_and_lightning_knows_the_last_batch_of_each(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    module = Observer(tiny_tokenizer, curriculum=PrefixRatio([0.2, 0.6, 1.0], [1, 3, 4]))
    trainer(tmp_path, max_epochs=5).fit(module, datamodule=Numbered(batch_size=2))
    assert [len(epoch) for epoch in module.trained] == [1, 3, 3, 6, 6]
    assert module.last_batches == [last for n in [1, 3, 3, 6, 6] for last in [False] * (n - 1) + [True]]
    active = [set(chain(*epoch)) for epoch in module.trained]
    assert active[0] < active[1] == active[2] < active[3] == set(range(11))
    assert len(module.validated) == 5 * 11  # validation includes examples that are not active yet


def test_a_resumed_run_continues_the_curriculum_with_the_same_batches(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    def observer() -> Observer:
        return Observer(tiny_tokenizer, curriculum=PrefixRatio([0.2, 0.6, 1.0], [1, 3, 4]))

    whole, begun, resumed = observer(), observer(), observer()
    trainer(tmp_path, max_epochs=5).fit(whole, datamodule=Numbered(batch_size=2))
    first = trainer(tmp_path, max_epochs=2)
    first.fit(begun, datamodule=Numbered(batch_size=2))
    first.save_checkpoint(tmp_path / "begun.ckpt")
    trainer(tmp_path, max_epochs=5).fit(
        resumed, datamodule=Numbered(batch_size=2), ckpt_path=tmp_path / "begun.ckpt", weights_only=True
    )
    assert begun.trained + resumed.trained == whole.trained


def test_prediction_covers_the_corpus_in_order_without_a_sampler_warning(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*sampler.*")
        batches = trainer(tmp_path).predict(Observer(tiny_tokenizer), datamodule=Numbered(batch_size=4, drop_last=True))
    assert batches is not None
    assert list(chain(*batches)) == list(range(11))


def test_the_corpus_is_made_once_for_fit_and_validate(tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    module, data = Observer(tiny_tokenizer), Numbered()
    trainer(tmp_path).fit(module, datamodule=data)
    trainer(tmp_path).validate(module, datamodule=data, verbose=False)
    assert data.made == 1


def test_an_example_longer_than_the_context_is_refused_with_both_lengths(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    Numbered(pairs=5).build(tiny_tokenizer, vocab_size=8, max_positions=7)
    with pytest.raises(InputError, match=r"example 5 has 8 tokens \(2 prompt, 6 target\).* 7 positions"):
        Numbered(pairs=6).build(tiny_tokenizer, vocab_size=8, max_positions=7)


def test_a_token_id_outside_the_vocabulary_of_the_backbone_is_refused_with_its_token(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    with pytest.raises(InputError, match=r"'numbered': example 0 has the token '\$' \(id 3\).* knows ids below 3"):
        Numbered(pairs=1).build(tiny_tokenizer, vocab_size=3)


class Twice(MemorizationDataModule):
    """Two targets for one prompt."""

    def make_corpus(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Corpus:
        return Corpus("twice", [Example(0, (1,), (2,)), Example(1, (1,), (3,), source="f:2")])


def test_two_targets_for_one_prompt_are_refused_with_both_examples(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InputError, match=r"example 1 \(f:2\) has the same prompt as example 0, and another target"):
        Twice().build(tiny_tokenizer, vocab_size=8)


def test_a_curriculum_with_the_whole_corpus_in_one_batch_is_refused(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="set batch_size"):
        trainer(tmp_path).fit(Observer(tiny_tokenizer, PrefixRatio()), datamodule=Numbered(batch_size=None))


def test_a_batch_size_of_zero_is_refused() -> None:
    with pytest.raises(InputError, match="batch_size is 0"):
        Numbered(batch_size=0)


def test_accessing_the_corpus_before_it_is_built_says_how_to_build_it() -> None:
    with pytest.raises(RuntimeError, match="`setup` or `build`"):
        _ = Numbered().corpus


@pytest.mark.parametrize("corpus_class", CORPORA)
def test_each_constructor_argument_is_an_option_with_help(corpus_class: type[MemorizationDataModule]) -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(corpus_class, "data")
    text = " ".join(parser.format_help().split("--data CONFIG")[-1].split())
    options = dict(option.split(maxsplit=1) for option in text.split(" --data.")[1:])
    assert {"batch_size", "seed", "system"} <= options.keys()
    without_help = [name for name, text in options.items() if re.match(r"\S+ \(type", text)]
    assert without_help == []


def hashes(folder: Path) -> tuple[list[str], int]:
    """Content hashes of each randomly drawn corpus for two seeds, and a string's `hash`, which differs by process."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = {"length": 40, "count": 3, "random_ratio": 0.5}
    kinds: list[tuple[Any, dict[str, Any]]] = [(Biographies, {}), (LinearRule, {}), (NaturalText, text)]
    data = [kind(seed=seed, **settings) for kind, settings in kinds for seed in (1, 2)]
    return [each.build(tokenizer, len(tokenizer)).content_hash for each in data], hash("text")


def test_a_seed_gives_the_same_corpus_in_every_process_and_different_seeds_differ(
    tiny_backbone_folder: Path,
) -> None:
    if "PYTHONHASHSEED" in os.environ:
        pytest.skip("PYTHONHASHSEED gives all processes the same hashes, so that a corpus that hangs on them passes")
    with ProcessPoolExecutor(1, multiprocessing.get_context("forkserver")) as processes:
        there, text_there = processes.submit(hashes, tiny_backbone_folder).result()
    here, text_here = hashes(tiny_backbone_folder)
    assert text_there != text_here
    assert there == here
    assert len(set(here)) == 6
