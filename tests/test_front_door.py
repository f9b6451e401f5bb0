"""The names that `import pml` exports, and the examples in docstrings."""

import doctest
import importlib
import pkgutil
import subprocess
import sys

import pytest

import callbacks
import data_modules
import pml

MODULES = sorted(
    module.name
    for package in (pml, data_modules, callbacks)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if not module.name.endswith("__main__")
)


@pytest.mark.parametrize("name", ["pml", *MODULES])
def test_examples_in_docstrings_are_right(name: str) -> None:
    module = importlib.import_module(name)
    assert doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE, extraglobs=_globals()).failed == 0


def _globals() -> dict[str, object]:
    import torch

    return {"torch": torch}


def test_docstrings_have_at_least_five_examples() -> None:
    found = [test for name in ("pml", *MODULES) for test in doctest.DocTestFinder().find(importlib.import_module(name))]
    assert sum(len(test.examples) for test in found) >= 5


@pytest.mark.parametrize("name", pml.__all__)
def test_every_exported_name_is_callable_and_listed_by_dir(name: str) -> None:
    assert callable(getattr(pml, name))
    assert name in dir(pml)


def test_a_name_that_is_not_exported_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'pml' has no attribute 'trust'"):
        pml.trust  # noqa: B018


def test_importing_pml_loads_no_heavy_library() -> None:
    code = "import sys, pml; sys.exit(any(name in sys.modules for name in ('torch', 'lightning', 'lmfit', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
