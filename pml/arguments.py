"""Checks of a fit's command line that run before it is parsed."""

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from pml.errors import InputError
from pml.yaml_file import read_yaml

__all__ = [
    "CONFIG_OPTIONS",
    "SUFFIXES",
    "check_files",
    "check_template_kwargs",
    "files_given",
    "limit_of",
    "names_data",
    "options_in",
    "part_of",
]

CONFIG_OPTIONS = ("--config", "-c")

BATCHING_ARGUMENTS = ("batch_size", "shuffle", "drop_last")
"""Arguments of a data module that do not change its corpus."""

SUFFIXES = (".yaml", ".yml", ".json")
"""Suffixes of files that hold a part of the configuration."""


def check_files(arguments: Sequence[str]) -> None:
    """Read all configuration files strictly, since the parser is more lenient.

    Raises:
        InputError: If a file is empty, invalid or a pipe. The message names it.
    """
    parts = [path for path in files_given(arguments, ("--model", "--data", "--trainer")) if path.suffix in SUFFIXES]
    for path in (*files_given(arguments, CONFIG_OPTIONS), *parts):
        if _is_pipe(path):
            raise InputError(f"{path}: a pipe, which can be read only once; expected a file, so write it to one")
        if not read_yaml(path):
            raise InputError(f"{path}: empty; expected keys with values, such as `trainer: {{max_epochs: 5}}`")


def _is_pipe(path: Path) -> bool:
    try:
        return path.is_fifo()
    except OSError:  # such as too long a name, which reading it reports
        return False


def check_template_kwargs(arguments: Sequence[str]) -> None:
    """Refuse options for single variables of a chat template, since text cannot be told from other values there.

    Raises:
        InputError: If there is one. The message shows the mapping to give instead.
    """
    for option, value in options_in(arguments):
        if (found := re.fullmatch(r"(--data\.(?:init_args\.)?template_kwargs)\.([^.=]+)", option)) is not None:
            raise InputError(
                f"{option}: {value!r} could be text or another value; expected a mapping: "
                f"{found[1]} '{{{found[2]}: {value}}}', with text in quotes"
            )


def options_in(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Options with their values, from `--name=value` or `--name value`; the latter form also lists the value itself.

    Example:
        >>> options_in(["--a=1", "--b", "2"])
        [('--a', '1'), ('--b', '2'), ('2', '')]
    """
    found = []
    for argument, following in pairwise([*map(str, arguments), ""]):
        name, equals, value = argument.partition("=")
        found.append((name, value if equals else following))
    return found


def files_given(arguments: Sequence[str], names: Sequence[str]) -> list[Path]:
    """Values of the options with these names, as paths."""
    return [Path(value) for name, value in options_in(arguments) if name in names]


def part_of(path: Path, name: str) -> Any:
    """`model`, `data` or `trainer` of a configuration file, whose keys may stand below `fit`; None without it."""
    content = read_yaml(path)
    return (content.get("fit") or content).get(name)


def limit_of(command: str) -> str:
    """The trainer's argument that limits the batches of `validate`, `test` or `predict`."""
    return f"limit_{'val' if command == 'validate' else command}_batches"


def names_data(arguments: Sequence[str], run: Path) -> bool:
    """Whether arguments, or configurations other than that of a run, set more of `data` than how it is batched."""
    options = [name.rpartition(".")[2] for name, _ in options_in(arguments) if name.startswith("--data")]
    named = {name.removeprefix("--") for name in options}
    for path in files_given(arguments, CONFIG_OPTIONS):
        if path.resolve().parent == run.resolve():
            continue
        data = part_of(path, "data")
        named |= {*data, *(data.get("init_args") or {})} if isinstance(data, dict) else {"data"} if data else set()
    return bool(named - {"init_args", *BATCHING_ARGUMENTS})
