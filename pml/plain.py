"""Conversion of settings objects to plain Python and back, so that checkpoints and records hold no classes."""

import dataclasses
from importlib import import_module
from typing import Any

__all__ = ["as_plain", "from_plain", "renamed"]

RENAMED: dict[str, str] = {"pml.prefix_store.PrefixConfig": "pml.state_store.CacheConfig"}
"""Class paths in older checkpoints and configurations, with their replacements."""


def as_plain(value: Any) -> Any:
    """A settings dataclass as `{class_path, init_args}`, also within containers; other values are unchanged."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        arguments = {f.name: as_plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        return {"class_path": f"{type(value).__module__}.{type(value).__qualname__}", "init_args": arguments}
    if isinstance(value, dict):
        return {key: as_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_plain(item) for item in value]
    return value


def from_plain(value: Any, kind: type) -> Any:
    """A settings object from the output of `as_plain`, or from a dictionary of its arguments.

    Args:
        value: `{class_path, init_args}`, or a dictionary of arguments of `kind`; anything else is returned as it is.
        kind: Class of the object, or a base of it.

    Raises:
        TypeError: If a class path names no class of pml that is a `kind`.
    """
    if not isinstance(value, dict):
        return value
    arguments, cls = value, kind
    if "class_path" in value:
        # A checkpoint may come from anyone, so only classes of this package and of this kind are created.
        module, _, name = str(renamed(value["class_path"])).rpartition(".")
        if module.partition(".")[0] != "pml":
            raise TypeError(f"{value['class_path']} is not a class of pml")
        cls, arguments = getattr(import_module(module), name), value.get("init_args", {})
        if not (isinstance(cls, type) and issubclass(cls, kind)):
            raise TypeError(f"{value['class_path']} is not a {kind.__name__}")
    return cls(**arguments)


def renamed(value: Any) -> Any:
    """A configuration with class paths of older versions replaced by those in `RENAMED`."""
    if isinstance(value, dict):
        return {key: renamed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [renamed(item) for item in value]
    return RENAMED.get(value, value) if isinstance(value, str) else value
