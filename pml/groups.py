"""Runs grouped by what one law describes: one backbone, adapter placement and initialisation, corpus and method."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from pml.errors import InputError
from pml.names import AdapterSize
from pml.records import Record
from pml.tables import setting_order, short_names

__all__ = [
    "SIZES",
    "Group",
    "differing",
    "group_runs",
    "method_name",
    "method_names",
    "select_records",
    "setting_of",
    "settings_of",
    "shared_setting",
    "short_method_names",
    "training_of",
    "varying",
]

SETTING = ("backbone", "backbone_hash", "block", "placement", "init", "corpus")
# Corpus settings that change only the size of a corpus drawn from one seed.
DRAWN_SIZES = ("length", "count", "pairs", "people", "size", "target_tokens")
# Size and draw of the corpus, in which the runs of one law may differ.
SIZES = tuple(f"corpus_settings.{name}" for name in (*DRAWN_SIZES, "path", "seed"))
# Keys of `Record.training` that change the result.
TRAINING = ("global_batch_size", "gradient_clip_val", "gradient_clip_algorithm", "precision")
# Fields that all runs of one law must share.
OF_ONE_LAW = ("backbone_hash", "block", "placement", "init", "method")
# A law by effective parameters may mix these: it counts adapters of any shape by their parameters.
SHAPE = ("block", "placement")
NAMES = {"sft": "SFT", "memft": "MemFT"}
# Not a field of a record: the folder around the run's own, such as that of its sweep.
FOLDER = "folder"


@dataclass(frozen=True)
class Group:
    """Runs of one setting and method, which may differ in rank, length and seed.

    Attributes:
        setting: The fields of `SETTING`, and any further fields that the runs were split by.
        method: Name of the method, see `method_names`.
        records: Records by run folder.
    """

    setting: dict[str, Any]
    method: str
    records: dict[Path, Record]


def method_name(record: Record) -> str:
    """Display name of a run's method, with its weighting (unless `Uniform`) and its curriculum.

    Example: `SFT`, or `MemFT OnlyThreshold + PrefixRatio`.
    """
    parts = [_class_name(record.method_settings.get(key)) for key in ("weighting", "curriculum")]
    chosen = " + ".join(part for part in parts if part and part != "Uniform")
    return " ".join(filter(None, (NAMES.get(record.method, record.method), chosen)))


def method_names(records: Mapping[Path, Record]) -> dict[Path, str]:
    """`method_name` of each run, with the arguments of weighting and curriculum in which runs of that name differ.

    A record that is older than an argument of one of pml's classes counts as having the default.

    Example: `MemFT OnlyThreshold (threshold 0.7)`.
    """
    alike: dict[str, dict[Path, Record]] = {}
    for path, record in records.items():
        alike.setdefault(method_name(record), {})[path] = record
    names = {}
    for name, runs in alike.items():
        arguments = {path: _method_arguments(record) for path, record in runs.items()}
        every = dict.fromkeys(key for one in arguments.values() for key in one)
        for path, record in runs.items():
            arguments[path] |= {key: _default(record, key) for key in every.keys() - arguments[path].keys()}
        apart = [key for key in every if len({repr(one[key]) for one in arguments.values()}) > 1]
        for path in runs:
            described = ", ".join(f"{key} {arguments[path][key]}" for key in apart)
            names[path] = f"{name} ({described})" if apart else name
    return {path: names[path] for path in records}


def _method_classes(record: Record) -> list[dict[str, Any]]:
    """The weighting and the curriculum of a run, each as a class path with arguments."""
    chosen = (record.method_settings.get(key) for key in ("weighting", "curriculum"))
    return [one for one in chosen if isinstance(one, dict)]


def _method_arguments(record: Record) -> dict[str, Any]:
    """Arguments of a run's weighting and curriculum by name."""
    found = (one.get("init_args") for one in _method_classes(record))
    return {key: value for one in found if isinstance(one, dict) for key, value in one.items()}


def _default(record: Record, argument: str) -> Any:
    """Default of an argument of a run's weighting or curriculum; None if neither is a class of pml that has it."""
    for one in _method_classes(record):
        module, _, name = str(one.get("class_path")).rpartition(".")
        if module in ("pml.weighting", "pml.curriculum"):
            # Imported here because these import PyTorch, which takes seconds; few records lack an argument.
            fields = getattr(getattr(import_module(module), name, None), "__dataclass_fields__", {})
            if argument in fields:
                return fields[argument].default
    return None


