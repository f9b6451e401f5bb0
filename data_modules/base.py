"""Base of all corpora: encoding with the backbone's tokenizer, batches for each rank, evaluation in order."""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Self

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from pml.corpus import PADDING_EXAMPLE, Corpus, Example, collate
from pml.curriculum import CorpusBatchSampler, PrefixRatio
from pml.encoding import PromptFormat, TextEncoder
from pml.errors import InputError
from pml.token_scores import TokenScores

__all__ = ["MemorizationDataModule", "TemplateValue"]

TemplateValue = str | bool | int | float | list | dict | None  # type: ignore[type-arg]
"""Value of a template variable. Nothing in it is `Any`, for which jsonargparse would read quoted text as YAML."""


class MemorizationDataModule(LightningDataModule, ABC):
    """One corpus for both training and evaluation: what is memorised has no separate split.

    A subclass must implement only `make_corpus`. If it has a held-out part it also overrides `make_held_out`, and if it
    has measures of its own, `figures`.

    Args:
        batch_size: Examples per rank and micro-batch; null puts the whole corpus into one batch.
        shuffle: Train in a new order each epoch; false keeps the order of the corpus.
        drop_last: Leave out the examples that do not fill the last optimiser step of an epoch.
        seed: Seed of the corpus and of the order of its examples; the run's own seed changes neither.
        chat_template: Put the query into the tokenizer's chat template, if it has one.
        system: Text of a system turn before the query; null leaves that to the chat template.
        template_kwargs: Variables of the chat template, such as `{enable_thinking: false}`.
        template_date: Date, as YYYY-MM-DD, that a chat template which reads the clock writes in place of today's.

    Raises:
        InputError: If `batch_size` is below 1, a variable of the template has a reserved name, or the date is invalid.
    """

    def __init__(
        self,
        *,
        batch_size: int | None = 8,
        shuffle: bool = True,
        drop_last: bool = False,
        seed: int = 42,
        chat_template: bool = True,
        system: str | None = None,
        template_kwargs: dict[str, TemplateValue] | None = None,
        template_date: str = PromptFormat.template_date,
    ) -> None:
        super().__init__()
        # Keeps the arguments, so that a run made from Python can be opened again.
        self.save_hyperparameters(logger=False)
        if batch_size is not None and batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; expected at least 1, or null for the whole corpus")
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.seed = seed
        self.prompt_format = PromptFormat(chat_template, system, template_kwargs or {}, template_date)
        self._corpus: Corpus | None = None
        self._held_out: Corpus | None = None

    @abstractmethod
    def make_corpus(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Corpus:
        """Make the corpus, as token ids.

        Args:
            tokenizer: The backbone's tokenizer.
            vocabulary: Number of token ids that the backbone knows.
        """

    def make_held_out(self, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Corpus | None:
        """Make the held-out part, which is asked for but never trained on; None if the corpus has no such part.

        Args:
            corpus: The part that is trained on.
            tokenizer: The backbone's tokenizer.
            vocabulary: Number of token ids that the backbone knows.
        """
        return None

    def figures(self, scores: TokenScores) -> dict[str, float]:
        """Measures that only this kind of corpus has, for the record; their names include the unit.

        Args:
            scores: Scores of the whole corpus, one row per example, in order.
        """
        return {}

    def encoder(self, tokenizer: PreTrainedTokenizerBase) -> TextEncoder:
        """The encoder of text into token ids, with the prompt format of this corpus.

        Args:
            tokenizer: The backbone's tokenizer.
        """
        return TextEncoder(tokenizer, self.prompt_format)

    def with_seed(self, seed: int) -> Self:
        """A copy with another seed, not built yet: a second draw of everything random."""
        other = copy.copy(self)
        other.seed, other._corpus, other._held_out = seed, None, None
        return other

    @property
    def held_out(self) -> Corpus | None:
        """The part that is asked for but never trained on; None if there is none, or before `setup` or `build`."""
        return self._held_out

    @property
    def corpus(self) -> Corpus:
        """The corpus to memorise; available once `setup` or `build` has run."""
        if self._corpus is None:
            raise RuntimeError("the corpus is made by `setup` or `build`; neither has run")
        return self._corpus

    def build(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, max_positions: int | None = None) -> Corpus:
        """Make the corpus without a trainer.

        Args:
            tokenizer: The backbone's tokenizer.
            vocab_size: Number of token ids that the backbone knows.
            max_positions: Number of tokens that fit into the backbone's context; None means no limit.

        Raises:
            InputError: If an example does not fit or has ids that the backbone does not know, if examples with the same
                prompt have different targets, or if the source of the corpus is invalid.
        """
        corpus = self.make_corpus(tokenizer, vocab_size)
        held_out = self.make_held_out(corpus, tokenizer, vocab_size)
        for part in (corpus, held_out) if held_out is not None else (corpus,):
            _refuse_what_cannot_be_learnt(part, tokenizer, vocab_size, max_positions)
        self._corpus, self._held_out = corpus, held_out
        return corpus

    def use(self, corpus: Corpus, held_out: Corpus | None = None) -> None:
        """Use a corpus that was made before, such as that of a finished run, instead of making one."""
        self._corpus, self._held_out = corpus, held_out

    def setup(self, stage: str | None = None) -> None:
        """Make the corpus for the trainer's module, but only once: every stage calls this."""
        assert self.trainer is not None
        if self._curriculum is not None:
            if self.batch_size is None:
                raise InputError("a curriculum grows by whole batches; set batch_size to a part of the corpus")
            # Epochs get longer under a curriculum, and Lightning counts their batches only when it reloads.
            self.trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]  # set without a declaration
        if self._corpus is None:
            module: Any = self.trainer.lightning_module
            self.build(module.tokenizer, module.vocab_size, module.max_positions)

    def train_dataloader(self) -> DataLoader[Sequence[Example]]:
        """The training batches of this rank, under the module's curriculum if it has one."""
        return self._dataloader(shuffle=self.shuffle, drop_last=self.drop_last, curriculum=self._curriculum)

    def val_dataloader(self) -> DataLoader[Sequence[Example]]:
        """This rank's share of the whole corpus, each example once and in order."""
        return self._dataloader()

    test_dataloader = predict_dataloader = val_dataloader

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that every corpus has, for the record; a subclass adds its own."""
        return {"seed": self.seed, **asdict(self.prompt_format)}

    @property
    def _curriculum(self) -> PrefixRatio | None:
        return getattr(self.trainer.lightning_module, "curriculum", None) if self.trainer is not None else None

    def _dataloader(
        self, shuffle: bool = False, drop_last: bool = False, curriculum: PrefixRatio | None = None
    ) -> DataLoader[Sequence[Example]]:
        world_size = self.trainer.world_size if self.trainer is not None else 1
        sampler = CorpusBatchSampler(
            len(self.corpus),
            self.batch_size or math.ceil(len(self.corpus) / world_size),
            seed=self.seed,
            shuffle=shuffle,
            drop_last=drop_last,
            curriculum=curriculum,
            rank=self.trainer.global_rank if self.trainer is not None else 0,
            world_size=world_size,
            accumulate=self.trainer.accumulate_grad_batches if self.trainer is not None else 1,
        )
        # Lightning counts the batches of a reloaded epoch before it calls `set_epoch`.
        sampler.set_epoch(self.trainer.current_epoch if self.trainer is not None else 0)
        return _ResumableLoader(
            _Batches(self.corpus.examples),
            sampler=sampler,
            batch_size=None,  # the sampler yields whole batches
            collate_fn=collate,
            # Each iterator draws a seed: from a separate generator, so that evaluation does not change training.
            generator=torch.Generator(),
            num_workers=0,  # batches are in memory already; workers would only add start-up time
        )


def _refuse_what_cannot_be_learnt(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, vocab_size: int, max_positions: int | None
) -> None:
    known: dict[tuple[int, ...], Example] = {}
    for example in corpus.examples:
        where = f"corpus {corpus.name!r}: example {example.example_id}" + (
            f" ({example.source})" if example.source else ""
        )
        if max_positions is not None and len(example) > max_positions:
            raise InputError(
                f"{where} has {len(example)} tokens ({len(example.prompt_ids)} prompt, {len(example.target_ids)} "
                f"target), the backbone has {max_positions} positions; use shorter targets or a backbone with a longer "
                "context"
            )
        if (highest := max(max(example.prompt_ids), max(example.target_ids))) >= vocab_size:
            raise InputError(
                f"{where} has the token {tokenizer.convert_ids_to_tokens(highest)!r} (id {highest}), and the backbone "
                f"knows ids below {vocab_size}; write the text without it, or use the backbone's own tokenizer"
            )
        before = known.setdefault(example.prompt_ids, example)
        if before.target_ids != example.target_ids:
            raise InputError(
                f"{where} has the same prompt as example {before.example_id}, and another target; no model can recall "
                "both: make their queries differ"
            )


class _ResumableLoader(DataLoader[Sequence[Example]]):
    """A loader whose position within an epoch goes into checkpoints, through Lightning's call of `state_dict`."""

    def state_dict(self) -> dict[str, Any]:
        return self.sampler.state_dict()  # type: ignore[attr-defined]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sampler.load_state_dict(state)  # type: ignore[attr-defined]


class _Batches(Dataset[Sequence[Example]]):
    """The examples of a corpus, indexed by a batch of their ids; -1 is the padding example."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, example_ids: Sequence[int]) -> Sequence[Example]:
        return [PADDING_EXAMPLE if i == PADDING_EXAMPLE.example_id else self.examples[i] for i in example_ids]
