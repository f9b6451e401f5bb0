"""Uniform random tokens: nothing to understand, everything to memorise, with exactly known information."""

import math
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from data_modules._replacement import ordinary_ids
from data_modules.base import MemorizationDataModule
from pml.corpus import Corpus, Example
from pml.errors import InputError

__all__ = ["PUBLISHED_PROMPT", "RandomTokens"]

PUBLISHED_PROMPT = "Please output the content of the vector memory injected into the activations."


class RandomTokens(MemorizationDataModule):
    """Targets drawn uniformly from the vocabulary without its special tokens.

    Targets are ids only: they are never decoded or encoded as text, and get no end-of-turn token. With the same seed, a
    longer single target starts with the tokens of a shorter one, and a larger corpus starts with the same targets.

    Args:
        length: Tokens in each target.
        count: Number of targets.
        prompt: The query; with several targets a number is appended, so that each target has its own query.
        **kwargs: See `MemorizationDataModule`.

    Raises:
        InputError: If `length` or `count` is below 1.
    """

    def __init__(self, length: int = 64, count: int = 1, prompt: str = PUBLISHED_PROMPT, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if length < 1:
            raise InputError(f"length is {length}; expected at least 1 token per target")
        if count < 1:
            raise InputError(f"count is {count}; expected at least 1 target")
        self.length = length
        self.count = count
        self.prompt = prompt

    @property
    def settings(self) -> dict[str, Any]:
        return {"length": self.length, "count": self.count, "prompt": self.prompt, **super().settings}

    def make_corpus(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Corpus:
        candidates = torch.tensor(ordinary_ids(tokenizer, vocabulary))
        generator = torch.Generator().manual_seed(self.seed)
        drawn = candidates[torch.randint(len(candidates), (self.count * self.length,), generator=generator)]
        encoder = self.encoder(tokenizer)
        examples = []
        for i, target in enumerate(drawn.view(self.count, self.length).tolist()):
            query = self.prompt if self.count == 1 else f"{self.prompt} {i + 1}"
            examples.append(Example(i, encoder.prompt(query).ids, tuple(target), query=query))
        encoder.warn_of_changes("random_tokens")
        entropy_bits = self.count * self.length * math.log2(len(candidates))
        return Corpus("random_tokens", examples, entropy_bits, self.settings)
