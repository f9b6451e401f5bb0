"""How the runs were made: settings, versions, machines, and the hashes of corpora, backbones and records."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from pml.groups import SIZES, settings_of
from pml.records import RECORD_NAME, Record
from pml.report.parts import shown
from pml.tables import TextTable, count, short_names

__all__ = ["provenance"]

SHORT_HASH = 12


def provenance(records: Mapping[Path, Record]) -> list[TextTable]:
    """Tables of the settings that all runs share, those that differ, versions and machines, and each run."""
    runs = list(records.values())
    settings = [settings_of(record) for record in runs]
    names = list(dict.fromkeys(name for one in settings for name in one))
    shared, differing = [], []
    for name in names:
        counts = Counter(shown(one[name]) for one in settings if name in one)
        if len(counts) == 1 and sum(counts.values()) == len(runs):
            shared.append((_readable(name), next(iter(counts))))
        elif name not in SIZES:
            differing.append((_readable(name), _counted(counts, len(runs))))
    environment = {
        name: [record.versions.get(name, "-") for record in runs]
        for name in sorted({name for record in runs for name in record.versions})
    } | {
        "hardware": [shown(record.hardware) for record in runs],
        "commit of the working directory": [shown(record.git_commit) for record in runs],
        "layout of the records": [f"version {record.schema_version}" for record in runs],
    }
    made_by = [(name, _counted(Counter(values), len(runs))) for name, values in environment.items()]
    tables = [
        TextTable("Settings of all runs", ("setting", "value"), shared, words=(0, 1)),
        TextTable(
            "Settings in which runs differ",
            ("setting", "values"),
            differing,
            words=(0, 1),
            note="Ranks, lengths and seeds are in the tables of runs.",
        ),
        TextTable("Versions and machines", ("what", "value"), made_by, words=(0, 1)),
        _runs(records),
    ]
    return [table for table in tables if table.rows]


def _runs(records: Mapping[Path, Record]) -> TextTable:
    rows = [
        (
            name,
            record.status,
            str(record.seed),
            f"{record.optimizer_steps:,}",
            f"{record.target_tokens_trained:,}",
            f"{record.wall_seconds:,.0f}",
            record.corpus_hash[:SHORT_HASH],
            record.backbone_hash[:SHORT_HASH],
            _file_hash(path / RECORD_NAME),
        )
        for name, (path, record) in zip(short_names(list(records)), records.items(), strict=True)
    ]
    columns = ("run", "status", "seed", "steps", "target tokens trained", "seconds", "corpus", "backbone", "record")
    note = f"First {SHORT_HASH} digits of the hashes of corpus, backbone and record (SHA-256 of the file)."
    return TextTable("Runs and hashes", columns, rows, words=(0, 1, 6, 7, 8), note=note, small=True)


def _file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:SHORT_HASH] if path.is_file() else "-"


def _readable(name: str) -> str:
    """A dotted name of a setting, without the parts that only machines need."""
    name = name.removesuffix(".class_path").replace(".init_args", "")
    group, _, rest = name.partition(".")
    words = {"method_settings": "method", "corpus_settings": "corpus"}
    return f"{words.get(group, group)}: {rest}" if rest else name


def _counted(counts: Mapping[str, int], runs: int) -> str:
    """Each value with its number of runs; only the value if all runs share it."""
    if list(counts.values()) == [runs]:
        return next(iter(counts))
    return "; ".join(f"{value} ({count(number, 'run')})" for value, number in sorted(counts.items()))
