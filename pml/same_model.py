"""Whether the model that is asked for is the one that a checkpoint is of: going on with another is refused."""

from collections.abc import Mapping, Sequence
from typing import Any

import jsonargparse

from pml.errors import InputError

__all__ = ["differences", "refuse_other_model"]


def refuse_other_model(
    parser: jsonargparse.ArgumentParser, arguments: Sequence[str] | None, command: Any, made_with: Mapping[str, Any]
) -> None:
    """Refuse model options that say otherwise than a checkpoint, which would overrule them without a word.

    Args:
        parser: Of the command line.
        arguments: What it was given.
        command: The subcommand, or None.
        made_with: Hyperparameters in the checkpoint.

    Raises:
        InputError: If an option that was given, or a key of a configuration, has another value there.
    """
    given = parser.parse_args(None if arguments is None else list(arguments), defaults=False).as_dict()
    asked = (given.get(command) or {}).get("model") if command else given.get("model")
    if not isinstance(asked, dict) or not made_with:
        return
    own = {key: value for key, value in made_with.items() if not key.startswith("_")}
    found = differences(asked.get("init_args") or {}, own, "model")
    method, before = str(asked.get("class_path", "")), str(made_with.get("_class_path", ""))
    if before and method and method.rpartition(".")[2] != before.rpartition(".")[2]:
        found.insert(0, f"model is {method}, in the checkpoint {before}")
    if found:
        raise InputError(
            f"{'; '.join(found)}: a checkpoint is gone on with as it was made; leave out what differs, or start anew"
        )


def differences(asked: Mapping[str, Any], made_with: Mapping[str, Any], where: str = "") -> list[str]:
    """Where settings that were asked for are not those that something was made with; what is null asks for nothing.

    Args:
        asked: What was given.
        made_with: What there is; a setting that is not in it cannot differ.
        where: Prefix of the names.

    Example:
        >>> differences({"lr": 0.5, "adapter": {"rank": 4}}, {"lr": 0.05, "adapter": {"rank": 4}}, "model")
        ['model.lr is 0.5, in the checkpoint 0.05']
    """
    found = []
    for name, value in asked.items():
        key = f"{where}.{name}" if where else name
        if value is None or name not in made_with:
            continue
        here, there = _settings(value), _settings(made_with[name])
        if isinstance(here, dict) and isinstance(there, dict):
            found += differences(here, there, key)
        elif here != there:
            found.append(f"{key} is {here}, in the checkpoint {there}")
    return found


def _settings(value: Any) -> Any:
    """A settings object as its arguments, its class among them where there are several of its kind."""
    if isinstance(value, Mapping):
        if "class_path" in value:
            name = str(value["class_path"]).rpartition(".")[2]
            return {"class": name, **(value.get("init_args") or {})}
        return dict(value)
    return list(value) if isinstance(value, tuple) else value
