"""Classes of people's own: found beside a configuration; not imported from a run that is only opened."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pml.errors import InputError

__all__ = ["OPTION", "allowed", "make_importable", "refuse_own_classes"]

OPTION = "--own_classes"
"""Lets a command import the classes that a run's configuration names."""

ROOMS = ("pml", "data_modules", "callbacks")


class _State:
    allowed = False


@contextmanager
def allowed(yes: bool) -> Iterator[None]:
    """Whether runs that are opened within it may name any class."""
    before, _State.allowed = _State.allowed, yes
    try:
        yield
    finally:
        _State.allowed = before


def make_importable(folders: Sequence[Path]) -> None:
    """Let classes in modules that lie in these folders be named; last, so that nothing there hides a package."""
    for folder in folders:
        if str(folder) not in sys.path:
            sys.path.append(str(folder))


def refuse_own_classes(config: Any, path: Path) -> None:
    """Refuse a configuration that names classes whose modules would have to be imported, other than pml's.

    A run may come from anyone, and importing a module runs it. What has been imported already runs nothing.

    Args:
        config: What the file says.
        path: The file.

    Raises:
        InputError: If it names one, unless `--own_classes` was given.
    """
    if _State.allowed:
        make_importable([Path.cwd(), path.resolve().parent])
        return
    for class_path in _class_paths(config):
        module = class_path.rpartition(".")[0]
        if module and module.partition(".")[0] not in ROOMS and module not in sys.modules:
            raise InputError(
                f"{path} names the class {class_path}, which is not pml's; to import it would run its code: if you "
                f"trust it, add {OPTION}"
            )


def _class_paths(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            if key == "class_path":
                yield str(item)
            # A class may be given by its path alone.
            elif key in ("model", "data", "logger", "callbacks", "plugins", "profiler", "strategy", "text"):
                yield from (str(name) for name in (item if isinstance(item, list) else [item]) if isinstance(name, str))
            yield from _class_paths(item)
    elif isinstance(value, list):
        for item in value:
            yield from _class_paths(item)
