"""Studies of a page: one per setting, with the law of each method, then sections about all of its runs."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pml.compare import compare, differences_tables, means_table
from pml.errors import InputError
from pml.figures import recall_figure
from pml.figures.heat_map import is_grid
from pml.figures.recall import Measure
from pml.groups import Group, differing, short_method_names, varying
from pml.law import LawFit, Observation, observations_from_records, saturated
from pml.records import Record
from pml.report.law_part import law_part
from pml.report.parts import Panel, Section, draw, shown, spans
from pml.report.training import training_part
from pml.tables import TextTable, count, setting_order, show_loss, show_percent

__all__ = ["Study", "laws_by_name", "make_studies"]

CORPORA = {"random_tokens": "Random tokens", "phonebook": "Phone book"}
MEASURES: dict[Measure, str] = {
    "tokens_certain": "Target tokens with p > 0.5, by rank",
    "token_accuracy": "Target tokens right, by rank",
    "exact_match": "Whole targets right, by rank",
}


@dataclass(frozen=True)
class Study:
    """What a page says about the runs of one setting.

    Attributes:
        anchor: HTML id on the page.
        title: The corpus, and the other settings in which the studies of the page differ.
        label: Only the settings in which the studies differ; empty if there is one study.
        setting: Runs, backbone, adapter, lengths and methods in one sentence.
        laws: The law of each method that has one.
        sections: Sections about the runs, without empty ones.
    """

    anchor: str
    title: str
    label: str
    setting: str
    laws: dict[str, LawFit]
    sections: list[Section]


def make_studies(groups: list[Group]) -> list[Study]:
    """Make a study of the groups of each setting, ordered by the settings that differ."""
    settings: dict[str, list[Group]] = {}
    for group in groups:
        settings.setdefault(repr(group.setting), []).append(group)
    names = differing(groups)
    ordered = sorted(settings.values(), key=lambda same: [setting_order(same[0].setting.get(name)) for name in names])
    # SFT comes first, since the other methods are compared with it.
    return [
        _study(i + 1, sorted(same, key=lambda group: (group.method != "SFT", group.method)), names)
        for i, same in enumerate(ordered)
    ]


def laws_by_name(studies: list[Study]) -> dict[str, LawFit]:
    """The laws of all studies by what tells them apart: the setting, and the method if there are several."""
    several = len({method for study in studies for method in study.laws}) > 1
    return {
        ", ".join(filter(None, (study.label, method if several else ""))) or study.title: law
        for study in studies
        for method, law in study.laws.items()
    }


def _study(number: int, groups: list[Group], names: Sequence[str]) -> Study:
    anchor, setting = f"s{number}", groups[0].setting
    others = ", ".join(
        f"{name.rpartition('.')[2]} {shown(setting.get(name))[: 8 if name == 'backbone_hash' else None]}"
        for name in names
        if name != "corpus"
    )
    corpus = shown(setting.get("corpus", "several corpora"))
    title = ", ".join(filter(None, (CORPORA.get(corpus, corpus), others)))
    records = {path: record for group in groups for path, record in group.records.items()}
    observations = {group.method: observations_from_records(group.records) for group in groups}
    short = short_method_names(group.method for group in groups)
    finished = {
        short[group.method]: {path: record for path, record in group.records.items() if record.status == "finished"}
        for group in groups
    }
    laws: dict[str, LawFit] = {}
    sections = []
    # A law needs several ranks and several lengths.
    grids = [group for group in groups if is_grid((run.rank, run.target_tokens) for run in group.records.values())]
    for i, group in enumerate(grids):
        method, heading = group.method, "The law" if len(grids) == 1 else f"The law: {group.method}"
        of = f"{title}, {method}"
        try:
            laws[method], section = law_part(group.records, heading, f"{anchor}-{i + 1}", of)
        except InputError as error:
            section = Section(heading, warnings=[f"{method}: no law ({error})."])
        sections.append(section)
    if len(groups) > 1:
        sections.append(_comparison(records))
    by_method = {method: list(runs.values()) for method, runs in finished.items()}
    sections += [
        Section("Recall by rank", panels=_recall_panels(anchor, by_method)),
        training_part(anchor, title, finished),
        Section("Runs", tables=[*_side_effects(groups), _runs(groups, observations, laws)]),
    ]
    return Study(
        anchor=anchor,
        title=title,
        label=title if "corpus" in names else others,
        setting=_setting(groups, records),
        laws=laws,
        sections=[section for section in sections if section],
    )


def _setting(groups: list[Group], records: Mapping[Path, Record]) -> str:
    setting, runs = groups[0].setting, records.values()
    known = ("backbone", "backbone_hash", "block", "placement", "init", "corpus")
    others = "".join(f", {name} {shown(value)}" for name, value in setting.items() if name not in known)
    return (
        f"{count(len(runs), 'run')} of {shown(setting['backbone'])}, block {shown(setting['block'])}, "
        f"{shown(setting['placement'])}, {shown(setting['init'])} initialisation{others}; LoRA rank "
        f"{spans(r.rank for r in runs)}, {spans(r.target_tokens for r in runs)} target tokens, "
        f"{count(len({r.seed for r in runs}), 'seed')}; {', '.join(group.method for group in groups)}."
    )


def _comparison(records: Mapping[Path, Record]) -> Section:
    """The section that compares the methods."""
    try:
        (found,) = compare(records)
    except InputError as error:
        return Section("Methods", sentences=[f"Methods are not compared: {error}."])
    notes = [f"{name} differs too: {', '.join(values)}." for name, values in found.settings.items()]
    if found.left_out:
        runs = {run for left in found.left_out for run in left.runs}
        reasons = "; ".join(list(dict.fromkeys(left.reason for left in found.left_out))[:3])
        notes.append(f"Not compared, or not in everything: {count(len(runs), 'run')} ({reasons}).")
    tables = [means_table(found), *differences_tables(found)]
    return Section("Methods", sentences=[*found.verdicts, *notes], tables=tables)


def _recall_panels(anchor: str, methods: Mapping[str, list[Record]]) -> list[Panel]:
    of_one_point = Counter((method, r.target_tokens, r.rank) for method, records in methods.items() for r in records)
    most = max(of_one_point.values(), default=1)
    spread = "One run per point."
    if most > 1:
        spread = f"Means over up to {most} runs; bars reach from the lowest to the highest."
        if others := dict.fromkeys(name for records in methods.values() for name in varying(records)):
            spread += f" Runs also differ in {', '.join(name.rpartition('.')[2] for name in others)}."
    return [
        panel
        for measure, title in MEASURES.items()
        for panel in draw(
            f"{anchor}-{measure.replace('_', '-')}",
            title,
            f"Under teacher forcing, that is, given the true preceding tokens. {spread}",
            f"{title} for {', '.join(methods)}, a panel for each length.",
            recall_figure(methods, measure),
        )
    ]


# Tables --------------------------------------------------------------------------------------------------------------


def _runs(groups: list[Group], observations: Mapping[str, list[Observation]], laws: Mapping[str, LawFit]) -> TextTable:
    """Every run with its measurements and the law's prediction; columns that no run has are left out."""
    rows, short = [], short_method_names(group.method for group in groups)
    for group in groups:
        law = laws.get(group.method)
        runs = {run.source: run for run in observations[group.method]}
        predicted = {run.source: show_loss(value) for run, value in law.used} if law else {}
        reasons: dict[str, str] = {s: "saturated" for s, run in runs.items() if law and run.finished and saturated(run)}
        reasons |= {left.source: left.reason for left in law.left_out} if law else {}
        for path, record in group.records.items():
            source = path.as_posix()
            bits = record.bits_per_parameter if len(runs) > 1 else None
            row = {
                "target tokens": f"{record.target_tokens:,}",
                "rank": f"{record.rank:,}",
                "method": short[group.method] if len(groups) > 1 else "-",
                "seed": str(record.seed),
                "start loss": show_loss(record.initial_loss),
                "final loss": show_loss(record.final_loss),
                "loss reduction": show_loss(record.loss_reduction) if law else "-",
                "predicted": predicted.get(source, "-"),
                "tokens certain": show_percent(1 - record.sub_threshold_fraction),
                "tokens right": show_percent(record.token_accuracy),
                "exact match": show_percent(record.exact_match),
                "generated": show_percent(record.generated_exact_match),
                "certain after": _steps_to_recall(record),
                "bits per parameter": "-" if bits is None else f"{bits:.3f}",
                "note": reasons.get(source) or ("-" if record.status == "finished" else record.status),
            }
            rows.append(((record.target_tokens, record.rank, group.method, record.seed, source), row))
    names = list(rows[0][1])
    return TextTable(
        "Every run",
        names,
        [list(row.values()) for _, row in sorted(rows, key=lambda item: item[0])],
        words=(names.index("method"), names.index("note")),
        note="Losses in nats per target token, shares in percent, certain after: in optimiser steps. Generated: "
        "targets that greedy decoding returns."
        + (" Saturated: final loss at most ln 2, so that the text limits the run, not the adapter." if laws else ""),
        small=True,
    ).without_empty_columns()


