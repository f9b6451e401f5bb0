"""The target tokens that are furthest from being recalled."""

import re
from collections.abc import Callable, Sequence

import numpy as np

from pml.escape import one_line
from pml.last_seen import TokenStates
from pml.tables import TextTable

__all__ = ["stubborn_table", "visible_text"]

NEIGHBOURS = 4


def visible_text(text: str) -> str:
    """Text on one line, with unprintable characters escaped and spaces at either end shown as ␣."""
    return re.sub("^ +| +$", lambda spaces: "␣" * len(spaces[0]), one_line(text))


def stubborn_table(
    standing: TokenStates, targets: Sequence[Sequence[int]], text: Callable[[Sequence[int]], str], most: int = 20
) -> TextTable:
    """Table of the target tokens with the smallest probability, smallest first, each in brackets in its context.

    Args:
        standing: Last scores of the target tokens.
        targets: Token ids of each target, by example id.
        text: Decodes token ids to text.
        most: Maximum number of tokens.
    """
    lengths = [len(target) for target in targets]
    ends = np.cumsum(lengths)
    scored = np.flatnonzero(~np.isnan(standing.probability))
    worst = scored[np.argsort(standing.probability[scored], kind="stable")][:most]
    rows = []
    for index in worst:
        example = int(np.searchsorted(ends, index, side="right"))
        position = int(index - (ends[example] - lengths[example]))
        target, margin = list(targets[example]), standing.margin[index]
        before, after = target[max(0, position - NEIGHBOURS) : position], target[position + 1 :][:NEIGHBOURS]
        around = [visible_text(text(ids)) if ids else "" for ids in (before, [target[position]], after)]
        # The rival is unknown in looks read from a file, and nothing wins over a token that is right.
        wins = standing.rival[index] >= 0 and not standing.correct[index]
        first_right = standing.first_right[example]
        rows.append(
            (
                str(example),
                "{} [{}] {}".format(*around).strip(),
                f"{position + 1} of {lengths[example]}",
                f"{standing.probability[index]:.3g}",
                "-" if np.isnan(margin) else f"{margin:+.2f}",
                visible_text(text([int(standing.rival[index])])) if wins else "-",
                "never" if first_right < 0 else f"{first_right:,}",
            )
        )
    return TextTable(
        "The most stubborn tokens",
        ("pair", "token in its target", "position", "p", "margin (logits)", "wins instead", "pair right from step"),
        rows,
        words=(1, 5),
        small=True,
    )
