"""What a command line says of a fit, looked at before a parser reads it."""

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from pml.errors import InputError
from pml.yaml_file import read_yaml

__all__ = ["CONFIG_OPTIONS", "check_files", "check_template_kwargs", "files_given", "options_in"]

CONFIG_OPTIONS = ("--config", "-c")

SUFFIXES = (".yaml", ".yml", ".json")


def check_files(arguments: Sequence[str]) -> None:
    """Read the files that a configuration comes from strictly, before parsers, which let some things pass.

    Raises:
        InputError: Naming the file.
    """
    parts = [path for path in files_given(arguments, ("--model", "--data", "--trainer")) if path.suffix in SUFFIXES]
    for path in (*files_given(arguments, CONFIG_OPTIONS), *parts):
        if not read_yaml(path):
            raise InputError(f"{path}: empty; expected keys with values, such as `trainer: {{max_epochs: 5}}`")


def check_template_kwargs(arguments: Sequence[str]) -> None:
    """Refuse single variables of a chat template as options, of which text and other values look alike.

    Raises:
        InputError: Saying how to give it.
    """
    for option, value in options_in(arguments):
        if (found := re.fullmatch(r"(--data\.(?:init_args\.)?template_kwargs)\.([^.=]+)", option)) is not None:
            raise InputError(
                f"{option}: whether {value!r} is text cannot be told; expected the mapping: "
                f"{found[1]} '{{{found[2]}: {value}}}', text in quotes"
            )


def options_in(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Options with their values, `--name=value` or `--name value`; values of the latter kind stand for themselves too.

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
    """Files that options of these names were given."""
    return [Path(value) for name, value in options_in(arguments) if name in names]
