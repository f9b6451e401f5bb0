"""Fit the Parametric Memory Law dL = C r^alpha l^(-beta) + b to finished runs; loss in nats per target token.

Every form that the runs determine is fitted: the paper's, those that know the ceiling (no run can lower the loss by
more than the frozen model's), and that every effective parameter stores a constant number of bits. The best comes
first, by AICc and by how well it foretells the largest rank and length from the others.
"""

import json
from pathlib import Path
from typing import Any

import jsonargparse
from rich import box
from rich.console import Console
from rich.table import Table

from pml.calibration import RecallModel, fit_recall, run_tokens
from pml.commands._console import make_console
from pml.commands._runs import add_runs, add_where, chosen_records
from pml.errors import InputError
from pml.figures import law_figure, save_figure
from pml.law import (
    FACTORS,
    FORMS,
    LAW_NAME,
    CapacityName,
    Cell,
    FormName,
    LawFit,
    cells_from_records,
    fit_law,
    shared_setting,
)
from pml.records import write_json
from pml.token_results import TOKENS_NAME, read_tokens

__all__ = ["FIGURE_NAME", "configure", "run"]

FIGURE_NAME = "law.png"
# A share between none and all that is known no better than this was not measured.
UNKNOWN_SHARE = 0.4


def configure(parser: jsonargparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_runs(parser)
    parser.add_argument(
        "--form",
        type=FormName | None,
        help=f"the form to put first and to draw: {', '.join(FORMS)}; without it AICc and held-out error choose",
    )
    parser.add_argument(
        "--by",
        type=CapacityName,
        default="rank",
        help="what counts as the adapter's size; by effective_parameters, blocks and placements may be mixed",
    )
    parser.add_argument(
        "--out", type=Path | None, help="folder for law.json and law.png; without it nothing is written"
    )
    parser.add_argument("--json", action="store_true", help="print the content of law.json, and nothing else")
    parser.add_argument("--overwrite", action="store_true", help="replace a law.json that says something else")
    add_where(parser)


def run(args: jsonargparse.Namespace) -> int:
    """Fit, print, and write where `--out` says.

    Raises:
        InputError: If the runs cannot determine a law, or `--out` holds another one.
    """
    records = chosen_records(args)
    cells = cells_from_records(records, capacity=args.by)
    setting = shared_setting(records, args.by)
    fit = fit_law(cells, setting, form=args.form, capacity=args.by, recall=_recall(cells))
    content = fit.to_json()
    if args.out is not None:
        _check_free(args.out / LAW_NAME, content, args.overwrite)
        try:
            # The figure first: where there is a law.json, everything is there.
            save_figure(law_figure(fit, cells), args.out / FIGURE_NAME)
            write_json(args.out / LAW_NAME, content)
        except OSError as error:
            raise InputError(
                f"--out {args.out}: cannot be written ({error.strerror}); choose another folder"
            ) from error
    if args.json:
        print(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        _print_fit(fit, args.out)
    return 0


def _recall(cells: list[Cell]) -> RecallModel | None:
    """From loss to recall, by what the finished runs left."""
    folders = [Path(cell.source) for cell in cells if cell.finished]
    return fit_recall([run_tokens(read_tokens(folder)) for folder in folders if (folder / TOKENS_NAME).is_file()])


def _check_free(path: Path, content: dict[str, Any], overwrite: bool) -> None:
    """Raise an InputError if the file exists and says something else, unless it may be replaced."""
    if overwrite or not path.exists():
        return
    try:
        same = json.loads(path.read_bytes()) == content
    except (OSError, ValueError):
        same = False
    if not same:
        raise InputError(f"{path}: holds another law; give another --out, or --overwrite to replace it")


def _print_fit(fit: LawFit, out: Path | None) -> None:
    console = make_console(highlight=False, markup=False)

    def say(line: str = "") -> None:
        console.print(line, soft_wrap=True)

    size = "LoRA rank" if fit.capacity == "rank" else "effective parameters"
    say(fit.equation())
    say(f"   = {fit.equation(errors=True).split(' = ', 1)[1]}   (± standard error)")
    say(
        f"dL: loss reduction in nats per target token, {'r' if fit.capacity == 'rank' else 'P'}: {size}, l: target "
        "tokens, L0: the frozen model's loss"
        + (", H: bits (stored) or nats (dL) in the corpus" if FORMS[fit.form].needs_entropy else "")
        + (", P: effective parameters" if FORMS[fit.form].proportional and fit.capacity == "rank" else "")
        + (", min_p: smooth minimum (x^-p + y^-p)^(-1/p)" if "min_" in fit.equation() else "")
    )
    say(f"chosen: {fit.form} ({FORMS[fit.form].meaning}): {fit.chosen_because}")
    say(f"R2 {fit.r2:.4f}, MAPE {fit.mape_percent:.2f} %, RMSE {fit.rmse_nats:.4f} nats per target token")
    left_out = ", ".join(f"{count} {reason}" for reason, count in sorted(fit.cells_left_out.items()))
    number = sum(fit.cells_left_out.values())
    say(f"{fit.cells_used} cells used, {number} left out{f' ({left_out})' if left_out else ''}")
    say(
        f"measured: ranks {fit.rank_range[0]} to {fit.rank_range[1]}, "
        f"lengths {fit.target_tokens_range[0]} to {fit.target_tokens_range[1]} target tokens"
    )
    for warning in fit.warnings:
        say(f"warning: {warning}")
    say()
    console.print(_parameter_table(fit))
    say()
    console.print(_form_table(fit))
    for line in _bits(fit):
        say(line)
    if fit.text_spread > 0:
        share, error = fit.best.text_share
        learnt = (
            f"{share:.2f} ± {error:.2f} of a nat more is learnt away too"
            if error < UNKNOWN_SHARE
            else "how much of it is learnt away too these runs cannot tell"
        )
        say(
            f"texts: the frozen model's loss on those of one length differs by {fit.text_spread:.2g} nats (standard "
            f"deviation); {learnt}"
        )
    if fit.recall is not None:
        say()
        _print_recall(console, fit.recall)
    say()
    console.print(_cell_table(fit))
    if out is not None:
        say(f"written: {out / LAW_NAME}, {out / FIGURE_NAME}")


def _bits(fit: LawFit) -> list[str]:
    """What the runs say of the law in bits, where the corpus' information is known."""
    kappa = fit.kappa
    if kappa is None:
        return []
    lines = [f"bits: an effective parameter stores {kappa.value:.3g} bits (95 % interval {_interval(kappa.interval)})"]
    for misfit in fit.fit_of("stored_bits").misfits:
        noun = FACTORS[misfit.factor]
        lines.append(
            f"  not in proportion at {noun} {misfit.value}: the loss reduction is {misfit.excess_percent:+.1f} % off "
            f"({misfit.cells} cells)"
        )
    return lines


def _parameter_table(fit: LawFit) -> Table:
    """The chosen form's parameters and the paper's, with their intervals."""
    table = _table(
        "95 % intervals; profile: of the likelihood, bootstrap: of the cells, those of one size or on one text together"
    )
    for name, justify in (("form", "left"), ("parameter", "left"), ("value", "right"), ("standard error", "right")):
        table.add_column(name, justify="left" if justify == "left" else "right")
    for name in ("profile", "bootstrap"):
        table.add_column(name, justify="right")
    shown = [fit.best, *(other for other in fit.fits if other.form == "power_offset" and other is not fit.best)]
    for form in shown:
        for i, (name, estimate) in enumerate(form.parameters.items()):
            held = name in form.at_bound
            table.add_row(
                form.form if i == 0 else "",
                name,
                f"{estimate.value:.4g}" + (" (at its bound)" if held else ""),
                "-" if estimate.stderr is None else f"{estimate.stderr:.2g}",
                _interval(estimate.profile),
                _interval(estimate.bootstrap),
            )
    return table


def _form_table(fit: LawFit) -> Table:
    """Every fitted form, the best first."""
    table = _table(
        "AICc over the unsaturated sizes (a rank and a length each), less is better; R2 over all cells; noise of a run "
        "in nats per target token; "
        "held out: mean error of the loss reduction of these cells, and of all saturated ones beyond them left out "
        "too, foretold from the smaller ones; others: of every other rank and length"
    )
    for name in ("form", "equation"):
        table.add_column(name, overflow="fold")
    for name in ("AICc", "R2", "noise", *_held_out_titles(fit), "held out\nothers"):
        table.add_column(name, justify="right")
    for form in fit.fits:
        table.add_row(
            form.form,
            form.equation(capacity=fit.capacity),
            "-" if form.aicc is None else f"{form.aicc:.1f}",
            f"{form.r2_all:.4f}",
            f"{form.noise_nats:.3f}",
            *(_percent(held.mape_percent if (held := form.largest(factor)) else None) for factor in fit.factors),
            _percent(form.interpolation_percent),
        )
    return table


def _held_out_titles(fit: LawFit) -> list[str]:
    """What was held out at the end of the grid, such as `held out rank >= 4 (2 cells)`."""
    titles = []
    for factor in fit.factors:
        held, noun = fit.best.largest(factor), FACTORS[factor]
        what = f"{noun} >= {held.value}\n({held.cells} cell{'s' if held.cells > 1 else ''})" if held else noun
        titles.append(f"held out\n{what}")
    return titles


def _print_recall(console: Console, recall: RecallModel) -> None:
    lines = (
        f"recall: half of the target tokens are right at a mean loss of {recall.half_loss:.3g} nats "
        f"(steepness {recall.steepness:.2g}, concentration {recall.concentration:.3g})",
        f"foretold from the other runs: token accuracy to {100 * recall.token_accuracy_error:.1f} points, exact match "
        f"to {100 * recall.exact_match_error:.1f} points; Brier score {recall.brier:.3f} "
        f"(always the mean: {recall.brier_reference:.3f}); {recall.runs} runs, {recall.targets} targets",
    )
    for line in lines:
        console.print(line, soft_wrap=True)
    table = _table("targets by foretold probability of being right, each from the other runs")
    for name in ("probability", "targets", "foretold", "observed"):
        table.add_column(name, justify="right")
    for row in recall.reliability:
        table.add_row(f"{row.low:g} to {row.high:g}", str(row.targets), f"{row.predicted:.3f}", f"{row.observed:.3f}")
    console.print(table)


def _cell_table(fit: LawFit) -> Table:
    table = _table("dL in nats per target token")
    for name in ("target tokens", "rank", "seed", "measured dL", "predicted dL", "error %", ""):
        table.add_column(name, justify="right")
    for cell in fit.used:
        error = 100 * (cell.predicted / cell.measured - 1)
        numbers = (f"{cell.measured:.4f}", f"{cell.predicted:.4f}", f"{error:+.1f}")
        mark = "saturated" if cell.saturated else ""
        table.add_row(str(cell.target_tokens), str(cell.rank), str(cell.seed), *numbers, mark)
    return table


def _table(caption: str) -> Table:
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=caption, caption_justify="left")


def _interval(ends: tuple[float, float] | None) -> str:
    return "-" if ends is None else f"{ends[0]:.4g} to {ends[1]:.4g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} %"