def short_method_names(methods: Iterable[str]) -> dict[str, str]:
    """A short name for each method: its first word if all first words differ; otherwise `MemFT` is left out.

    Example:
        >>> short_method_names(["SFT", "MemFT OnlyThreshold", "MemFT WholeTargets"])
        {'SFT': 'SFT', 'MemFT OnlyThreshold': 'OnlyThreshold', 'MemFT WholeTargets': 'WholeTargets'}
    """
    names = list(dict.fromkeys(methods))
    for shorten in (lambda name: name.partition(" ")[0], lambda name: name.removeprefix(f"{NAMES['memft']} ")):
        short = {name: shorten(name) for name in names}
        if len(set(short.values())) == len(names):
            return short
    return {name: name for name in names}


def group_runs(records: Mapping[Path, Record], by: Sequence[str] = (), *, join_corpora: bool = False) -> list[Group]:
    """Runs grouped by backbone, block, placement, initialisation, corpus and method, in order of first appearance.

    Args:
        records: Records by run folder.
        by: Further fields of a record to split by, with dots into its settings (`method_settings.learning_rate`), or
            `folder`, the name of the folder that contains a run's own folder, which tells sweeps apart.
        join_corpora: Group corpora of different names together, such as files of several lengths.

    Raises:
        InputError: If no run has a value for one of the fields in `by`.
    """
    around = {path: path.resolve().parent for path in records}
    folders = list(dict.fromkeys(around.values()))
    named = dict(zip(folders, short_names(folders), strict=True))

    def value(path: Path, record: Record, name: str) -> Any:
        return named[around[path]] if name == FOLDER else setting_of(record, name)

    for name in by:
        if all(value(path, record, name) is None for path, record in records.items()):
            raise InputError(
                f"no run has a value for {name!r}; expected {FOLDER}, or a field of its record, with dots into its "
                "settings, such as dtype or method_settings.learning_rate"
            )
    names = [name for name in SETTING if not (join_corpora and name == "corpus")]
    settings: dict[str, tuple[dict[str, Any], dict[Path, Record]]] = {}
    for path, record in records.items():
        setting = {name: value(path, record, name) for name in dict.fromkeys((*names, *by))}
        # Values may be lists, which cannot be hashed; their repr can.
        settings.setdefault(repr(setting), (setting, {}))[1][path] = record
    groups: dict[tuple[str, str], Group] = {}
    for key, (setting, runs) in settings.items():
        for path, method in method_names(runs).items():
            groups.setdefault((key, method), Group(setting, method, {})).records[path] = runs[path]
    return list(groups.values())


def differing(groups: Sequence[Group]) -> list[str]:
    """Names of the settings in which groups differ, in order; the method is not among them."""
    names = dict.fromkeys(name for group in groups for name in group.setting)
    return [name for name in names if len({repr(group.setting.get(name)) for group in groups}) > 1]


def setting_of(record: Record, name: str) -> Any:
    """A field of a record, with dots into its dictionaries; None if the record lacks it."""
    first, *rest = name.split(".")
    value = getattr(record, first, None) if first in type(record).model_fields else None
    for key in rest:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def settings_of(record: Record) -> dict[str, Any]:
    """Everything that a run was made with, by dotted name: setting, dtype, method, and settings of method and corpus.

    Training settings are included, except a global batch of the whole corpus, which follows from the corpus.
    """
    flat = {name: getattr(record, name) for name in (*SETTING, "dtype", "method")}
    for name in ("method_settings", "corpus_settings"):
        flat |= _flattened(name, getattr(record, name))
    training = training_of(record)
    if (training.get("global_batch_size") or 0) >= record.pairs:
        del training["global_batch_size"]
    return flat | {f"training.{name}": value for name, value in training.items()}


def training_of(record: Record) -> dict[str, Any]:
    """The training settings of a run that change its result; records of earlier schema versions lack them."""
    return {name: record.training[name] for name in TRAINING if name in record.training}


def varying(records: Iterable[Record]) -> dict[str, list[Any]]:
    """Settings other than rank, length and seed in which runs differ, with their values.

    They include `optimizer_steps` if runs of one size that did not recall everything took different numbers of steps,
    and the global batch size if runs of equally many pairs had different batches.
    """
    known = list(records)
    all_settings = [settings_of(record) for record in known]
    names = dict.fromkeys(name for settings in all_settings for name in settings if name not in SIZES)
    found: dict[str, list[Any]] = {}
    for name in names:
        # A record that does not say how its run was trained does not count as different in that.
        having = [one for one in all_settings if name in one or not name.startswith("training.")]
        values = {repr(settings.get(name)): settings.get(name) for settings in having}
        if len(values) > 1:
            found[name] = sorted(values.values(), key=setting_order)
    batches: dict[int, set[int]] = {}
    steps: dict[tuple[int, int], set[int]] = {}
    for record in known:
        if size := record.training.get("global_batch_size"):
            batches.setdefault(record.pairs, set()).add(min(size, record.pairs))
        # A run may have stopped because it recalled; an interrupted run did not use its budget.
        if record.steps_to_recall is None and record.status == "finished":
            steps.setdefault((record.target_tokens, record.pairs), set()).add(record.optimizer_steps)
    for name, by_size in (("training.global_batch_size", batches), ("optimizer_steps", steps)):
        if different := [values for values in by_size.values() if len(values) > 1]:
            found[name] = sorted(set(found.get(name, [])).union(*different), key=setting_order)
    return found


