"""Measure what an optimiser step costs on this machine, the ordinary way and pml's, and how long recall takes.

Seconds per optimiser step and peak memory of the whole model through PEFT with logits at every position (`ordinary`),
of pml without the frozen-layer cache (`whole`) and with it (`split`), taken in turns; the share of the machine's own
matrix product rate that the split step's necessary arithmetic reaches; what the Trainer and watching tokens add to
split steps; and steps and seconds to certified recall.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import jsonargparse

from pml.errors import InputError
from pml.escape import say_json

if TYPE_CHECKING:
    from rich.table import Table

    from pml.bench.fits import FitCost, RecallRun
    from pml.bench.steps import Measurement

__all__ = ["configure", "run"]


def configure(parser: jsonargparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--backbone", type=str, default="smollm2-135m", help="default name, folder or hub id")
    parser.add_argument(
        "--targets", type=int, nargs="*", default=[64, 256, 1024], help="lengths of one target, in tokens"
    )
    parser.add_argument("--pairs", type=int, nargs="*", default=[4, 32], help="sizes of a phone book batch, in pairs")
    parser.add_argument("--dtypes", type=str, nargs="+", default=["float32", "bfloat16"], help="dtypes of the backbone")
    parser.add_argument(
        "--matmul_precision",
        type=str,
        nargs="+",
        default=["highest"],
        help="precisions of float32 products in pml's steps: highest, high, medium",
    )
    parser.add_argument("--repeats", type=int, default=3, help="turns that each way gets on each case")
    parser.add_argument("--steps", type=int, default=5, help="counted optimiser steps in a turn")
    parser.add_argument("--fit_steps", type=int, default=100, help="steps of each fit through the Trainer; 0 for none")
    parser.add_argument("--recall", type=int, default=64, help="target tokens of the recall fits; 0 leaves them out")
    parser.add_argument("--out", type=Path | None, help="file for everything measured, as JSON")
    parser.add_argument("--json", action="store_true", help="print everything measured as JSON, and nothing else")


def run(args: jsonargparse.Namespace) -> int:
    """Measure, print, and write where `--out` says."""
    for name in ("repeats", "steps"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} is {getattr(args, name)}; expected at least 1")
    if min([1, *args.targets, *args.pairs]) < 1:
        raise InputError("--targets and --pairs take numbers from 1")
    # Imported here because it takes seconds, which --help need not wait for.

    from pml.backbone import DTYPES
    from pml.bench.fits import measure_fit, measure_recall
    from pml.bench.machine import matmul_rate
    from pml.bench.report import as_json
    from pml.bench.steps import Case, measure_steps
    from pml.commands._console import make_console
    from pml.products import check_matmul_precision
    from pml.records import write_json

    for precision in args.matmul_precision:
        check_matmul_precision(precision)
    if args.fit_steps in (1, 2) or args.fit_steps < 0:
        raise InputError(f"--fit_steps is {args.fit_steps}; expected at least 3, or 0 for none")
    if unknown := set(args.dtypes) - set(DTYPES):
        raise InputError(f"--dtypes has {', '.join(sorted(unknown))}; expected {', '.join(DTYPES)}")
    cases = [
        Case(corpus, size, dtype, args.backbone, matmul_precision=precision)  # type: ignore[arg-type]
        for dtype in args.dtypes
        for precision in (args.matmul_precision if dtype == "float32" else ["highest"])
        for corpus, sizes in (("random_tokens", args.targets), ("phonebook", args.pairs))
        for size in sizes
    ]
    progress = make_console(stderr=True)
    rates = {dtype: matmul_rate(dtype) for dtype in args.dtypes}

    def report(case: Case, way: str, seconds: float) -> None:
        progress.print(f"{case.numbers}, {case.label}, {way}: {seconds:.4f} s a step")

    measurements = measure_steps(cases, args.repeats, args.steps, lambda m: report(m.case, m.way, m.step_seconds))
    fits = []
    for case in cases if args.fit_steps else []:
        fits.append(measure_fit(case, args.fit_steps))
        report(case, "through the Trainer", fits[-1].trainer_seconds)
    recall = measure_recall(args.backbone, args.recall) if args.recall else []
    content = as_json(measurements, fits, rates, recall)
    if args.json:
        say_json(content)
    else:
        tables = _steps_tables(measurements, rates)
        tables += [_fits_table(fits)] if fits else []
        tables += [_recall_table(recall, args.recall)] if recall else []
        console = make_console()
        for table in tables:
            console.print(table)
    # Last, so that what took long to measure is seen even where the file cannot be written.
    if args.out is not None:
        write_json(args.out, content)
    return 0


def _steps_tables(measurements: "list[Measurement]", rates: dict[str, float]) -> "list[Table]":
    """Time and memory, each within 80 columns."""
    from rich import box
    from rich.table import Table

    rate_text = ", ".join(f"{dtype} {rate:.0f}" for dtype, rate in rates.items())
    seconds = Table(
        title="Seconds per optimiser step",
        caption="ordinary / split: of their seconds, and of the arithmetic that they take. vs float32: the ordinary "
        "step in float32 over the split one in this dtype. Rate: arithmetic of the split step over its time, as a "
        f"share of what matrix products reach here ({rate_text} GFLOP/s).",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    memory = Table(
        title="Peak memory in MiB",
        caption="In all: with the weights, above the bare process; the split way frees what lies below the adapter. "
        "In a step: above what is held between steps.",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    timed = ("ordinary", "whole", "split", "ordinary\n/ split", "arith-\nmetic", "vs\nfloat32", "rate")
    held = ("ordinary\nin all", "split\nin all", "ratio", "ordinary\nin a step", "split\nin a step", "ratio")
    for table, headers in ((seconds, timed), (memory, held)):
        for header in ("dtype", "batch"):
            table.add_column(header, no_wrap=True)
        for header in headers:
            table.add_column(header, justify="right")
    by_case = {(m.case.numbers, m.case.label, m.way): m for m in measurements}
    for numbers, label in dict.fromkeys((m.case.numbers, m.case.label) for m in measurements):
        ordinary, whole, split = (by_case[numbers, label, way] for way in ("ordinary", "whole", "split"))
        float32 = by_case.get(("float32", label, "ordinary"))
        seconds.add_row(
            numbers,
            label,
            *(f"{m.step_seconds:.3f}" for m in (ordinary, whole, split)),
            f"{ordinary.step_seconds / split.step_seconds:.2f}",
            f"{ordinary.gflop / split.gflop:.2f}",
            f"{float32.step_seconds / split.step_seconds:.2f}" if float32 is not None else "-",
            f"{split.gflop / split.step_seconds / rates[split.case.dtype]:.0%}",
        )
        memory.add_row(
            numbers,
            label,
            *(f"{m.peak_mib:.0f}" for m in (ordinary, split)),
            _ratio(ordinary.peak_mib, split.peak_mib),
            *(f"{m.step_mib:.0f}" for m in (ordinary, split)),
            _ratio(ordinary.step_mib, split.step_mib),
        )
    return [seconds, memory]


def _fits_table(fits: "list[FitCost]") -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(
        title="Seconds per step inside a fit",
        caption=f"One batch an epoch, {fits[0].steps} steps. Bare: the split step in a loop of its own. Watched: with "
        "TokenThresholds; its share is of the whole fit, looks and pictures included.",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for header in ("dtype", "batch"):
        table.add_column(header, no_wrap=True)
    for header in ("bare", "Trainer", "overhead", "watched", "TokenThresholds'\nshare"):
        table.add_column(header, justify="right")
    for fit in fits:
        table.add_row(
            fit.case.numbers,
            fit.case.label,
            *(f"{seconds:.4f}" for seconds in (fit.bare_seconds, fit.trainer_seconds)),
            f"{fit.trainer_seconds / fit.bare_seconds - 1:.1%}",
            f"{fit.watched_seconds:.4f}",
            f"{fit.watching_share:.1%}",
        )
    return table


def _ratio(ordinary: float, split: float) -> str:
    """How many times as much the ordinary way needs; `-` where the split way needs less than can be measured."""
    return f"{ordinary / split:.1f}" if split >= 1 else "-"


def _recall_table(recall: "list[RecallRun]", length: int) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=f"To certified recall of {length} random tokens at rank 4")
    for header in ("settings", "method", "steps", "seconds", "recalled"):
        table.add_column(header, justify="left" if header in ("settings", "method") else "right")
    for fit in recall:
        table.add_row(fit.settings, fit.method, str(fit.steps), f"{fit.seconds:.1f}", "yes" if fit.recalled else "no")
    return table
