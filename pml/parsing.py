"""What jsonargparse makes of values, put right: text stays text, and whole numbers stay whole."""

import functools
import inspect
import operator
import re
import typing
from typing import Any

import yaml
from jsonargparse import _typehints
from lightning.pytorch import Trainer

__all__ = ["keep_text", "keep_whole_numbers_whole"]

NULLS = ("", "~", "null", "Null", "NULL")
"""What YAML reads as null on purpose."""


@functools.cache
def keep_text() -> None:
    """Have text that YAML would take for a comment, an anchor, or a block of keys or items stay text.

    jsonargparse reads every string as YAML, from the command line and once more from files, where it was in quotes: a
    system text of `# Role: clerk` would become null, and `Answer: yes` a mapping. Lists and mappings are written with
    brackets and braces; a class is known by its `class_path`.
    """
    typehints: Any = _typehints  # not its front door, and there is none for this
    read = typehints.parse_value_or_config

    def read_but_text(value: Any, *args: Any, **kwargs: Any) -> Any:
        found, path = read(value, *args, **kwargs)
        text = value.val if isinstance(value, typehints.NestedArg) else value
        meant = found.val if isinstance(found, typehints.NestedArg) else found
        if path is not None or not isinstance(text, str):
            return found, path
        lost = meant is None and text.strip() not in NULLS
        is_block = isinstance(meant, (dict, list)) and not text.lstrip().startswith(("{", "["))
        names_class = isinstance(meant, dict) and "class_path" in meant
        return (value if lost or (is_block and not names_class) else found), path

    typehints.parse_value_or_config = read_but_text
    # Written without quotes, `1e-3` would come back as a number; YAML 1.1, by which it is written, asks for a dot.
    number = re.compile(r"[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$")
    yaml.SafeDumper.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))


def keep_whole_numbers_whole() -> None:
    """Have the Trainer's options that are `int | float` try int first, whatever was imported before.

    `limit_train_batches: 1` is one batch and `1.0` all of them. `typing` takes `Union[int, float]` and `Union[float,
    int]` for the same and hands out whichever any library made first, so that the number's type, and with it a cell's
    name, would depend on the order of imports. `int | float` is not shared.
    """
    annotations = inspect.unwrap(Trainer.__init__).__annotations__
    for name, kind in annotations.items():
        if {int, float} <= set(others := typing.get_args(kind)) and others.index(int) > others.index(float):
            rest = [other for other in others if other not in (int, float)]
            annotations[name] = functools.reduce(operator.or_, rest, int | float)
