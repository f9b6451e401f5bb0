"""Check that the model options agree with a checkpoint before a fit resumes from it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pml.arguments import CONFIG_OPTIONS, SUFFIXES, options_in
from pml.errors import InputError
from pml.yaml_file import read_yaml

__all__ = ["differences", "refuse_other_model", "requested_model"]


def refuse_other_model(arguments: Sequence[str], made_with: Mapping[str, Any]) -> None:
    """Refuse model options that contradict a checkpoint, which would otherwise override them silently.

    Args:
        arguments: Arguments of the command line.
        made_with: Hyperparameters in the checkpoint.

    Raises:
        InputError: If an option or a configuration key has another value in the checkpoint.
    """
    made = {key: value for key, value in made_with.items() if not key.startswith("_")}
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
    """
    requested: dict[str, Any] = {}
    for name, text in options_in(arguments):
        if name in CONFIG_OPTIONS:
            content = read_yaml(Path(text))
            keys, value = [], (content.get("fit") or content).get("model")
        elif name == "--model" or name.startswith("--model."):
            keys = [key for key in name.removeprefix("--model").split(".") if key not in ("", "init_args")]
            # `--model` is a class name, a file or, from a sweep, a class with its arguments as JSON.
            is_yaml = keys or text.lstrip().startswith("{")
            value = yaml.safe_load(text) if is_yaml else read_yaml(Path(text)) if text.endswith(SUFFIXES) else text
        else:
            continue
        value = _settings(value)
        for key in reversed(keys):
            value = {"class" if key == "class_path" else key: value}
        if value is not None:
            _lay_over(requested, value if isinstance(value, dict) else {"class": _class(str(value))})
    return requested


def differences(asked: Mapping[str, Any], made_with: Mapping[str, Any], where: str) -> list[str]:
    """Describe each requested setting that differs from the checkpoint's; null requests nothing.

    Args:
        asked: Requested settings.
        made_with: The checkpoint's settings; a setting that is missing or null there cannot differ.
        where: Prefix of the names.

    Example:
        >>> differences({"lr": 0.5, "adapter": {"rank": 4}}, {"lr": 0.05, "adapter": {"rank": 4}}, "model")
        ['model.lr is 0.5, in the checkpoint 0.05']
    """
    found = []
    for name, value in asked.items():
        key = where if name == "class" else f"{where}.{name}"
        if value is None or name not in made_with:
            continue
        here, there = value, _settings(made_with[name])
        if isinstance(there, dict):
            found += differences(here if isinstance(here, dict) else {"class": _class(str(here))}, there, key)
        elif there is not None and not _same(here, there):
            found.append(f"{key} is {here}, in the checkpoint {there}")
    return found


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
        if isinstance(value, Mapping) and isinstance(below.get(key), dict):
            _lay_over(below[key], value)
        else:
            below[key] = dict(value) if isinstance(value, Mapping) else value
