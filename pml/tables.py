"""Tables as data, for terminals, pages and TensorBoard; the table of runs; how values are written and sorted."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from pml.records import Record

__all__ = [
    "PAPER_WIDTH",
    "TextTable",
    "count",
    "markdown_table",
    "markdown_text",
    "records_table",
    "rich_table",
    "setting_order",
    "short_names",
    "show_interval",
    "show_loss",
    "show_percent",
]

PAPER_WIDTH = 100
"""Characters per line that every table of a command fits in."""


@dataclass(frozen=True)
class TextTable:
    """A table of text.

    Attributes:
        title: What it lists.
        columns: Headers of the columns.
        rows: Rows, each with one value per column.
        words: Indices of columns with words, aligned left; the others hold numbers.
        note: How to read it.
        small: Whether to save room: smaller letters on a page, no padding between columns in a terminal.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Sequence[int] = (0,)
    note: str = ""
    small: bool = False

    def without_empty_columns(self) -> "TextTable":
        """The table without the columns in which every value is a dash."""
        kept = [i for i in range(len(self.columns)) if any(row[i] != "-" for row in self.rows)]
        return replace(
            self,
            columns=[self.columns[i] for i in kept],
            rows=[[row[i] for i in kept] for row in self.rows],
            words=[new for new, old in enumerate(kept) if old in self.words],
        )


def rich_table(table: TextTable) -> Table:
    """The table for a terminal, with its title above and its note below."""
    shown = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 0 if table.small else 1),
        show_edge=not table.small,
        title=table.title or None,
        title_justify="left",
        caption=table.note or None,
        caption_justify="left",
    )
    for i, name in enumerate(table.columns):
        words = i in table.words
        # If there is little room, words wrap and numbers stay whole.
        shown.add_column(name, justify="left" if words else "right", overflow="fold", no_wrap=table.small and not words)
    for row in table.rows:
        shown.add_row(*row)
    return shown


def markdown_table(table: TextTable) -> str:
    """The table in Markdown, for TensorBoard, without title and note."""
    lines = [
        table.columns,
        [":---" if i in table.words else "---:" for i in range(len(table.columns))],
        *([markdown_text(value) for value in row] for row in table.rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown_text(text: str) -> str:
    """Text on one line, escaped so that neither Markdown nor HTML takes anything in it for markup.

    Example:
        >>> markdown_text("a|b")
        'a&#124;b'
    """
    # Entities work in both languages; a backslash before a pipe does not work in every Markdown table.
    return "".join(c if c.isalnum() or c in " ,;" or ord(c) > 127 else f"&#{ord(c)};" for c in text)


def show_interval(ends: tuple[float, float] | None) -> str:
    """An interval to three significant digits; a dash for None."""
    return "-" if ends is None else f"{ends[0]:.3g} to {ends[1]:.3g}"


def records_table(records: Mapping[Path, Record]) -> TextTable:
    """One row per run, by corpus, length, rank and method; losses in nats per target token, shares in percent.

    To fit a terminal of 100 columns, settings that all runs share and results that none has move to the note.

    Args:
        records: Records by run folder.
    """
    ordered = sorted(
        records.items(), key=lambda item: (item[1].corpus, item[1].target_tokens, item[1].rank, item[1].method, item[0])
    )
    runs = [record for _, record in ordered]
    names = short_names([path for path, _ in ordered])
    settings = {
        "corpus": [run.corpus for run in runs],
        "pairs": [str(run.pairs) for run in runs],
        "target\ntokens": [str(run.target_tokens) for run in runs],
        "rank": [str(run.rank) for run in runs],
        "method": [run.method for run in runs],
    }
    results = {
        "start\nloss": [show_loss(run.initial_loss) for run in runs],
        "final\nloss": [show_loss(run.final_loss) for run in runs],
        "token\nright": [show_percent(run.token_accuracy) for run in runs],
        "exact\nmatch": [show_percent(run.exact_match) for run in runs],
        "gene-\nrated": [show_percent(run.generated_exact_match) for run in runs],
        "p<=.5": [show_percent(run.sub_threshold_fraction) for run in runs],
        "steps": [str(run.optimizer_steps) for run in runs],
        "recall\nafter": ["-" if run.steps_to_recall is None else str(run.steps_to_recall) for run in runs],
        "sec.": [f"{run.wall_seconds:.0f}" for run in runs],
    }
    shared = [f"{_plain(name)} {values[0]}" for name, values in settings.items() if len(set(values)) == 1]
    reached = {run.recall_margin for run in runs if run.steps_to_recall is not None}
    margins = sorted(margin for margin in reached if margin is not None)
    above = f" (p > {' or '.join(f'{margin:g}' for margin in margins)})" if margins else ""
    absent = [_plain(name) for name, values in results.items() if set(values) == {"-"}]
    note = [
        f"All runs: {', '.join(shared)}." if shared else "",
        "Loss in nats per target token. In percent: target tokens right and targets exactly matched (teacher-forced), "
        "targets exactly generated (greedy decoding), target tokens with p <= 0.5.",
        "" if "recall after" in absent else f"Recall after: steps until every target token was certified{above}.",
        f"None of the runs has: {', '.join(absent)}." if absent else "",
    ]
    columns = {
        "run": [
            name if run.status == "finished" else f"{name} ({run.status})"
            for name, run in zip(names, runs, strict=True)
        ],
        **{name: values for name, values in settings.items() if len(set(values)) > 1},
        **results,
    }
    return TextTable(
        "",
        list(columns),
        list(zip(*columns.values(), strict=True)),
        words=[i for i, name in enumerate(columns) if name in ("run", "corpus", "method")],
        note=" ".join(filter(None, note)),
        small=True,
    ).without_empty_columns()


def setting_order(value: Any) -> tuple[float, str]:
    """Sort key of a setting: numbers by size and before words, a list by its first element."""
    first = value[0] if isinstance(value, list) and value else value
    return (float(first), "") if isinstance(first, int | float) else (math.inf, str(first))


def short_names(paths: list[Path]) -> list[str]:
    """The last part of each path, or as many parts as it takes to tell all paths apart."""
    for depth in range(1, max((len(path.parts) for path in paths), default=0) + 1):
        names = ["/".join(path.parts[-depth:]) or "." for path in paths]
        if len(set(names)) == len(names):
            return names
    return [path.as_posix() for path in paths]


def count(number: int, noun: str) -> str:
    """A number with its noun, such as `1 run` or `1,024 runs`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def show_percent(share: float | None) -> str:
    """A share in percent, written 100.0 or 0.0 only if it is exactly that; `-` if it was not measured."""
    if share is None:
        return "-"
    shown = f"{100 * share:.1f}"
    if shown == "100.0" and share < 1:
        return ">99.9"
    return "<0.1" if shown == "0.0" and share > 0 else shown


def show_loss(nats: float | None) -> str:
    """A loss in nats, to three decimals below 10 and two above; `-` if it was not measured or is not finite."""
    if nats is None or not math.isfinite(nats):
        return "-"
    return f"{nats:.2f}" if round(nats, 3) >= 10 else f"{nats:.3f}"


def _plain(header: str) -> str:
    """A column header on one line."""
    return header.replace("-\n", "").replace("\n", " ")
