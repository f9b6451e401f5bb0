"""The docstrings of Python's standard library: text that is available wherever Python is."""

import ast
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from data_modules._documents import Document
from pml.errors import InputError

__all__ = ["documentation_strings"]

LEFT_OUT = {"antigravity", "idlelib", "lib2to3", "test", "tests", "this", "turtledemo"}
"""Modules and folders without useful text: jokes, demonstrations and tests."""


def documentation_strings() -> Iterator[Document]:
    """Yield one document per docstring; its title is the name of the object, such as "textwrap.TextWrapper.wrap".

    Modules come in alphabetical order, their objects in source order. Source files are parsed, never imported. The text
    depends only on the version of the running interpreter and on which library sources are installed with it.

    Raises:
        InputError: If this interpreter came without the source files of its library.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    empty = True
    for path in _source_files(folder):
        parts = path.relative_to(folder).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        for document in _documents(name, ast.parse(path.read_bytes())):
            yield document
            empty = False
    if empty:
        raise InputError(f"{folder} has no source files, so there is no default text; give some with path or dataset")


def _source_files(folder: Path) -> Iterator[Path]:
    public = (name for name in sys.stdlib_module_names if not name.startswith("_"))
    for name in sorted(set(public) - LEFT_OUT):
        if (folder / name).is_dir():
            below = sorted((folder / name).rglob("*.py"))
            yield from (path for path in below if not LEFT_OUT & set(path.relative_to(folder).parts))
        elif (path := folder / f"{name}.py").is_file():
            yield path


def _documents(
    name: str, node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
) -> Iterator[Document]:
    if text := ast.get_docstring(node):
        # A string may hold half of a surrogate pair, which UTF-8 cannot encode.
        yield Document(name, [text.encode(errors="replace").decode()])
    for child in node.body:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _documents(f"{name}.{child.name}", child)
