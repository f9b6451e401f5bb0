"""Runs as a page tells of them: a study for each setting, and in it a part for each method."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pml.compare import compare, differences_table, means_table
from pml.errors import InputError
from pml.figures import (
    capacity_figure,
    first_failure_figure,
    recall_figure,
    stored_bits_figure,
    threshold_figure,
    token_loss_figure,
)
from pml.figures.capacity import CAPACITIES
from pml.groups import Group, differing, short_method_names
from pml.law import CRITICAL_LOSS, Equation, LawFit, Observation, observations_from_records, saturated, shared_setting
from pml.records import Record
from pml.report.law_part import LawPart, law_part
from pml.report.parts import Panel, count, draw, shown, spans
from pml.tables import TextTable, show_interval, show_loss, show_percent
from pml.token_results import FirstPositions, TokenResults, first_positions, rank_correlation, read_tokens

__all__ = ["Card", "MethodPart", "Study", "laws_by_name", "make_studies"]

CORPORA = {"random_tokens": "Random tokens", "phonebook": "Phone book"}


@dataclass(frozen=True)
class Card:
    """One group of runs in short: its equation and a few facts by name."""

    title: str
    equation: Equation
    facts: list[tuple[str, str]]


@dataclass(frozen=True)
class MethodPart:
    """What a page says about the runs of one method in one setting.

    Attributes:
        anchor: Its place on the page.
        method: The method.
        card: It in short.
        law: Its law, or None.
        no_law: Why there is none.
        threshold: Figures of tokens against p = 0.5.
        capacity: Figures of bits.
    """

    anchor: str
    method: str
    card: Card
    law: LawPart | None
    no_law: str
    threshold: list[Panel]
    capacity: list[Panel]


@dataclass(frozen=True)
class Study:
    """What a page says about the runs of one setting.

    Attributes:
        anchor: Its place on the page.
        title: The corpus, and in what else the setting differs from the others of the page.
        label: The same without what all settings of the page share; empty where there is one setting.
        setting: Backbone, place and initialisation of the adapter in one line.
        notes: Per-token results that could not be read.
        groups: A part for each method.
        recall: Figures of recall with all methods.
        comparisons: Tables of methods against each other.
        comparison_notes: What to know of these.
        more: Tables of what only some runs have measured.
        cells: Every run.
    """

    anchor: str
    title: str
    label: str
    setting: str
    notes: list[str]
    groups: list[MethodPart]
    recall: list[Panel]
    comparisons: list[TextTable]
    comparison_notes: list[str]
    more: list[TextTable]
    cells: TextTable


def make_studies(groups: list[Group]) -> list[Study]:
    """Put groups of the same setting together and say about each what its runs can show."""
    settings: dict[str, list[Group]] = {}
    for group in groups:
        settings.setdefault(repr(group.setting), []).append(group)
    names = differing(groups)
    ordered = sorted(settings.values(), key=lambda same: [_order(same[0].setting.get(name)) for name in names])
    return [_study(i + 1, sorted(same, key=_method_first), names) for i, same in enumerate(ordered)]


def _order(value: Any) -> tuple[float, str]:
    """Numbers by their size and before words, a list by its first element."""
    first = value[0] if isinstance(value, list) and value else value
    return (float(first), "") if isinstance(first, int | float) else (math.inf, str(first))


def laws_by_name(studies: list[Study]) -> dict[str, LawFit]:
    """The laws of a page by what tells them apart: the setting of the study, and the method where there are several."""
    several = len({group.method for study in studies for group in study.groups}) > 1
    return {
        ", ".join(filter(None, (study.label, group.method if several else ""))) or study.title: group.law.fit
        for study in studies
        for group in study.groups
        if group.law is not None
    }


def _corpus(setting: Mapping[str, Any]) -> str:
    corpus = shown(setting.get("corpus", "several corpora"))
    return CORPORA.get(corpus, corpus)


def _label(setting: Mapping[str, Any], names: Sequence[str]) -> str:
    """The settings of these names with their values."""
    return ", ".join(f"{name.rpartition('.')[2]} {_short(name, setting.get(name))}" for name in names)


def _short(name: str, value: Any) -> str:
    return shown(value)[:8] if name == "backbone_hash" else shown(value)


def _method_first(group: Group) -> tuple[bool, str]:
    """The plain method before the others, which are measured against it."""
    return group.method != "SFT", group.method


def _study(number: int, groups: list[Group], names: Sequence[str]) -> Study:
    anchor, setting = f"s{number}", groups[0].setting
    others = _label(setting, [name for name in names if name != "corpus"])
    title = ", ".join(filter(None, (_corpus(setting), others)))
    records = {path: record for group in groups for path, record in group.records.items()}
    tokens, unread = _tokens(records)
    parts = [
        _method_part(
            f"{anchor}-{i + 1}",
            f"{title}, {group.method}",
            group,
            {path: tokens[path] for path in group.records if path in tokens},
        )
        for i, group in enumerate(groups)
    ]
    methods = {group.method: _finished(group.records) for group in groups}
    comparisons, comparison_notes = _comparisons(records) if len(groups) > 1 else ([], [])
    return Study(
        anchor=anchor,
        title=title,
        label=title if "corpus" in names else others,
        setting=_setting(groups, records),
        notes=unread,
        groups=parts,
        recall=_recall_panels(anchor, methods),
        comparisons=comparisons,
        comparison_notes=comparison_notes,
        more=_more(records),
        cells=_cells(groups, parts),
    )


def _setting(groups: list[Group], records: Mapping[Path, Record]) -> str:
    setting = groups[0].setting
    known = ("backbone", "backbone_hash", "block", "placement", "init", "corpus")
    others = "".join(f", {name} {shown(value)}" for name, value in setting.items() if name not in known)
    runs = records.values()
    return (
        f"{count(len(runs), 'run')} of {shown(setting['backbone'])}, block {shown(setting['block'])}, "
        f"{shown(setting['placement'])}, {shown(setting['init'])} initialisation{others}; ranks "
        f"{spans(r.rank for r in runs)}, {spans(r.target_tokens for r in runs)} target tokens, "
        f"{count(len({r.seed for r in runs}), 'seed')}; {', '.join(group.method for group in groups)}."
    )


def _finished(records: Mapping[Path, Record]) -> list[Record]:
    return [record for record in records.values() if record.status == "finished"]


def _tokens(records: Mapping[Path, Record]) -> tuple[dict[Path, TokenResults], list[str]]:
    """Per-token results of the finished runs, and what to say of those that have none."""
    found, unread = {}, []
    for path, record in records.items():
        if record.status != "finished":
            continue
        try:
            found[path] = read_tokens(path)
        except InputError as error:
            unread.append(str(error))
    if not unread:
        return found, []
    return found, [f"Per-token results are missing for {count(len(unread), 'run')}, the first because of {unread[0]}."]


def _method_part(anchor: str, whose: str, group: Group, tokens: Mapping[Path, TokenResults]) -> MethodPart:
    records = _finished(group.records)
    cells = observations_from_records(group.records)
    law = law_part(cells, shared_setting(group.records), tokens.values(), anchor, whose)
    return MethodPart(
        anchor=anchor,
        method=group.method,
        card=_card(whose, group, law if isinstance(law, LawPart) else None, records, cells),
        law=law if isinstance(law, LawPart) else None,
        no_law=f"{law}." if isinstance(law, str) else "",
        threshold=_threshold_panels(anchor, whose, records, tokens),
        capacity=_capacity_panels(anchor, whose, cells, law if isinstance(law, LawPart) else None),
    )


def _card(whose: str, group: Group, law: LawPart | None, records: list[Record], cells: list[Observation]) -> Card:
    facts = [("runs", f"{len(group.records):,}")]
    if law is not None:
        facts.append(("R² of the law", f"{law.fit.best.r2:.4f}"))
        facts.append(("mean error of the law", f"{law.fit.best.mape_percent:.1f} %"))
        facts.append(("saturated runs", f"{sum(map(saturated, law.fit.observations)):,}"))
    if records:
        whole = sum(record.exact_match == 1 for record in records)
        facts.append(("everything recalled", f"{whole:,} of {count(len(records), 'run')}"))
        kappa = law.fit.bits_per_parameter if law is not None else None
        if kappa is not None:
            facts.append(("bits per parameter", f"{kappa.value:.3g} ({show_interval(kappa.interval)})"))
    equation = law.equation if law is not None else Equation("")
    return Card(whose, equation, facts)


# Figures -------------------------------------------------------------------------------------------------------------


def _recall_panels(anchor: str, methods: Mapping[str, list[Record]]) -> list[Panel]:
    seeds = max((len({record.seed for record in records}) for records in methods.values()), default=0)
    spread = (
        f"Means over {seeds} seeds; bars reach from the lowest to the highest." if seeds > 1 else "One seed a point."
    )
    everything = [record for records in methods.values() for record in records]
    panels = []
    for measure, title in (
        ("token_accuracy", "Target tokens right, by rank"),
        ("exact_match", "Whole targets right, by rank"),
    ):
        best = {
            method: max((getattr(record, measure) for record in records), default=None)
            for method, records in methods.items()
        }
        reached = "; ".join(f"{method} reaches {show_percent(value)} %" for method, value in best.items())
        panels.append(
            draw(
                f"{anchor}-{measure.replace('_', '-')}",
                title,
                f"Under teacher forcing. {spread}",
                f"{title} for {', '.join(methods)}, a panel for each length. {reached}.",
                lambda measure=measure: recall_figure(methods, measure),  # type: ignore[misc]
            )
        )
    if everything and all(record.pairs == 1 for record in everything):
        note = " With one target a run, a run counts as 0 or 100 %."
        panels[1] = Panel(**{**vars(panels[1]), "caption": panels[1].caption + note})
    return panels


def _threshold_panels(anchor: str, of: str, records: list[Record], tokens: Mapping[Path, TokenResults]) -> list[Panel]:
    shares = [100 * (1 - record.sub_threshold_fraction) for record in records]
    reach = f"from {min(shares):.0f} to {max(shares):.0f} %" if shares else ""
    by_rank = draw(
        f"{anchor}-certain-by-rank",
        "Tokens above the threshold, by rank",
        "Each point a run; lines through the means of each length.",
        f"{of}: share of target tokens with p above 0.5 against rank, a line for each length, {reach}.",
        lambda: threshold_figure(records, "rank"),
    )
    by_room = draw(
        f"{anchor}-certain-by-room",
        "Tokens above the threshold, by room",
        "Against adapter parameters per target token: where the adapter's size is what limits, all lengths fall on one "
        "curve.",
        f"{of}: share of target tokens with p above 0.5 against adapter parameters per target token, {reach}.",
        lambda: threshold_figure(records, "room"),
    )
    return [by_rank, by_room, _token_panel(anchor, of, tokens), _first_failure_panel(anchor, of, tokens)]


def _token_panel(anchor: str, of: str, tokens: Mapping[Path, TokenResults]) -> Panel:
    runs = list(tokens.values())
    total = sum(len(run.loss) for run in runs)
    certain = sum(int((run.loss < CRITICAL_LOSS).sum()) for run in runs)
    right = sum(int((run.correct & (run.loss >= CRITICAL_LOSS)).sum()) for run in runs)
    wrong = total - certain - right
    shares = (
        f"{100 * certain / total:.1f} % certain, {100 * right / total:.1f} % right all the same, "
        f"{100 * wrong / total:.1f} % wrong"
        if total
        else ""
    )
    return draw(
        f"{anchor}-token-losses",
        "Losses of single tokens around ln 2",
        f"{total:,} tokens of {count(len(runs), 'run')}: {shares}. Losses below 0.0001 are in the first bar.",
        f"{of}: histogram of token losses, split at ln 2: {shares}.",
        lambda: token_loss_figure(runs),
    )


def _first_failure_panel(anchor: str, of: str, tokens: Mapping[Path, TokenResults]) -> Panel:
    name, title = f"{anchor}-first-failure", "Where targets first fail"
    if not tokens:
        return Panel(name, title, missing="no run left per-token results")
    positions = FirstPositions.joined(first_positions(run) for run in tokens.values())
    found = rank_correlation(positions)
    if found is None:
        certain = int((positions.sub_threshold == positions.length).sum())
        few = (
            f"{len(positions.length) - certain} of {count(len(positions.length), 'target')} have a token with p <= 0.5"
        )
        return Panel(name, title, missing=f"{few}, too few or all at the same position for a rank correlation")
    alone = "" if found.rho_of_failing is None else f"; without them rho is {found.rho_of_failing:.3f}"
    unfailing = (
        f" {count(found.unfailing, 'target')} had every token right all the same and count as failing at their "
        f"end{alone}."
        if found.unfailing
        else ""
    )
    return draw(
        name,
        title,
        f"{count(found.targets, 'target')} with a token at p <= 0.5; the other {found.certain:,} are certain and not "
        f"shown.{unfailing} No point can lie below the line, so a part of the correlation is there by construction; "
        "the paper reports 0.908.",
        f"{of}: first wrong token against first token with p <= 0.5: Spearman's rho {found.rho:.3f} over "
        f"{count(found.targets, 'target')}.",
        lambda: first_failure_figure(positions, found),
    )


def _capacity_panels(anchor: str, of: str, cells: list[Observation], law: LawPart | None) -> list[Panel]:
    finished = [cell for cell in cells if cell.finished]
    per_parameter = [
        cell.stored_bits / cell.effective_parameters
        for cell in finished
        if cell.stored_bits is not None and cell.effective_parameters is not None
    ]
    below = sum(bits <= 0 for bits in per_parameter)
    hidden = f" {count(below, 'run')} with nothing stored: not drawn." if below else ""
    most = f"at most {max(per_parameter):.3g} bits per parameter" if per_parameter else ""
    kappa = law.fit.bits_per_parameter if law is not None else None
    line = (
        f" Solid: {kappa.value:.3g} bits per parameter (95 % interval {show_interval(kappa.interval)})."
        if kappa
        else ""
    )
    return [
        draw(
            f"{anchor}-bits-per-parameter",
            "Bits per parameter, and what other work found",
            f"On the dashed diagonal everything is stored. {most[:1].upper()}{most[1:]}. Horizontal lines: "
            f"{'; '.join(name for _, name in CAPACITIES)}.{hidden}",
            f"{of}: stored bits per adapter parameter against corpus bits per parameter: {most}, against 2 and 3.6 "
            "in the literature.",
            lambda: capacity_figure(cells),
        ),
        draw(
            f"{anchor}-stored-bits",
            "Stored bits, by adapter parameters",
            f"Dotted: all the bits there are in a corpus of that length.{line}{hidden}",
            f"{of}: stored bits against adapter parameters, a marker for each length.{line}",
            lambda: stored_bits_figure(cells, kappa.value if kappa else None),
        ),
    ]


# Tables --------------------------------------------------------------------------------------------------------------


def _comparisons(records: Mapping[Path, Record]) -> tuple[list[TextTable], list[str]]:
    """Methods against each other, and what to know of it."""
    try:
        (found,) = compare(records)
    except InputError as error:
        return [], [f"Methods are not compared: {error}."]
    notes = list(found.verdicts)
    notes += [f"{name} differs too: {', '.join(values)}." for name, values in found.settings.items()]
    if found.left_out:
        runs = {run for left in found.left_out for run in left.runs}
        reasons = "; ".join(list(dict.fromkeys(left.reason for left in found.left_out))[:3])
        notes.append(f"Not compared, or in steps alone: {count(len(runs), 'run')} ({reasons}).")
    return [means_table(found), differences_table(found)], notes


def _cells(groups: list[Group], parts: list[MethodPart]) -> TextTable:
    """Every run with what was measured and what the law says; what no run has is left out."""
    rows: list[dict[str, str]] = []
    order = []
    short = short_method_names(group.method for group in groups)
    for group, part in zip(groups, parts, strict=True):
        cells = observations_from_records(group.records)
        bits = {cell.source: cell.stored_bits for cell in cells}
        used = {run.source: predicted for run, predicted in part.law.fit.used} if part.law else {}
        why: dict[str, str] = {cell.source: "saturated" for cell in cells if cell.finished and saturated(cell)}
        why |= {cell.source: cell.reason for cell in part.law.fit.left_out} if part.law else {}
        for path, record in group.records.items():
            source = path.as_posix()
            order.append((record.target_tokens, record.rank, group.method, record.seed, source))
            rows.append(_cell(record, short[group.method], bits.get(source), used.get(source), why.get(source)))
    rows = [row for _, row in sorted(zip(order, rows, strict=True), key=lambda item: item[0])]
    names = [name for name in rows[0] if name == "rank" or any(row[name] != "-" for row in rows)]
    if len(groups) == 1:
        names.remove("method")
    return TextTable(
        f"{count(len(rows), 'run')}",
        names,
        [[row[name] for name in names] for row in rows],
        words=[i for i, name in enumerate(names) if name in ("method", "note")],
        note="Losses in nats per target token; shares in percent.",
        small=True,
    )


def _cell(
    record: Record, method: str, stored: float | None, predicted: float | None, reason: str | None
) -> dict[str, str]:
    return {
        "target tokens": f"{record.target_tokens:,}",
        "rank": f"{record.rank:,}",
        "method": method,
        "seed": str(record.seed),
        "start loss": show_loss(record.initial_loss),
        "final loss": show_loss(record.final_loss),
        "loss reduction": show_loss(record.loss_reduction),
        "by the law": "-" if predicted is None else show_loss(predicted),
        "tokens right %": show_percent(record.token_accuracy),
        "exact match %": show_percent(record.exact_match),
        "generated %": show_percent(record.generated_exact_match),
        "p <= 0.5 %": show_percent(record.sub_threshold_fraction),
        "recall after": shown(record.steps_to_recall),
        "bits per parameter": "-" if stored is None else f"{stored / record.effective_parameters:.3f}",
        "late drop": "-" if record.late_loss_drop is None else f"{record.late_loss_drop:+.3f}",
        "note": reason or ("-" if record.status == "finished" else record.status),
    }


def _more(records: Mapping[Path, Record]) -> list[TextTable]:
    """What memorising did to other text, and tokens put in at random apart from the others, where runs measured it."""
    retention = [
        (f"{r.target_tokens:,}", f"{r.rank:,}", str(r.seed), text, *(show_loss(v) for v in _before_after(found)))
        for r in records.values()
        for text, found in r.retention.items()
    ]
    kinds = [
        (f"{r.target_tokens:,}", f"{r.rank:,}", str(r.seed), kind, *_kind(found))
        for r in records.values()
        for kind, found in sorted(r.by_kind.items())
    ]
    tables = [
        TextTable(
            "What memorising did to other text",
            ("target tokens", "rank", "seed", "text", "loss before", "loss after"),
            retention,
            words=(3,),
            note="Loss in nats per token of text outside the corpus.",
        ),
        TextTable(
            "Tokens put in at random, and the others",
            ("target tokens", "rank", "seed", "kind", "tokens", "start loss", "final loss", "tokens right %"),
            kinds,
            words=(3,),
        ),
    ]
    return [table for table in tables if table.rows]


def _before_after(found: Mapping[str, float | None]) -> tuple[float | None, float | None]:
    return found.get("loss_before"), found.get("loss_after")


def _kind(found: Mapping[str, Any]) -> tuple[str, str, str, str]:
    tokens = found.get("target_tokens")
    return (
        "-" if tokens is None else f"{tokens:,.0f}",
        show_loss(found.get("initial_loss")),
        show_loss(found.get("final_loss")),
        show_percent(found.get("token_accuracy")),
    )
