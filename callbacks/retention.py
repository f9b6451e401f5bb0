"""What memorising costs the model: its loss on text outside the corpus, frozen and adapted."""

import logging
from collections.abc import Iterable
from pydoc_data.topics import topics
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from transformers import PreTrainedTokenizerBase

from callbacks._before_and_after import BeforeAndAfter
from callbacks._corpus import corpus_of
from pml import metrics
from pml.corpus import Corpus, Example
from pml.encoding import PromptFormat, TextEncoder
from pml.errors import InputError
from pml.modules import Memorization
from pml.recall import score_examples

__all__ = ["Retention"]

log = logging.getLogger(__name__)

PASSAGE_TOKENS = 128
CHARACTERS_PER_TOKEN = 16
"""More than any tokenizer's average on English text, so this many for each token hold a passage."""


class Retention(BeforeAndAfter):
    """Measures the loss on text outside the corpus: of the frozen model before the fit, of the adapted one after it.

    There are two kinds of text, both measured in nats per target token: general text, and non-members. These are pairs
    from a second draw of the corpus, with another seed, whose queries are not in the corpus. A corpus that another seed
    does not change, such as one from a file, has no non-members.

    Args:
        text: A corpus of general text; null takes passages of 128 tokens from the Python language reference of the
            running interpreter, without a chat template. Pairs whose query is in the memorised corpus are left out.
        non_members: Also measure non-members.
        examples: Most examples to measure of each kind.
        every_n_steps: Also measure and log the adapted model after every n optimiser steps; 0 turns this off.
        batch_size: Number of examples scored together.

    Raises:
        InputError: If a number is out of range, or all queries of `text` are in the memorised corpus.
    """

    tag = "retention"

    def __init__(
        self,
        text: LightningDataModule | None = None,
        non_members: bool = True,
        examples: int = 16,
        every_n_steps: int = 0,
        batch_size: int = 8,
    ) -> None:
        super().__init__()
        for name, value in (("examples", examples), ("batch_size", batch_size)):
            if value < 1:
                raise InputError(f"{name} is {value}; expected at least 1 example")
        if every_n_steps < 0:
            raise InputError(f"every_n_steps is {every_n_steps}; expected a number of steps, or 0 for never")
        if text is not None and not hasattr(text, "build"):
            raise InputError(f"text is a {type(text).__name__}; expected a corpus, such as data_modules.RandomTokens")
        self.text = text
        self.non_members = non_members
        self.examples = examples
        self.every_n_steps = every_n_steps
        self.batch_size = batch_size
        self._texts: dict[str, list[Example]] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            assert isinstance(pl_module, Memorization)
            datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
            self._texts = self._texts_outside(corpus_of(trainer, self), datamodule, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # The step is 0 until the micro-batches of the first step are complete.
        if self.every_n_steps and trainer.global_step and trainer.global_step % self.every_n_steps == 0:
            self.measure(trainer, pl_module)

    def tokens(self, name: str) -> int:
        return sum(len(e.target_ids) for e in self._texts[name])

    def losses(self, module: Memorization) -> dict[str, float]:
        return {
            name: metrics.mean_loss(score_examples(module, examples, self.batch_size)).item()
            for name, examples in self._texts.items()
        }

    def _texts_outside(self, corpus: Corpus, datamodule: Any, module: Memorization) -> dict[str, list[Example]]:
        made = (module.tokenizer, module.vocab_size, module.max_positions)
        text: Any = self.text
        if text is not None:
            general: Corpus = text.build(*made)
        else:
            general = _python_reference(module.tokenizer, self.examples, module.max_positions)
        texts = {general.name: self._not_asked(general.examples, corpus)}
        if not texts[general.name]:
            raise InputError(
                f"retention text {general.name!r} asks only what the corpus {corpus.name!r} asks too; expected text "
                "that is not memorised, with queries of its own"
            )
        if self.non_members and hasattr(datamodule, "with_seed"):
            other = self._not_asked(datamodule.with_seed(datamodule.seed + 1).build(*made).examples, corpus)
            if other:
                texts["non_members"] = other
            else:
                log.info("retention: another seed of %s asks for nothing new, so it has no non-members", corpus.name)
        return texts

    def _not_asked(self, examples: Iterable[Example], corpus: Corpus) -> list[Example]:
        """The first `self.examples` examples whose prompts are not in the corpus."""
        asked = {example.prompt_ids for example in corpus.examples}
        return [example for example in examples if example.prompt_ids not in asked][: self.examples]


def _python_reference(tokenizer: PreTrainedTokenizerBase, passages: int, max_positions: int | None) -> Corpus:
    """Beginnings of chapters of the Python language reference, by title; the first token of each is its prompt."""
    longest = min(PASSAGE_TOKENS + 1, max_positions or PASSAGE_TOKENS + 1)
    encoder = TextEncoder(tokenizer, PromptFormat(chat_template=False))
    examples: list[Example] = []
    for title in sorted(topics):
        # Only the beginning is encoded: some chapters are as long as a book.
        beginning = topics[title][: CHARACTERS_PER_TOKEN * PASSAGE_TOKENS]
        ids = encoder.document(beginning)
        if len(ids) >= longest and len(examples) < passages:
            examples.append(Example(len(examples), tuple(ids[:1]), tuple(ids[1:longest])))
    return Corpus("python_reference", examples)
