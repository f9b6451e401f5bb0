"""The work of `pml law`: fit, print one screen, write `law.json` and its figure."""

import json
from pathlib import Path
from typing import Any

import jsonargparse

from pml.commands._console import make_console
from pml.commands._runs import chosen_records
from pml.errors import InputError
from pml.escape import say_json
from pml.figures import law_figure, save_figure
from pml.law import LAW_NAME, LawFit, fit_law, law_of_records, read_csv
from pml.law.tables import (
    forms_table,
    observations_table,
    parameters_table,
    recall_table,
    sentences,
    symbols_sentence,
)
from pml.records import write_json
from pml.tables import rich_table

__all__ = ["FIGURE_NAME", "fit_and_show"]

FIGURE_NAME = "law.png"


def fit_and_show(args: jsonargparse.Namespace) -> int:
    """Fit the law, write it to `--out` if given, and print it; 0.

    Raises:
        InputError: If the runs cannot determine a law, or `--out` holds another law or cannot be written.
    """
    law = _law(args)
    content = law.to_json()
    if args.out is not None:
        _check_free(args.out / LAW_NAME, content, args.overwrite)
        try:
            # The figure comes first, so that a folder with a law.json is complete.
            save_figure(law_figure(law), args.out / FIGURE_NAME)
            write_json(args.out / LAW_NAME, content)
        except OSError as error:
            raise InputError(
                f"--out {args.out}: cannot be written ({error.strerror}); choose another folder"
            ) from error
    if args.json:
        say_json(content)
    else:
        _print_law(law, args.details, args.out)
    return 0


def _law(args: jsonargparse.Namespace) -> LawFit:
    files = [Path(place) for place in args.runs if place.lower().endswith(".csv")]
    if not files:
        return law_of_records(chosen_records(args), form=args.form, adapter_size=args.by)
    if len(files) < len(args.runs) or args.where:
        raise InputError(f"{files[0]}: a CSV file cannot be combined with run folders or --where; fit them separately")
    runs = [run for path in files for run in read_csv(path)]
    return fit_law(runs, {"files": [path.as_posix() for path in files]}, form=args.form, adapter_size=args.by)


def _check_free(path: Path, content: dict[str, Any], overwrite: bool) -> None:
    """Raise an InputError if the file holds other content and may not be replaced."""
    if overwrite or not path.exists():
        return
    try:
        same = json.loads(path.read_bytes()) == content
    except (OSError, ValueError):
        same = False
    if not same:
        raise InputError(f"{path}: holds another law; give another --out, or --overwrite to replace it")


def _print_law(law: LawFit, details: bool, out: Path | None) -> None:
    console = make_console()

    def say(line: str) -> None:
        console.print(line, soft_wrap=True)

    say(law.equation())
    say(f"   = {law.equation(errors=True).split(' = ', 1)[1]}   (± standard error)")
    say(symbols_sentence(law))
    for line in (*sentences(law), *(f"warning: {warning}" for warning in law.warnings)):
        say(line)
    tables = [parameters_table(law, details)]
    if details:
        tables += [forms_table(law), *([recall_table(law.recall)] if law.recall else []), observations_table(law)]
    for table in tables:
        console.print()
        console.print(rich_table(table))
    if law.text_spread > 0 and details:
        effect = law.best.text_effect
        shown = (
            f"dL rises by {effect:.2f} nats per nat of initial loss above trend"
            if effect
            else "its effect on dL is not significant"
        )
        say(f"texts of one length: the frozen model's loss varies by {law.text_spread:.2g} nats (one sigma); {shown}")
    if out is not None:
        say(f"written: {out / LAW_NAME}, {out / FIGURE_NAME}")
