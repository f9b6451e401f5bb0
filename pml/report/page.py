"""The page itself: rendered from records, and written with its figures beside it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import jinja2
from markupsafe import Markup

from pml.atomic import whole_file
from pml.errors import InputError
from pml.groups import group_runs
from pml.records import Record
from pml.report.parts import spans
from pml.report.provenance import provenance
from pml.report.side_by_side import side_by_side
from pml.report.studies import laws_by_name, make_studies
from pml.tables import count

__all__ = ["PAGE_NAME", "Report", "make_report", "write_report"]

PAGE_NAME = "report.html"
FIGURES = "figures"
# Figures of a replaced page are removed only if it has this tag, which marks a report.
SIGNATURE = '<meta name="generator" content="pml report">'


@dataclass(frozen=True)
class Report:
    """A page and its figures.

    Attributes:
        html: The whole page, with its figures embedded.
        figures: The same figures as PNG, by file name.
    """

    html: str
    figures: dict[str, bytes] = field(repr=False)


def make_report(
    records: Mapping[Path, Record],
    *,
    title: str = "What the adapters remember",
    by: Sequence[str] = (),
    join_corpora: bool = False,
) -> Report:
    """Make a page about runs, with a part for each setting and a law for each method in it.

    Args:
        records: Records by run folder; per-token results are read from these folders.
        title: Heading of the page.
        by: Further fields of a record to split laws by, see `pml.groups.group_runs`.
        join_corpora: Fit one law across corpora of different names, such as files of several lengths.

    Raises:
        InputError: If there is no record, or no record has a value for one of the fields in `by`.
    """
    if not records:
        raise InputError("no record: expected at least one run; give folders with finished runs")
    studies = make_studies(group_runs(records, by, join_corpora=join_corpora))
    environment = jinja2.Environment(
        # Text in records comes from elsewhere, so it is escaped everywhere.
        autoescape=True,
        loader=jinja2.PackageLoader("pml.report"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # The style sheet is ours; escaping it would break its quotes.
    style = Markup(environment.get_template("report.css").render())
    content = {
        "title": title,
        "lead": _lead(records),
        "studies": studies,
        "side_by_side": side_by_side(laws_by_name(studies)),
        "provenance": provenance(records),
        "version": version("pml"),
        "runs": len(records),
    }
    html = environment.get_template("report.html").render(report=content, style=style)
    panels = [panel for study in studies for section in study.sections for panel in section.panels]
    return Report(html + "\n", {f"{panel.name}.png": panel.png for panel in panels})


def write_report(report: Report, folder: Path, *, overwrite: bool = False) -> Path:
    """Write `report.html` and its figures, and return the path of the page.

    Figures of the replaced report that this one lacks are removed; other files stay.

    Args:
        report: The report from `make_report`.
        folder: Where to write; created if missing.
        overwrite: Replace a page with other content.

    Raises:
        InputError: If the folder holds another page and `overwrite` is false, or cannot be written to.
    """
    path = folder / PAGE_NAME
    try:
        former = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        if former and former != report.html and not overwrite:
            raise InputError(f"{path}: holds another report; give another --out, or --overwrite to replace it")
        stale = set(re.findall(r'data-png="([a-z0-9-]+\.png)"', former)) if SIGNATURE in former else set()
        for name in stale - report.figures.keys():
            (folder / FIGURES / name).unlink(missing_ok=True)
        for name, content in report.figures.items():
            _write(folder / FIGURES / name, content)
        # The page comes last: a folder that has one has all of its figures.
        _write(path, report.html.encode())
    except OSError as error:
        raise InputError(f"--out {folder}: cannot be written ({error.strerror}); choose another folder") from error
    return path


def _write(path: Path, content: bytes) -> None:
    with whole_file(path) as file:
        file.write(content)


def _lead(records: Mapping[Path, Record]) -> str:
    runs = records.values()
    finished = sum(record.status == "finished" for record in runs)
    backbones = sorted({record.backbone for record in runs})
    unfinished = f", {finished:,} of them finished" if finished < len(records) else ""
    return (
        f"{count(len(records), 'run')}{unfinished}: {', '.join(backbones)}, LoRA rank {spans(r.rank for r in runs)}, "
        f"{spans(r.target_tokens for r in runs)} target tokens."
    )
