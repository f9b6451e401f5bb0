"""What people look at: the figure of a law and the table of runs."""

import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator
from rich import box
from rich.table import Table

from pml.law import Cell, LawFit, saturated
from pml.records import Record

__all__ = ["law_figure", "records_table", "save_figure"]

# Okabe and Ito's colours, which colour-blind readers can tell apart, without the yellow that is too pale for lines.
FEW_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "os^DvPX<>ph"
INK = "#333333"
PAPER = "#FFFFFF"


def law_figure(fit: LawFit, cells: Iterable[Cell]) -> Figure:
    """Measured and fitted loss reduction in nats per target token, in two panels.

    Left, predicted against measured, with the line on which both are equal. Right, loss reduction against rank, with
    one line of the fit for each length; dotted where no cell of that length was used. Saturated cells are hollow;
    diverged and interrupted ones are not drawn.

    Args:
        fit: The law.
        cells: All cells, those that the fit left out too.
    """
    used = {(cell.source, cell.rank, cell.target_tokens, cell.seed) for cell in fit.used}
    filled, hollow = [], []
    for cell in cells:
        if (cell.source, cell.rank, cell.target_tokens, cell.seed) in used:
            filled.append(cell)
        elif cell.finished and math.isfinite(cell.loss_reduction) and saturated(cell):
            hollow.append(cell)
    lengths = sorted({cell.target_tokens for cell in filled + hollow})
    looks = _looks(lengths)

    with matplotlib.rc_context({"font.size": 11, "axes.edgecolor": INK, "axes.labelcolor": INK, "text.color": INK}):
        figure = Figure(figsize=(12, 5.4), dpi=150, layout="constrained", facecolor=PAPER)
        left, right = figure.subplots(1, 2)
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(color="#E4E4E4", linewidth=0.8)
            axes.set_axisbelow(True)
        _draw_agreement(left, fit, filled, hollow, looks)
        _draw_by_rank(right, fit, filled, hollow, looks)
        handles = [
            Line2D([], [], color=colour, marker=marker, markersize=7, linewidth=1.8, label=f"{length:,} tokens")
            for length, (colour, marker) in looks.items()
        ]
        if hollow:
            handles.append(_hollow_handle())
        figure.legend(handles=handles, loc="outside right center", frameon=False, title="target length")
        figure.suptitle("\n".join(filter(None, (_math(fit), _setting(fit)))), fontsize=13)
    return figure


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure so that the file is either whole or not there; the suffix says the format. Returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            figure.savefig(file, format=path.suffix.removeprefix("."))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def records_table(records: Mapping[Path, Record]) -> Table:
    """One row a run, by corpus, length, rank and method; losses in nats per target token, shares in percent.

    Made for 100 columns: settings that all runs share stand in the caption, and so do results that none has.

    Args:
        records: Records by the folder of their run.
    """
    rows = sorted(
        records.items(), key=lambda item: (item[1].corpus, item[1].target_tokens, item[1].rank, item[1].method, item[0])
    )
    runs = _short_names([path for path, _ in rows])
    settings = {
        "corpus": [record.corpus for _, record in rows],
        "pairs": [str(record.pairs) for _, record in rows],
        "target\ntokens": [str(record.target_tokens) for _, record in rows],
        "rank": [str(record.rank) for _, record in rows],
        "method": [record.method for _, record in rows],
    }
    results = {
        "start\nloss": [_loss(record.initial_loss) for _, record in rows],
        "final\nloss": [_loss(record.final_loss) for _, record in rows],
        "token\nright": [_percent(record.token_accuracy) for _, record in rows],
        "exact\nmatch": [_percent(record.exact_match) for _, record in rows],
        "gene-\nrated": [_percent(record.generated_exact_match) for _, record in rows],
        "p<=.5": [_percent(record.sub_threshold_fraction) for _, record in rows],
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


def _draw_agreement(
    axes: Axes, fit: LawFit, filled: list[Cell], hollow: list[Cell], looks: dict[int, tuple[str, str]]
) -> None:
    """Predicted against measured."""
    values = [cell.loss_reduction for cell in (*hollow, *filled)] + [cell.predicted for cell in fit.used]
    span = max(values) - min(values)
    # The law knows no ceiling: what it says of saturated cells may be so large that the others would be squeezed.
    limits = (min(values) - 0.06 * span, max(values) + 0.3 * span if hollow else max(values) + 0.06 * span)
    edge, beyond = limits[1] - 0.03 * span, 0
    for cell in (*hollow, *filled):
        predicted = float(fit.predict(cell.rank, cell.target_tokens))
        beyond += predicted > edge
        shown = min(predicted, edge)
        _draw_cell(axes, cell.loss_reduction, shown, *looks[cell.target_tokens], is_hollow=cell in hollow)
    axes.plot(limits, limits, color=INK, linewidth=1.2, linestyle="--", zorder=1, label="identity")
    axes.set(xlim=limits, ylim=limits, aspect="equal")
    axes.yaxis.set_major_locator(MaxNLocator(7))
    axes.xaxis.set_major_locator(MaxNLocator(7))
    if beyond:
        note = f"at the upper edge: {beyond} predicted beyond it"
        axes.text(0.02, 0.96, note, transform=axes.transAxes, fontsize=9.5, verticalalignment="top")
    axes.set_xlabel("measured loss reduction (nats per target token)")
    axes.set_ylabel("predicted loss reduction (nats per target token)")
    axes.set_title(f"$R^2$ = {fit.r2:.4f}, MAPE = {fit.mape_percent:.1f} %, {fit.cells_used} cells", fontsize=12)


def _draw_by_rank(
    axes: Axes, fit: LawFit, filled: list[Cell], hollow: list[Cell], looks: dict[int, tuple[str, str]]
) -> None:
    """Loss reduction against rank, a line of the fit for each length."""
    cells = filled + hollow
    ranks = sorted({cell.rank for cell in cells})
    for length, (colour, _) in looks.items():
        of_length = [cell.rank for cell in filled if cell.target_tokens == length]
        if of_length:
            inside = np.geomspace(min(of_length), max(of_length), 100)
            axes.plot(inside, fit.predict(inside, length), color=colour, linewidth=1.8, zorder=2)
        everywhere = np.geomspace(ranks[0], ranks[-1], 200)
        axes.plot(everywhere, fit.predict(everywhere, length), color=colour, linewidth=1.3, linestyle=":", zorder=1)
    for cell in (*hollow, *filled):
        _draw_cell(axes, cell.rank, cell.loss_reduction, *looks[cell.target_tokens], is_hollow=cell in hollow)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(ranks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(ranks, labels=_labels(ranks))
    # A line may climb past what any run can reach, the frozen model's loss; the measured cells set the scale.
    measured = [cell.loss_reduction for cell in cells]
    margin = 0.08 * (max(measured) - min(measured))
    axes.set_ylim(min(measured) - margin, max(measured) + margin)
    axes.set_xlabel("LoRA rank (logarithmic)")
    axes.set_ylabel("loss reduction (nats per target token)")
    axes.set_title("lines: the law; dotted where no cell was used", fontsize=12)


def _draw_cell(axes: Axes, x: float, y: float, colour: str, marker: str, *, is_hollow: bool) -> None:
    axes.plot(
        [x],
        [y],
        linestyle="none",
        marker=marker,
        markersize=8,
        markerfacecolor=PAPER if is_hollow else colour,
        markeredgecolor=colour if is_hollow else PAPER,
        markeredgewidth=1.6 if is_hollow else 0.8,
        zorder=3 if is_hollow else 4,
        clip_on=False,
        label="saturated" if is_hollow else "used",
    )


def _hollow_handle() -> Line2D:
    return Line2D(
        [],
        [],
        linestyle="none",
        marker="o",
        markersize=7,
        markerfacecolor=PAPER,
        markeredgecolor=INK,
        markeredgewidth=1.6,
        label="hollow: saturated,\nnot used in the fit",
    )


def _looks(lengths: list[int]) -> dict[int, tuple[str, str]]:
    """A colour and a marker for each length."""
    if len(lengths) <= len(FEW_COLOURS):
        colours = list(FEW_COLOURS[: len(lengths)])
    else:
        # The pale end of the map would vanish on white.
        shades = matplotlib.colormaps["cividis"](np.linspace(0.0, 0.88, len(lengths)))
        colours = [matplotlib.colors.to_hex(shade) for shade in shades]
    return {
        length: (colour, MARKERS[i % len(MARKERS)])
        for i, (length, colour) in enumerate(zip(lengths, colours, strict=True))
    }


def _labels(ranks: list[int]) -> list[str]:
    """Ranks as tick labels; empty where one would touch the one before it on the logarithmic axis."""
    room = 0.04 * math.log(ranks[-1] / ranks[0])
    labels, last = [], 0
    for rank in ranks:
        fits = last == 0 or math.log(rank / last) >= room
        labels.append(str(rank) if fits else "")
        last = rank if fits else last
    return labels


def _math(fit: LawFit) -> str:
    """The law as mathematical text."""
    _, _, c, of_rank, of_length, sign, b = fit.equation().split()
    of_rank, of_length = (re.sub(r"\^(.+)", r"^{\1}", power) for power in (of_rank, of_length.replace("l", r"\ell")))
    text = rf"$\Delta L = {c}\,{of_rank}\,{of_length} {sign} {b}$"
    return re.sub(r"e\+?(-?)0*(\d+)", r" \\times 10^{\1\2}", text)


def _setting(fit: LawFit) -> str:
    """What the runs have in common and how many warnings the fit has, in one line."""
    setting = fit.setting
    caution = f"{len(fit.warnings)} warning{'s' if len(fit.warnings) > 1 else ''} with the fit" if fit.warnings else ""
    if not setting:
        return caution
    block = ", ".join(str(index) for index in setting["block"])
    placement = setting["placement"] if isinstance(setting["placement"], str) else " ".join(setting["placement"])
    parts = (f"{', '.join(setting['corpus'])} in {setting['backbone']}, block {block}, {placement}", setting["method"])
    return ", ".join(filter(None, (*parts, caution)))


def _short_names(paths: list[Path]) -> list[str]:
    """The last part of each path, or as many as it takes to tell all of them apart."""
    for depth in range(1, max((len(path.parts) for path in paths), default=0) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [path.as_posix() for path in paths]


def _percent(share: float | None) -> str:
    """A share in percent that says 100.0 or 0.0 only where it is exactly that; `-` where it was not measured."""
    if share is None:
        return "-"
    shown = f"{100 * share:.1f}"
    if shown == "100.0" and share < 1:
        return ">99.9"
    return "<0.1" if shown == "0.0" and share > 0 else shown


def _loss(nats: float) -> str:
    """A loss in nats in five characters."""
    return f"{nats:.2f}" if nats >= 10 else f"{nats:.3f}"


def _or_dash(value: int | None) -> str:
    return "-" if value is None else str(value)


def _plain(header: str) -> str:
    """A column's header on one line."""
    return header.replace("-\n", "").replace("\n", " ")
