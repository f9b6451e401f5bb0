"""The target tokens that are furthest from being recalled, and how to show text that may hold anything."""

from collections.abc import Callable, Sequence

import numpy as np

from pml.last_seen import Standing

__all__ = ["markdown_text", "stubborn_table"]

NEIGHBOURS = 4


def markdown_text(text: str) -> str:
    """Text as Markdown and HTML show it, whatever is in it: on one line, nothing in it taken for markup.

    Characters that do not print are written as Python writes them; a space at an end is made visible.

    Example:
        >>> markdown_text("a|b" + chr(10))
        'a&#124;b&#92;n'
    """
    printable = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    inner = printable.strip(" ")
    left = len(printable) - len(printable.lstrip(" "))
    seen = "␣" * left + inner + "␣" * (len(printable) - left - len(inner))
    # Entities stand for themselves in either language; a backslash before a pipe does not in every table.
    return "".join(c if c.isalnum() or c in " ␣,;" or ord(c) > 127 else f"&#{ord(c)};" for c in seen)


def stubborn_table(
    standing: Standing, targets: Sequence[Sequence[int]], text: Callable[[Sequence[int]], str], most: int = 20
) -> str:
    """Markdown table of the target tokens with the smallest probability.

    Args:
        standing: How the tokens stand.
        targets: Token ids of each target, by example id.
        text: The text of token ids.
        most: Most rows.
    """
    lengths = [len(target) for target in targets]
    ends = np.cumsum(lengths)
    scored = np.flatnonzero(~np.isnan(standing.probability))
    worst = scored[np.argsort(standing.probability[scored], kind="stable")][:most]
    rows = [
        "| pair | position | before | token | after | p | margin (logits) | wins instead | pair first right at step |",
        "|---:|---:|---:|:---|:---|---:|---:|:---|---:|",
    ]
    for index in worst:
        example = int(np.searchsorted(ends, index, side="right"))
        position = int(index - (ends[example] - lengths[example]))
        target = list(targets[example])
        before, after = target[max(0, position - NEIGHBOURS) : position], target[position + 1 :][:NEIGHBOURS]
        margin, rival = float(standing.margin[index]), int(standing.rival[index])
        wins = "" if standing.correct[index] or rival < 0 else markdown_text(text([rival]))
        first = int(standing.first_right[example])
        cells = (
            str(example),
            str(position),
            markdown_text(text(before)) if before else "",
            f"**{markdown_text(text(target[position : position + 1]))}**",
            markdown_text(text(after)) if after else "",
            f"{standing.probability[index]:.3g}",
            "" if np.isnan(margin) else f"{margin:+.2f}",
            wins,
            str(first) if first >= 0 else "never",
        )
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)
