"""Strict YAML of text in lists and mappings: no guessed types, repeated keys, merge keys or built objects."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from data_modules._wording import one_line, quoted
from pml.errors import InputError

__all__ = ["PlainScalar", "yaml_entries"]

MAX_NESTING = 64
"""Most lists and mappings inside each other; rows have a handful, and Python's stack is limited."""

TAGS = "tag:yaml.org,2002:"
UNQUOTED = ("int", "float", "bool", "timestamp", "binary", "value", "merge")


@dataclass(frozen=True)
class PlainScalar:
    """A scalar that YAML reads as a number, a date or the like, kept as it is written.

    Converting it could fail (`2026-13-45`) or lose how it is written (`007`).

    Attributes:
        text: The scalar as written.
    """

    text: str

    def __str__(self) -> str:
        return self.text


def yaml_entries(text: str, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the entries of a YAML document that is a list, each after the place where it starts.

    Strings become `str`, null becomes None, and other scalars become `PlainScalar`.

    Args:
        text: The whole document.
        name: Name of the file, for messages.

    Raises:
        InputError: With file and line: if the document is malformed, is not one list or is nested too deeply, or if it
            has a repeated key, a merge key, a list or mapping inside itself, or a tag that builds an object.
    """
    root = _root(text, name)
    if root is None:
        return
    if not isinstance(root, yaml.SequenceNode) or root.tag != f"{TAGS}seq":
        raise InputError(f"{_place(root.start_mark)}: a YAML {root.tag.removeprefix(TAGS)}; expected a list of entries")
    known: dict[int, Any] = {}
    for node in root.value:
        place = _place(node.start_mark)
        # In brackets, several entries may share a line.
        yield f"{place}:{node.start_mark.column + 1}" if root.flow_style else place, _value(node, known)


def _root(text: str, name: str) -> yaml.Node | None:
    loader = None
    try:
        loader = _Loader(text)
        loader.name = name  # all marks copy it
        return loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        place = _place(error.problem_mark) if error.problem_mark else name
        raise InputError(f"{place}: malformed YAML ({reason}); expected a list of entries") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise InputError(
            f"{name}:{line}: YAML has no character {error.character:#x}; write it as an escape, in double quotes"
        ) from error
    except InputError:
        raise
    except (ValueError, OverflowError) as error:
        # PyYAML does not check that an escape such as "\U00110000" is a character.
        line = loader.line + 1 if loader else 1
        raise InputError(f"{name}:{line}: malformed YAML ({one_line(error)}); expected a list of entries") from error


class _Loader(yaml.SafeLoader):
    """Refuses lists and mappings that contain themselves or are nested too deeply, before reading any further."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            anchored = self.anchors.get(event.anchor)
            if anchored is not None and anchored.end_mark is None:
                raise InputError(
                    f"{_place(event.start_mark)}: a list or mapping inside itself, *{event.anchor}; write it out"
                )
        self.depth += 1
        if self.depth > MAX_NESTING and isinstance(event, yaml.CollectionStartEvent):
            raise InputError(
                f"{_place(event.start_mark)}: more than {MAX_NESTING} lists and mappings inside each other; "
                "expected text in columns"
            )
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _value(node: yaml.Node, known: dict[int, Any]) -> Any:
    """The Python value of a node.

    Args:
        node: A node of the document.
        known: Lists and mappings by the id of their nodes. Aliases share them, so that memory grows with the document
            as written, not as expanded.
    """
    if id(node) in known:
        return known[id(node)]
    tag = node.tag.removeprefix(TAGS)
    if isinstance(node, yaml.ScalarNode):
        if tag == "str":
            return node.value
        if tag == "null":
            return None
        if tag in UNQUOTED:
            return PlainScalar(node.value)
    elif isinstance(node, yaml.SequenceNode) and tag == "seq":
        return known.setdefault(id(node), [_value(entry, known) for entry in node.value])
    elif isinstance(node, yaml.MappingNode) and tag == "map":
        return known.setdefault(id(node), _mapping(node, known))
    written = quoted(node.tag.replace(TAGS, "!!"))
    raise InputError(f"{_place(node.start_mark)}: the tag {written} is not read; expected text, lists and mappings")


def _mapping(node: yaml.MappingNode, known: dict[int, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in node.value:
        where = _place(key.start_mark)
        if not isinstance(key, yaml.ScalarNode):
            raise InputError(f"{where}: a list or mapping as a key; expected a name")
        if key.tag == f"{TAGS}merge":
            raise InputError(f"{where}: a merge key (<<); write the keys out")
        if key.value in values:
            raise InputError(f"{where}: the key {quoted(key.value)} occurs twice in one mapping; keep one of them")
        values[key.value] = _value(value, known)
    return values


def _place(mark: Any) -> str:
    return f"{mark.name}:{mark.line + 1}"
