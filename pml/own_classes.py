"""User classes: found beside a configuration, but not imported from a run that is only opened."""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from pml.errors import InputError

__all__ = [
    "OPTION",
    "allowed",
    "check_class_of_checkpoint",
    "class_of",
    "folders_of_own_classes",
    "make_importable",
    "own_classes_refused",
]

OPTION = "--own_classes"
"""Option that lets a command import the classes that a run's configuration names."""

TRUSTED = ("pml", "data_modules", "callbacks", "lightning", "torch")
"""Packages whose classes any configuration may name."""


class _State:
    allowed = False
    opening = False
    """Whether a run is being opened whose code must not run."""
    appended: ClassVar[list[Path]] = []
    """Folders that `make_importable` appended to `sys.path`."""


@contextmanager
def allowed(yes: bool) -> Iterator[None]:
    """Within the context, runs that are opened may (`yes`) or may not name classes of other packages."""
    before, _State.allowed = _State.allowed, yes
    try:
        yield
    finally:
        _State.allowed = before


def make_importable(folders: Sequence[Path]) -> None:
    """Append folders to `sys.path`, so that their classes can be named; last, so that they hide no package.

    Not while a run is opened whose classes are refused: packages that look for others, which are not installed, would
    import files of these names from its folder.
    """
    for folder in folders if not _State.opening else ():
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
            _State.appended.append(folder)


def folders_of_own_classes() -> list[Path]:
    """Folders that `make_importable` appended and modules were imported from, except the working directory."""
    found: set[Path] = set()
    for name, module in list(sys.modules.items()):
        if "." not in name:
            places = list(getattr(module, "__path__", ())) or [getattr(module, "__file__", None)]
            found.update(Path(place).parent for place in places if place)
    return [folder for folder in _State.appended if folder in found and folder != Path.cwd()]


@contextmanager
def own_classes_refused(config: Any, path: Path) -> Iterator[None]:
    """Within the context, parsing imports no class of another package, unless `--own_classes` was given.

    A run may come from anyone, and importing a module runs it. Classes that are already imported, for example in a
    notebook, are allowed.

    Args:
        config: Content of the configuration file.
        path: The file.

    Raises:
        InputError: If the configuration names a class that would have to be imported.
    """
    if _State.allowed:
        make_importable([Path.cwd(), path.resolve().parent])
        yield
        return
    import jsonargparse
    from jsonargparse._common import parsing_settings

    named = dict.fromkeys(_class_paths(config))
    if (foreign := next(filter(_is_foreign, named), None)) is not None:
        raise _refusal(path, foreign)
    before, was_opening = dict(parsing_settings), _State.opening
    try:
        _State.opening = True
        # The parser checks again, since a configuration can name classes in more ways than `_class_paths` finds.
        here = [class_path for class_path in named if _is_here(class_path)]
        jsonargparse.set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=[*TRUSTED, *here])
        yield
    except (jsonargparse.ArgumentError, ValueError) as error:
        if (denied := re.search(r"Importing '(.+?)' is not allowed", str(error))) is not None:
            raise _refusal(path, denied[1]) from error
        raise
    finally:
        _State.opening = was_opening
        parsing_settings.update(before)


def class_of(class_path: str) -> type | None:
    """The class that a class path names, if its module is imported, as it is once a configuration is parsed."""
    module, _, name = class_path.rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    return found if isinstance(found, type) else None


def check_class_of_checkpoint(path: Path, made_with: Mapping[str, Any], asked: str | None) -> None:
    """Refuse a checkpoint whose model class is of another package and is not the one that the user asked for.

    Args:
        path: The checkpoint.
        made_with: Hyperparameters in the checkpoint.
        asked: Model class in the configuration.

    Raises:
        InputError: If it names such a class, unless `--own_classes` was given.
    """
    named = made_with.get("_class_path")
    if named is None or named == asked or _State.allowed:
        return
    # Lightning writes full paths, so a bare name was written by someone else.
    if "." not in str(named) or _is_foreign(str(named)):
        raise _refusal(path, str(named))


def _refusal(path: Path, class_path: str) -> InputError:
    return InputError(
        f"{path} names the class {class_path}, which is not pml's, and importing it would run its code; if you trust "
        f"it, add {OPTION}"
    )


def _is_foreign(class_path: str) -> bool:
    """Whether a class needs a module of another package to be imported; a bare name imports nothing."""
    package, dot, _ = class_path.partition(".")
    return bool(dot) and package not in TRUSTED and not _is_here(class_path)


def _is_here(class_path: str) -> bool:
    """Whether a class is already imported and is a module, a data module or a callback of Lightning."""
    from lightning.pytorch import Callback, LightningDataModule, LightningModule

    return issubclass(class_of(class_path) or object, (LightningModule, LightningDataModule, Callback))


def _class_paths(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            if key == "class_path":
                yield str(item)
            # These keys may also have the class path itself as their value.
            elif key in ("model", "data", "logger", "callbacks", "plugins", "profiler", "strategy", "text"):
                yield from (str(name) for name in (item if isinstance(item, list) else [item]) if isinstance(name, str))
            yield from _class_paths(item)
    elif isinstance(value, list):
        for item in value:
            yield from _class_paths(item)
