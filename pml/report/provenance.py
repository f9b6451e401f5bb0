"""How the runs were made: settings, versions, machines, and the hash of everything that went in."""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from pml.groups import SIZES, settings_of
from pml.records import RECORD_NAME, Record
from pml.report.parts import count, shown
from pml.tables import TextTable, short_names

__all__ = ["provenance"]

SHORT_HASH = 12


def provenance(records: Mapping[Path, Record]) -> list[TextTable]:
    """Tables of what all runs share, of what they differ in, and of each run."""
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
    environment = [(name, _counted(Counter(map(value, runs)), len(runs))) for name, value in _environment(runs).items()]
    tables = [
        TextTable("Settings of all runs", ("setting", "value"), shared, words=(0, 1)),
        TextTable(
            "Settings in which runs differ",
            ("setting", "values"),
            differing,
            words=(0, 1),
            note="Ranks, lengths and seeds are in the tables of runs.",
        ),
        TextTable("Versions and machines", ("what", "value"), environment, words=(0, 1)),
        _runs(records),
    ]
    return [table for table in tables if table.rows]


def _environment(runs: list[Record]) -> dict[str, Callable[[Record], str]]:
    packages = sorted({name for record in runs for name in record.versions})
    of_packages = {name: _version(name) for name in packages}
    return {
        **of_packages,
        "hardware": lambda record: shown(record.hardware),
        "commit of the working directory": lambda record: shown(record.git_commit),
        "layout of the records": lambda record: f"version {record.schema_version}",
    }


def _version(name: str) -> Callable[[Record], str]:
    return lambda record: record.versions.get(name, "-")


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
    """A dotted name without what only machines need."""
    name = name.removesuffix(".class_path").replace(".init_args", "")
    group, _, rest = name.partition(".")
    words = {"method_settings": "method", "corpus_settings": "corpus"}
    return f"{words.get(group, group)}: {rest}" if rest else name


def _counted(counts: Mapping[str, int], runs: int) -> str:
    """Values with how many runs have them, unless all runs have the same."""
    if list(counts.values()) == [runs]:
        return next(iter(counts))
    return "; ".join(f"{value} ({count(number, 'run')})" for value, number in sorted(counts.items()))
