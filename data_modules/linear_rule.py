"""A linear rule of two numbers: does an adapter memorise a table of its values, or learn the rule?"""

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from data_modules.base import MemorizationDataModule
from pml.corpus import Corpus, Pair, encode_pairs
from pml.errors import InputError

__all__ = ["LinearRule"]


class LinearRule(MemorizationDataModule):
    """Values of f(x, y) = a x + b y + c on a grid, asked as "f(3, 4) =", with a part held out (Table 3).

    The other values can be memorised as a table or as a rule; only the rule gives the held-out ones, which
    `callbacks.Generalization` asks for. The information in the values is unknown, since one rule gives them all.

    Args:
        a: Factor of x.
        b: Factor of y.
        c: Constant.
        size: Number of values of x and of y, from 0; the grid has `size` squared points.
        held_out_share: Share of the grid's points to hold out, drawn at random, in [0, 1). With the same seed, a larger
            share includes the points of a smaller one.
        end_of_turn: Make the end-of-turn token part of each target, so that recall includes stopping: one more
            supervised token per pair.
        **kwargs: See `MemorizationDataModule`.

    Raises:
        InputError: If `size` is below 1, or the share is out of range or leaves nothing to train on.
    """

    def __init__(
        self,
        a: int = 3,
        b: int = 5,
        c: int = 7,
        size: int = 10,
        held_out_share: float = 0.2,
        end_of_turn: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if size < 1:
            raise InputError(f"size is {size}; expected at least 1 value of x and of y")
        if not 0 <= held_out_share < 1:
            raise InputError(f"held_out_share is {held_out_share}; expected a share in [0, 1), such as 0.2")
        if round(held_out_share * size**2) == size**2:
            raise InputError(
                f"held_out_share is {held_out_share} of {size**2} points, which leaves none to train on; "
                "expected a smaller share or a larger size"
            )
        self.a = a
        self.b = b
        self.c = c
        self.size = size
        self.held_out_share = held_out_share
        self.end_of_turn = end_of_turn

    @property
    def settings(self) -> dict[str, Any]:
        rule = {"a": self.a, "b": self.b, "c": self.c, "size": self.size, "held_out_share": self.held_out_share}
        return {**rule, "end_of_turn": self.end_of_turn, **super().settings}

    def make_corpus(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Corpus:
        return self._encoded("linear_rule", self._split()[0], tokenizer)

    def make_held_out(self, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Corpus | None:
        held_out = self._split()[1]
        return self._encoded("linear_rule_held_out", held_out, tokenizer) if held_out else None

    def _split(self) -> tuple[list[Pair], list[Pair]]:
        """Pairs to train on and pairs to hold out, each in the order of the grid."""
        points = self.size**2
        order = torch.randperm(points, generator=torch.Generator().manual_seed(self.seed)).tolist()
        held_out = set(order[: round(self.held_out_share * points)])
        trained: list[Pair] = []
        others: list[Pair] = []
        for point in range(points):
            x, y = divmod(point, self.size)
            pair = Pair(f"f({x}, {y}) =", str(self.a * x + self.b * y + self.c))
            (others if point in held_out else trained).append(pair)
        return trained, others

    def _encoded(self, name: str, pairs: list[Pair], tokenizer: PreTrainedTokenizerBase) -> Corpus:
        examples = encode_pairs(pairs, self.encoder(tokenizer), end_of_turn=self.end_of_turn).examples
        return Corpus(name, examples, settings=self.settings)
