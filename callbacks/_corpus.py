"""The corpus that a trainer works on, for callbacks that cannot do without it."""

from typing import Any

from lightning.pytorch import Callback, Trainer

from pml.corpus import Corpus
from pml.errors import InputError

__all__ = ["corpus_of"]


def corpus_of(trainer: Trainer, callback: Callback) -> Corpus:
    """The corpus of the trainer's data module.

    Args:
        trainer: The trainer.
        callback: Who needs the corpus, for the message.

    Raises:
        InputError: If there is none, as when a trainer made in Python is given dataloaders.
    """
    datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
    if not hasattr(datamodule, "corpus"):
        raise InputError(
            f"{type(callback).__name__} needs the corpus, and the trainer has no data module with one; expected "
            "datamodule=..., as in trainer.fit(module, datamodule=PhoneBook()), in place of dataloaders"
        )
    corpus: Corpus = datamodule.corpus
    return corpus
