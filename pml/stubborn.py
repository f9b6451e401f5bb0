"""The target tokens that are furthest from being recalled, and how to show text that may hold anything."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from pml.last_seen import Standing

__all__ = ["StubbornToken", "markdown_text", "most_stubborn", "stubborn_table", "visible_text"]

NEIGHBOURS = 4


class StubbornToken(NamedTuple):
    """A target token that is far from being recalled, with the text around it.

    Attributes:
        example: Index of its target.
        position: Its place there, from 0.
        before: Text of the tokens before it.
        token: Its own text.
        after: Text of the tokens after it.
        probability: Its probability.
        margin: Its logit minus that of the best other token; None where not known.
        rival: Text of the token that wins instead; empty where it is itself the argmax, or not known.
        first_right: Step at which its target was first right; None where never.
    """

    example: int
    position: int
    before: str
    token: str
    after: str
    probability: float
    margin: float | None
    rival: str
    first_right: int | None


def visible_text(text: str) -> str:
    """Text on one line: what does not print as Python writes it, a space at an end made visible."""
    printable = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    inner = printable.strip(" ")
    left = len(printable) - len(printable.lstrip(" "))
    return "␣" * left + inner + "␣" * (len(printable) - left - len(inner))


def markdown_text(text: str) -> str:
    """Text as Markdown and HTML show it, whatever is in it: `visible_text` with nothing in it taken for markup.

    Example:
        >>> markdown_text("a|b" + chr(10))
        'a&#124;b&#92;n'
    """
    # Entities stand for themselves in either language; a backslash before a pipe does not in every table.
    return "".join(c if c.isalnum() or c in " ␣,;" or ord(c) > 127 else f"&#{ord(c)};" for c in visible_text(text))


def most_stubborn(
    standing: Standing, targets: Sequence[Sequence[int]], text: Callable[[Sequence[int]], str], most: int = 20
) -> list[StubbornToken]:
    """The target tokens with the smallest probability, the smallest first.

    Args:
        standing: How the tokens stand.
        targets: Token ids of each target, by example id.
        text: The text of token ids.
        most: Most tokens.
    """
    lengths = [len(target) for target in targets]
    ends = np.cumsum(lengths)
    scored = np.flatnonzero(~np.isnan(standing.probability))
    worst = scored[np.argsort(standing.probability[scored], kind="stable")][:most]
    found = []
    for index in worst:
        example = int(np.searchsorted(ends, index, side="right"))
        position = int(index - (ends[example] - lengths[example]))
        target = list(targets[example])
        before, after = target[max(0, position - NEIGHBOURS) : position], target[position + 1 :][:NEIGHBOURS]
        margin, rival = float(standing.margin[index]), int(standing.rival[index])
        first = int(standing.first_right[example])
        found.append(
            StubbornToken(
                example=example,
                position=position,
                before=text(before) if before else "",
                token=text(target[position : position + 1]),
                after=text(after) if after else "",
                probability=float(standing.probability[index]),
                margin=None if np.isnan(margin) else margin,
                rival="" if standing.correct[index] or rival < 0 else text([rival]),
                first_right=first if first >= 0 else None,
            )
        )
    return found


def stubborn_table(
    standing: Standing, targets: Sequence[Sequence[int]], text: Callable[[Sequence[int]], str], most: int = 20
) -> str:
    """Markdown table of the most stubborn tokens; see `most_stubborn` for the arguments."""
    rows = [
        "| pair | position | before | token | after | p | margin (logits) | wins instead | pair first right at step |",
        "|---:|---:|---:|:---|:---|---:|---:|:---|---:|",
    ]
    for found in most_stubborn(standing, targets, text, most):
        columns = (
            str(found.example),
            str(found.position),
            markdown_text(found.before),
            f"**{markdown_text(found.token)}**",
            markdown_text(found.after),
            f"{found.probability:.3g}",
            "" if found.margin is None else f"{found.margin:+.2f}",
            markdown_text(found.rival),
            "never" if found.first_right is None else str(found.first_right),
        )
        rows.append("| " + " | ".join(columns) + " |")
    return "\n".join(rows)
