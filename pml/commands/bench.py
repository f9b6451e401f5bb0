"""Measure what an optimiser step costs here with plain PEFT and with pml, and how long certified recall takes.

Measures seconds per optimiser step and peak memory of three ways, in turns: `ordinary` runs the whole model through
PEFT with logits at every position, `whole` is pml without the frozen-layer cache, `split` is pml with it. Also measures
the arithmetic rate of the split step as a share of the machine's matrix product rate, what the Trainer and
TokenThresholds add to split steps, and the steps and seconds to certified recall.
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
    parser.add_argument("--backbone", type=str, default="smollm2-135m", help="smollm2-135m, a folder or a hub id")
    parser.add_argument(
        "--targets", type=int, nargs="*", default=[64, 256, 1024], help="target lengths in tokens, one target per batch"
    )
    parser.add_argument("--pairs", type=int, nargs="*", default=[4, 32], help="phone book batch sizes in pairs")
    parser.add_argument("--dtypes", type=str, nargs="+", default=["float32", "bfloat16"], help="dtypes of the backbone")
    parser.add_argument(
        "--matmul_precision",
        type=str,
        nargs="+",
        default=["highest"],
        help="precisions of float32 matrix products in pml's steps: highest, high, medium",
    )
    parser.add_argument("--repeats", type=int, default=3, help="turns of each way on each batch")
    parser.add_argument("--steps", type=int, default=5, help="optimiser steps that are timed per turn")
    parser.add_argument("--fit_steps", type=int, default=100, help="steps per fit through the Trainer; 0 skips them")
    parser.add_argument("--recall", type=int, default=64, help="target tokens of the recall fits; 0 skips them")
    parser.add_argument("--out", type=Path | None, help="JSON file for all measurements")
    parser.add_argument("--json", action="store_true", help="print all measurements as JSON, and nothing else")


def run(args: jsonargparse.Namespace) -> int:
    """Measure, print, and write to `--out` if given; 0."""
    for name in ("repeats", "steps"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} is {getattr(args, name)}; expected at least 1")
    if min([1, *args.targets, *args.pairs]) < 1:
        raise InputError("--targets and --pairs take numbers of at least 1")
    # Imported here so that --help does not wait seconds for it.

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
    if args.recall < 0:
        raise InputError(f"--recall is {args.recall}; expected a number of tokens, or 0 for none")
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
    # Last, so that measurements that took long are shown even if the file cannot be written.
    if args.out is not None:
        write_json(args.out, content)
    return 0


def _steps_tables(measurements: "list[Measurement]", rates: dict[str, float]) -> "list[Table]":
    """Tables of time and of memory, each at most 80 columns wide."""
    from rich import box
    from rich.table import Table

    rate_text = ", ".join(f"{dtype} {rate:.0f}" for dtype, rate in rates.items())
    seconds = Table(
        title="Seconds per optimiser step",
        caption="ordinary / split: ratio of their seconds. Arithmetic: ratio of their FLOPs. vs float32: seconds of "
        "the ordinary step in float32 over those of the split step in this dtype. Rate: FLOP/s of the split step as "
        f"a share of what matrix products reach here ({rate_text} GFLOP/s).",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    memory = Table(
        title="Peak memory in MiB",
        caption="In all: weights included, above the bare process; the split way frees the layers below the adapter. "
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
        # However its products are computed in the split way, the ordinary step in float32 is the same.
        is_float32 = (m for m in measurements if (m.case.dtype, m.case.label, m.way) == ("float32", label, "ordinary"))
        float32 = next(is_float32, None)
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
        caption=f"One batch per epoch, {fits[0].steps} steps. Bare: the split step in a plain loop. Watched: with "
        "TokenThresholds; its share is of the time of the whole fit, its evaluations and pictures included.",
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
    """Ordinary over split memory, from MiB; `-` where the split way needs less than 1 MiB."""
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