def _steps_to_recall(record: Record) -> str:
    """Steps until all tokens were certain, with the probability that each had to exceed where the record says it."""
    above = "" if record.steps_to_recall is None or record.recall_margin is None else f" (p > {record.recall_margin:g})"
    return f"{shown(record.steps_to_recall)}{above}"


def _side_effects(groups: list[Group]) -> list[TextTable]:
    """Tables of the loss on other text and of random against other target tokens, where runs measured them."""
    retention, kinds, short = [], [], short_method_names(group.method for group in groups)
    for method, run in ((group.method, run) for group in groups for run in group.records.values()):
        if run.status == "interrupted":
            continue
        of_run = (f"{run.target_tokens:,}", f"{run.rank:,}", short[method], str(run.seed))
        ordinary = ((f"ordinary text, {kind}", found) for kind, found in run.harm.items())
        for text, found in (*run.retention.items(), *ordinary):
            retention.append((*of_run, text, show_loss(found.get("loss_before")), show_loss(found.get("loss_after"))))
        for kind, found in sorted(run.by_kind.items()):
            tokens, losses = found.get("target_tokens"), (found.get("initial_loss"), found.get("final_loss"))
            number = "-" if tokens is None else f"{tokens:,.0f}"
            right = show_percent(found.get("token_accuracy"))
            kinds.append((*of_run, kind, number, *map(show_loss, losses), right))
    of_run = ("target tokens", "rank", "method", "seed")
    tables = [
        TextTable(
            "What memorising did to other text",
            (*of_run, "text", "loss before", "loss after"),
            retention,
            words=(2, 4),
            note="Loss in nats per token of text outside the corpus.",
        ),
        TextTable(
            "Tokens put in at random, and the others",
            (*of_run, "kind", "tokens", "start loss", "final loss", "tokens right %"),
            kinds,
            words=(2, 4),
        ),
    ]
    return [table for table in tables if table.rows]