def _flattened(prefix: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flattened(f"{prefix}.{key}", inner)
    return flat


def _class_name(value: Any) -> str:
    """Class name of a settings object as `pml.plain` writes it, or of a bare class path; empty for anything else."""
    if isinstance(value, dict):
        value = value.get("class_path")
    return value.rpartition(".")[2] if isinstance(value, str) else ""


def select_records(records: Mapping[Path, Record], where: Mapping[str, Any] | None = None) -> dict[Path, Record]:
    """The records whose fields have the values in `where`; all records without `where`.

    Args:
        records: Records by run folder.
        where: Values to keep by field, with dots into the record's settings (`method_settings.learning_rate`). A list
            of one element, such as `block`, may be given as that element.

    Raises:
        InputError: If a field does not exist, or no record is left.
    """
    kept = dict(records)
    for name, value in (where or {}).items():
        field = name.split(".")[0]
        if field not in Record.model_fields:
            raise InputError(f"where: a record has no field {field!r}; its fields are {', '.join(Record.model_fields)}")
        before = kept
        kept = {path: record for path, record in before.items() if setting_of(record, name) in (value, [value])}
        if before and not kept:
            found = [setting_of(record, name) for record in before.values()]
            if "." in name and all(value is None for value in found):
                names = {key for record in before.values() for key in settings_of(record)}
                known = ", ".join(sorted(key for key in names if key.startswith(f"{field}.")))
                raise InputError(f"where: no record has a setting {name!r}; those of {field} are {known or 'none'}")
            present = _counted(map(str, found))
            raise InputError(f"where: no record has {name} {value!r}; there are {present}; choose one of these")
    return kept


def shared_setting(records: Mapping[Path, Record], adapter_size: AdapterSize = "rank") -> dict[str, Any]:
    """What the runs of one law have in common: backbone, block, placement, initialisation and method.

    `corpus` lists the names of all corpora, which may differ: files of several lengths can belong to one law. `guarded`
    is there if an adapter was guarded, since its saved size is not that of its trainable parameters then. `pooled`
    lists other settings in which the runs differ (see `varying`), with their values.

    Args:
        records: Records by run folder.
        adapter_size: What the law counts as the adapter's size. By effective parameters, blocks and placements may
            differ; those that do are left out.

    Raises:
        InputError: If there is no record, or the runs differ in a field that one law must share.
    """
    if not records:
        raise InputError("no record: expected the records of at least 5 runs; give folders with finished runs")
    mixed = []
    for name in OF_ONE_LAW:
        values = [
            f"{record.backbone_hash} of {record.backbone}" if name == "backbone_hash" else str(getattr(record, name))
            for record in records.values()
        ]
        if len({str(getattr(record, name)) for record in records.values()}) == 1:
            continue
        if adapter_size == "effective_parameters" and name in SHAPE:
            mixed.append(name)
            continue
        hint = ", or count --by effective_parameters" if name in SHAPE else ""
        raise InputError(
            f"records of different {name}: {_counted(values)}; a law belongs to one of them: "
            f"keep one (--where.{name} VALUE), or give only its runs{hint}"
        )
    first = next(iter(records.values()))
    shared = {name: getattr(first, name) for name in ("backbone", *OF_ONE_LAW) if name not in mixed}
    shared["corpus"] = sorted({record.corpus for record in records.values()})
    if any(record.method_settings.get("guard") for record in records.values()):
        shared["guarded"] = True
    # Settings of different corpora may all differ; the list of corpora already says so.
    apart = "corpus_settings." if len(shared["corpus"]) > 1 else None
    pooled = {
        name: values
        for name, values in varying(records.values()).items()
        if name not in ("backbone", "corpus", *SHAPE) and not (apart and name.startswith(apart))
    }
    return shared | ({"pooled": pooled} if pooled else {})


def _counted(values: Iterable[str]) -> str:
    """Values with their counts, such as `memft (8 runs), sft (1 run)`."""
    return ", ".join(
        f"{value} ({count} run{'s' if count > 1 else ''})" for value, count in sorted(Counter(values).items())
    )
