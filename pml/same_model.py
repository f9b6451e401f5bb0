"""Check that the model options agree with a checkpoint before a fit resumes from it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pml.arguments import options_in
from pml.errors import InputError
from pml.yaml_file import read_yaml

__all__ = ["asked_model", "differences", "refuse_other_model"]


def refuse_other_model(arguments: Sequence[str], configs: Sequence[Path], made_with: Mapping[str, Any]) -> None:
    """Refuse model options that contradict a checkpoint, which would otherwise override them silently.

    Args:
        arguments: Arguments of the command line.
        configs: The configuration files among them.
        made_with: Hyperparameters in the checkpoint.

    Raises:
        InputError: If an option or a configuration key has another value in the checkpoint.
    """
    made = {key: value for key, value in made_with.items() if not key.startswith("_")}
    if method := made_with.get("_class_path"):
        made["class"] = str(method).rpartition(".")[2]
    if made and (found := differences(asked_model(arguments, configs), made, "model")):
        raise InputError(
            f"{'; '.join(found)}: a fit resumes with its checkpoint's settings; leave out what differs, or start anew"
        )


def asked_model(arguments: Sequence[str], configs: Sequence[Path]) -> dict[str, Any]:
    """Model settings given in configurations and arguments, nested by key, with class names under `class`.

    Example:
        >>> asked_model(["--model=SFT", "--model.adapter.rank=4", "--model.init_args.seed", "3"], [])
        {'class': 'SFT', 'adapter': {'rank': 4}, 'seed': 3}
        >>> asked_model(['--model={"class_path": "pml.MemFT", "init_args": {"weighting": "OnlyThreshold"}}'], [])
        {'class': 'MemFT', 'weighting': 'OnlyThreshold'}
    """
    asked: dict[str, Any] = {}
    for config in configs:
        content = read_yaml(config)
        _lay_over(asked, _settings((content.get("fit") or content).get("model")))
    for name, text in options_in(arguments):
        if name != "--model" and not name.startswith("--model."):
            continue
        keys = [key for key in name.removeprefix("--model").split(".") if key not in ("", "init_args")]
        # `--model` is a bare class name or, from a sweep, a class with its arguments as JSON.
        value: Any = _settings(yaml.safe_load(text) if keys or text.lstrip().startswith("{") else text)
        for key in reversed(keys):
            value = {"class" if key == "class_path" else key: value}
        _lay_over(asked, value if isinstance(value, dict) else {"class": _class(str(value))})
    return asked


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
