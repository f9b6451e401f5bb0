"""Tables as data, shown by commands with rich and by pages as HTML; the table of runs; how numbers are written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.table import Table

from pml.records import Record

__all__ = [
    "PAPER_WIDTH",
    "TextTable",
    "records_table",
    "rich_table",
    "short_names",
    "show_interval",
    "show_loss",
    "show_percent",
]

PAPER_WIDTH = 100
"""Columns that every table of a command fits."""


@dataclass(frozen=True)
class TextTable:
    """A table of text.

    Attributes:
        title: What it lists.
        columns: Their names.
        rows: As many values as there are columns.
        words: Columns of words, which are set to the left; the others are numbers.
        note: How to read it.
        small: Whether it is long, and so set in smaller letters.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Sequence[int] = (0,)
    note: str = ""
    small: bool = False


def rich_table(table: TextTable) -> Table:
    """A table for the terminal: its title above, its note below."""
    shown = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title=table.title,
        title_justify="left",
        caption=table.note or None,
        caption_justify="left",
    )
    for i, name in enumerate(table.columns):
        shown.add_column(name, justify="left" if i in table.words else "right", overflow="fold")
    for row in table.rows:
        shown.add_row(*map(str, row))
    return shown


def show_interval(ends: tuple[float, float] | None) -> str:
    """An interval to three digits, or a dash."""
    return "-" if ends is None else f"{ends[0]:.3g} to {ends[1]:.3g}"


def records_table(records: Mapping[Path, Record]) -> Table:
    """One row a run, by corpus, length, rank and method; losses in nats per target token, shares in percent.

    Made for 100 columns: settings that all runs share stand in the caption, and so do results that none has.

    Args:
        records: Records by the folder of their run.
    """
    rows = sorted(
        records.items(), key=lambda item: (item[1].corpus, item[1].target_tokens, item[1].rank, item[1].method, item[0])
    )
    runs = short_names([path for path, _ in rows])
    settings = {
        "corpus": [record.corpus for _, record in rows],
        "pairs": [str(record.pairs) for _, record in rows],
        "target\ntokens": [str(record.target_tokens) for _, record in rows],
        "rank": [str(record.rank) for _, record in rows],
        "method": [record.method for _, record in rows],
    }
    results = {
        "start\nloss": [show_loss(record.initial_loss) for _, record in rows],
        "final\nloss": [show_loss(record.final_loss) for _, record in rows],
        "token\nright": [show_percent(record.token_accuracy) for _, record in rows],
        "exact\nmatch": [show_percent(record.exact_match) for _, record in rows],
        "gene-\nrated": [show_percent(record.generated_exact_match) for _, record in rows],
        "p<=.5": [show_percent(record.sub_threshold_fraction) for _, record in rows],
        "steps": [str(record.optimizer_steps) for _, record in rows],
        "recall\nafter": [_or_dash(record.steps_to_recall) for _, record in rows],
        "sec.": [f"{record.wall_seconds:.0f}" for _, record in rows],
    }
    shared = [f"{_plain(name)} {values[0]}" for name, values in settings.items() if len(set(values)) == 1]
    absent = [_plain(name) for name, values in results.items() if set(values) == {"-"}]
    caption = [
        f"All runs: {', '.join(shared)}." if shared else "",
        "Loss in nats per target token. In percent: target tokens right and targets exactly matched (teacher-forced), "
        "targets exactly generated (greedy decoding), target tokens with p <= threshold.",
        "" if "recall after" in absent else "Recall after: steps until every target token was certified.",
        f"None of the runs has: {', '.join(absent)}." if absent else "",
    ]
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=0,
        caption=" ".join(filter(None, caption)),
        caption_justify="left",
    )
    columns = {name: values for name, values in settings.items() if len(set(values)) > 1}
    columns |= {name: values for name, values in results.items() if set(values) != {"-"}}
    table.add_column("run", overflow="fold", min_width=11, vertical="top")
    for name in columns:
        words = name in ("corpus", "method")
        table.add_column(
            name,
            justify="left" if words else "right",
            overflow="fold",
            no_wrap=name != "corpus",
            vertical="top",
            max_width=9 if name == "corpus" else None,
        )
    for i, (_, record) in enumerate(rows):
        run = runs[i] if record.status == "finished" else f"{runs[i]} ({record.status})"
        table.add_row(run, *(values[i] for values in columns.values()))
    return table


def short_names(paths: list[Path]) -> list[str]:
    """The last part of each path, or as many as it takes to tell all of them apart."""
    for depth in range(1, max((len(path.parts) for path in paths), default=0) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [path.as_posix() for path in paths]


def show_percent(share: float | None) -> str:
    """A share in percent that says 100.0 or 0.0 only where it is exactly that; `-` where it was not measured."""
    if share is None:
        return "-"
    shown = f"{100 * share:.1f}"
    if shown == "100.0" and share < 1:
        return ">99.9"
    return "<0.1" if shown == "0.0" and share > 0 else shown


def show_loss(nats: float | None) -> str:
    """A loss in nats in five characters; `-` where it was not measured, or is not a finite number."""
    if nats is None:
        return "-"
    return f"{nats:.2f}" if nats >= 10 else f"{nats:.3f}"


def _or_dash(value: int | None) -> str:
    return "-" if value is None else str(value)


def _plain(header: str) -> str:
    """A column's header on one line."""
    return header.replace("-\n", "").replace("\n", " ")
