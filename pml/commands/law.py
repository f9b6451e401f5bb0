"""Fit the Parametric Memory Law dL = C r^alpha l^(-beta) + b to finished runs; loss in nats per target token."""

import json
from pathlib import Path
from typing import Any

import jsonargparse
from rich import box
from rich.console import Console
from rich.table import Table

from pml.errors import InputError
from pml.law import LAW_NAME, LawFit, cells_from_records, fit_law, select_records, shared_setting
from pml.records import read_records, write_json
from pml.report import law_figure, save_figure

__all__ = ["FIGURE_NAME", "configure", "run"]

FIGURE_NAME = "law.png"


def configure(parser: jsonargparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "runs",
        nargs="+",
        type=str,
        metavar="RUNS",
        help="folders of runs, folders with runs anywhere below them, or record.json files",
    )
    parser.add_argument(
        "--out", type=Path | None, help="folder for law.json and law.png; without it nothing is written"
    )
    parser.add_argument("--json", action="store_true", help="print the content of law.json, and nothing else")
    parser.add_argument("--overwrite", action="store_true", help="replace a law.json that says something else")
    parser.add_argument(
        "--where",
        type=dict[str, Any] | None,
        help="which runs to keep by the fields of their records, such as --where.method memft",
    )


def run(args: jsonargparse.Namespace) -> int:
    """Fit, print, and write where `--out` says.

    Raises:
        InputError: If the runs cannot determine a law, or `--out` holds another one.
    """
    records = select_records(read_records(args.runs), args.where)
    cells = cells_from_records(records)
    fit = fit_law(cells, shared_setting(records))
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
    console = Console(highlight=False, markup=False)

    def say(line: str) -> None:
        console.print(line, soft_wrap=True)

    say(fit.equation())
    say(f"   = {fit.equation(errors=True).removeprefix('dL = ')}   (± standard error)")
    say("dL: loss reduction in nats per target token, r: LoRA rank, l: target tokens")
    say(f"R2 {fit.r2:.4f}, MAPE {fit.mape_percent:.2f} %, RMSE {fit.rmse_nats:.4f} nats per target token")
    left_out = ", ".join(f"{count} {reason}" for reason, count in fit.cells_left_out.items())
    say(f"{fit.cells_used} cells used, {len(fit.left_out)} left out{f' ({left_out})' if left_out else ''}")
    say(
        f"measured: ranks {fit.rank_range[0]} to {fit.rank_range[1]}, "
        f"lengths {fit.target_tokens_range[0]} to {fit.target_tokens_range[1]} target tokens"
    )
    for warning in fit.warnings:
        say(f"warning: {warning}")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption="dL in nats per target token", caption_justify="left")
    for name in ("target tokens", "rank", "seed", "measured dL", "predicted dL", "error %"):
        table.add_column(name, justify="right")
    for cell in fit.used:
        error = 100 * (cell.predicted / cell.measured - 1)
        numbers = (f"{cell.measured:.4f}", f"{cell.predicted:.4f}", f"{error:+.1f}")
        table.add_row(str(cell.target_tokens), str(cell.rank), str(cell.seed), *numbers)
    console.print(table)
    if out is not None:
        say(f"written: {out / LAW_NAME}, {out / FIGURE_NAME}")
