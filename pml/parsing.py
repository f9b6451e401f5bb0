"""Corrections to how jsonargparse parses values: text stays text, and integers stay integers."""

import functools
import inspect
import operator
import re
import typing
from typing import Any

import yaml
from jsonargparse import _typehints
from lightning.pytorch import Trainer

__all__ = ["keep_whole_numbers_whole", "patch_text_parsing"]

NULLS = ("", "~", "null", "Null", "NULL")
"""Texts that are meant as null in YAML."""


@functools.cache
def patch_text_parsing() -> None:
    """Keep text that YAML would read as a comment, an anchor, or a block of keys or items.

    jsonargparse parses every string as YAML, even one that was quoted in a file: a system text of `# Role: clerk` would
    become null, and `Answer: yes` a mapping. After this call only text with brackets or braces becomes a list or a
    mapping; a block that has a `class_path` is still read as a class.
    """
    typehints: Any = _typehints  # private, but there is no public hook for this
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
    # In YAML 1.1 a float needs a dot, so PyYAML writes the text `1e-3` unquoted, and jsonargparse reads a number.
    number = re.compile(r"[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$")
    yaml.SafeDumper.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))


def keep_whole_numbers_whole() -> None:
    """Make the Trainer's `int | float` options try int first, whatever was imported before.

    `limit_train_batches: 1` is one batch and `1.0` is all of them. `typing` caches `Union[int, float]` and
    `Union[float, int]` as equal and returns whichever was made first, so the number's type, and with it a cell's name,
    would depend on the order of imports. `int | float` is not cached.
    """
    annotations = inspect.unwrap(Trainer.__init__).__annotations__
    for name, kind in annotations.items():
        if {int, float} <= set(others := typing.get_args(kind)) and others.index(int) > others.index(float):
            rest = [other for other in others if other not in (int, float)]
            annotations[name] = functools.reduce(operator.or_, rest, int | float)
