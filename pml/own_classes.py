"""Classes of people's own: found beside a configuration; not imported from a run that is only opened."""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pml.errors import InputError

__all__ = ["OPTION", "allowed", "check_class_of_checkpoint", "make_importable", "own_classes_refused"]

OPTION = "--own_classes"
"""Lets a command import the classes that a run's configuration names."""

TRUSTED = ("pml", "data_modules", "callbacks", "lightning", "torch")
"""Packages whose classes any configuration may name."""


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


@contextmanager
def own_classes_refused(config: Any, path: Path) -> Iterator[None]:
    """Within it, nothing that is parsed imports a class of another package, unless `--own_classes` was given.

    A run may come from anyone, and importing a module runs it. Classes that are there already, in a notebook for
    example, run nothing.

    Args:
        config: What the file says.
        path: The file.

    Raises:
        InputError: If it names one.
    """
    if _State.allowed:
        make_importable([Path.cwd(), path.resolve().parent])
        yield
        return
    import jsonargparse
    from jsonargparse._common import parsing_settings

    named = set(_class_paths(config))
    if (foreign := next(filter(_is_foreign, named), None)) is not None:
        raise _refusal(path, foreign)
    before = dict(parsing_settings)
    try:
        # The parser has the last word: there are more ways to name a class than by its own key.
        here = [class_path for class_path in named if _is_here(class_path)]
        jsonargparse.set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=[*TRUSTED, *here])
        yield
    except (jsonargparse.ArgumentError, ValueError) as error:
        if (denied := re.search(r"Importing '(.+?)' is not allowed", str(error))) is not None:
            raise _refusal(path, denied[1]) from error
        raise
    finally:
        parsing_settings.update(before)


def check_class_of_checkpoint(path: Path, made_with: Mapping[str, Any], asked: str | None) -> None:
    """Refuse a checkpoint that names a class of another package which its user has not asked for.

    Args:
        path: The checkpoint.
        made_with: Hyperparameters in it.
        asked: The model's class in the configuration.

    Raises:
        InputError: If it does, unless `--own_classes` was given.
    """
    named = made_with.get("_class_path")
    if named is None or named == asked or _State.allowed:
        return
    # Lightning writes whole paths; a bare name is not its own.
    if "." not in str(named) or _is_foreign(str(named)):
        raise _refusal(path, str(named))


def _refusal(path: Path, class_path: str) -> InputError:
    return InputError(
        f"{path} names the class {class_path}, which is not pml's; to import it would run its code: if you trust it, "
        f"add {OPTION}"
    )


def _is_foreign(class_path: str) -> bool:
    """Whether a module of another package would have to be imported for a class; a bare name imports nothing."""
    package, dot, _ = class_path.partition(".")
    return bool(dot) and package not in TRUSTED and not _is_here(class_path)


def _is_here(class_path: str) -> bool:
    """Whether it is a class of a kind that configurations name, and has been imported."""
    from lightning.pytorch import Callback, LightningDataModule, LightningModule

    module, _, name = class_path.rpartition(".")
    made = getattr(sys.modules.get(module), name, None)
    return isinstance(made, type) and issubclass(made, (LightningModule, LightningDataModule, Callback))


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
