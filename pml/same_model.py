"""Check that the model options agree with a checkpoint before a fit resumes from it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pml.adapter import AdapterConfig
from pml.arguments import CONFIG_OPTIONS, SUFFIXES, options_in, part_of
from pml.cpu import CpuConfig
from pml.errors import InputError
from pml.plain import as_plain
from pml.state_store import CacheConfig
from pml.weighting import WholeTargets
from pml.yaml_file import read_yaml

__all__ = ["differences", "refuse_other_model", "refuse_other_settings", "requested_model"]

NULL_IS_DEFAULT = {"adapter": AdapterConfig, "frozen_prefix": CacheConfig, "cpu": CpuConfig, "weighting": WholeTargets}
"""Arguments of the models for which null stands for an object with its defaults; elsewhere null is a value."""

IMMATERIAL = ("backbone", "frozen_prefix", "cpu", "compile", "cuda_graphs")
"""Arguments of the models on which the result does not depend; the backbone is compared by its hash."""


def refuse_other_model(arguments: Sequence[str], made_with: Mapping[str, Any]) -> None:
    """Refuse model options that contradict a checkpoint, which would otherwise override them silently.

    Args:
        arguments: Arguments of the command line.
        made_with: Hyperparameters in the checkpoint.

    Raises:
        InputError: If an option or a configuration key has another value in the checkpoint.
    """
    made = _with_defaults(made_with)
    if method := made_with.get("_class_path"):
        made["class"] = str(method).rpartition(".")[2]
    if made and (found := differences(requested_model(arguments), made, "model")):
        raise InputError(
            f"{'; '.join(found)}: a fit resumes with its checkpoint's settings; leave out what differs, or start anew"
        )


def requested_model(arguments: Sequence[str]) -> dict[str, Any]:
    """Model settings given in arguments and in their configuration files, by key, with class names under `class`.

    Later arguments override earlier ones, as in the parser.

    Example:
        >>> requested_model(["--model=SFT", "--model.adapter.rank=4", "--model.init_args.seed", "3"])
        {'class': 'SFT', 'adapter': {'rank': 4}, 'seed': 3}
        >>> requested_model(['--model={"class_path": "pml.MemFT", "init_args": {"weighting": "OnlyThreshold"}}'])
        {'class': 'MemFT', 'weighting': 'OnlyThreshold'}
        >>> requested_model(["--model.weighting=pml.weighting.SlidingWindow", "--model.weighting.window=3"])
        {'weighting': {'class': 'SlidingWindow', 'window': 3}}
    """
    requested: dict[str, Any] = {}
    keys: list[str]
    for name, text in options_in(arguments):
        if name in CONFIG_OPTIONS:
            keys, value = [], part_of(Path(text), "model")
        elif name == "--model":
            keys, value = [], _class_or_settings(text)
        elif name.startswith("--model."):
            keys = [key for key in name.split(".")[1:] if key != "init_args"]
            value = yaml.safe_load(text)
        else:
            continue
        value = _settings(value)
        for key in reversed(keys):
            value = {"class": _class(str(value))} if key == "class_path" else {key: value}
        if value is not None:
            _lay_over(requested, value if isinstance(value, dict) else {"class": _class(str(value))})
    return requested


def _class_or_settings(text: str) -> Any:
    """What `--model` names: a class, a file of settings or, from a sweep, settings as JSON."""
    if text.lstrip().startswith("{"):
        return yaml.safe_load(text)
    return read_yaml(Path(text)) if text.endswith(SUFFIXES) else text


def refuse_other_settings(given: Mapping[str, Any], made_with: Mapping[str, Any]) -> None:
    """Refuse to resume a module with other settings than a checkpoint's, some of which would be overridden silently.

    Args:
        given: Hyperparameters of the module.
        made_with: Hyperparameters in the checkpoint; empty in those of other programs.

    Raises:
        InputError: If one differs on which the result depends.
    """
    asked = {name: value for name, value in _with_defaults(given).items() if name not in IMMATERIAL}
    if asked.get("seed") is None:  # that of the checkpoint holds
        asked.pop("seed", None)
    if found := differences(asked, _with_defaults(made_with), "model", null_requests=True):
        raise InputError(
            f"{'; '.join(found)}: a fit resumes with its checkpoint's settings; make the module with these, or start "
            "anew"
        )


def _with_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Hyperparameters without Lightning's own, and with objects for null where that stands for one."""
    return {
        name: as_plain(NULL_IS_DEFAULT[name]()) if value is None and name in NULL_IS_DEFAULT else value
        for name, value in settings.items()
        if not name.startswith("_")
    }


def differences(
    asked: Mapping[str, Any], made_with: Mapping[str, Any], where: str, *, null_requests: bool = False
) -> list[str]:
    """Describe each requested setting that differs from the checkpoint's.

    Args:
        asked: Requested settings.
        made_with: The checkpoint's settings; a setting that is missing there cannot differ.
        where: Prefix of the names.
        null_requests: Whether null is a value that is requested; otherwise it requests nothing.

    Example:
        >>> differences({"lr": 0.5, "adapter": {"rank": 4}}, {"lr": 0.05, "adapter": {"rank": 4}}, "model")
        ['model.lr is 0.5, in the checkpoint 0.05']
    """
    found = []
    for name, value in asked.items():
        key = where if name == "class" else f"{where}.{name}"
        if (value is None and not null_requests) or name not in made_with:
            continue
        here, there = _settings(value), _settings(made_with[name])
        if isinstance(there, dict) and here is not None:
            nested = here if isinstance(here, dict) else {"class": _class(str(here))}
            found += differences(nested, there, key, null_requests=null_requests)
        elif not _same(here, there):
            found.append(f"{key} is {_shown(here)}, in the checkpoint {_shown(there)}")
    return found


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)


def _same(here: Any, there: Any) -> bool:
    if isinstance(here, list) and isinstance(there, (list, tuple)):
        return len(here) == len(there) and all(map(_same, here, there))
    try:
        # YAML reads 1e-3 as text.
        return float(here) == float(there)
    except (TypeError, ValueError):
        return str(here) == str(there)


def _settings(value: Any) -> Any:
    """Flatten `class_path` and `init_args`: arguments by name, and the class's last name under `class`."""
    if not isinstance(value, Mapping):
        return value
    arguments = {key: _settings(item) for key, item in value.items() if key not in ("class_path", "init_args")}
    arguments |= _settings(value.get("init_args")) or {}
    return {"class": _class(str(value["class_path"])), **arguments} if "class_path" in value else arguments


def _class(path: str) -> str:
    return path.rpartition(".")[2]


def _lay_over(below: dict[str, Any], above: Any) -> None:
    for key, value in above.items() if isinstance(above, Mapping) else ():
        if isinstance(value, Mapping) and isinstance(below.get(key), str):
            # Arguments of a class that was given by name alone.
            below[key] = {"class": _class(below[key]), **value}
        elif isinstance(value, Mapping) and isinstance(below.get(key), dict):
            _lay_over(below[key], value)
        else:
            below[key] = dict(value) if isinstance(value, Mapping) else value
