"""Strict reading of YAML files: one mapping, no key twice, finite numbers."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from pml.errors import InputError

__all__ = ["read_yaml"]

DEEPEST = 100
"""Maximum nesting depth; deeper files could exceed Python's recursion limit later."""


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file; empty if the file is empty.

    Raises:
        InputError: If the file cannot be read, is not UTF-8 text, not YAML or not a mapping, has a key twice or a
            number that is not finite. The message names the line if there is one.
    """
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"{str(path)[:200]}: cannot be read ({said})") from error
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: not UTF-8 text; expected YAML, saved as UTF-8") from error
    if bad := yaml.reader.Reader.NON_PRINTABLE.search(text):
        line = text.count("\n", 0, bad.start()) + 1
        raise InputError(f"{path}:{line}: has the character U+{ord(bad[0]):04X}, which YAML does not allow")
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return {}
        for problem in _problems(node):
            raise InputError(f"{path}:{problem}")
        value = loader.construct_document(node)
    except yaml.YAMLError as error:
        raise InputError(f"{_where(path, error)}: not YAML: {_problem_in(error)}") from error
    except InputError:
        raise
    except (ValueError, RecursionError, TypeError) as error:
        raise InputError(f"{path}: cannot be read as YAML: {error}") from error
    finally:
        loader.dispose()
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected keys with values, such as `trainer: {{max_epochs: 5}}`, not a list or text")
    return value


def _problems(root: yaml.Node) -> Iterator[str]:
    """Problems in the nodes of a document, each with its line, from top to bottom; a key's own come before others."""
    todo: list[tuple[yaml.Node, int]] = [(root, 0)]
    seen: set[int] = set()
    while todo:
        node, depth = todo.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        line = node.start_mark.line + 1
        if depth > DEEPEST:
            yield f"{line}: more than {DEEPEST} levels of nesting"
        if isinstance(node, yaml.MappingNode):
            first: dict[str, yaml.Node] = {}
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and (before := first.setdefault(key.value, key)) is not key:
                    lines = f"{before.start_mark.line + 1} and {key.start_mark.line + 1}"
                    yield f"{key.start_mark.line + 1}: the key {key.value!r} appears twice, on lines {lines}; keep one"
            todo += [(value, depth + 1) for _, value in reversed(node.value)]
        elif isinstance(node, yaml.SequenceNode):
            todo += [(item, depth + 1) for item in reversed(node.value)]
        elif isinstance(node, yaml.ScalarNode) and _is_not_finite(node):
            yield f"{line}: {node.value} is not a finite number; expected one"


def _is_not_finite(node: yaml.ScalarNode) -> bool:
    if node.tag == "tag:yaml.org,2002:float":
        value = node.value.replace("_", "").lower()
        if value.lstrip("+-") in (".inf", ".nan"):
            return True
        try:
            return not math.isfinite(float(value))
        except ValueError:
            return False
    return False


def _where(path: Path, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f"{path}:{mark.line + 1}" if mark is not None else str(path)


def _problem_in(error: yaml.YAMLError) -> str:
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    context = getattr(error, "context", None)
    return " ".join(f"{problem} {context or ''}".split())
