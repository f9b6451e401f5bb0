"""The help of `pml fit|validate|test|predict`, read from source files: importing what they describe takes seconds."""

import ast
import importlib.util
import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

__all__ = ["fit_help"]

PML = Path(__file__).parent
DEFAULTS = PML / "fit_defaults.yaml"

USAGES = {
    "fit": "--model METHOD --data CORPUS [--config FILE] [--KEY VALUE ...]",
    "validate": "RUN [--KEY VALUE ...]",
    "test": "RUN [--KEY VALUE ...]",
    "predict": "RUN [--KEY VALUE ...]",
}

SETTINGS = {
    "model.adapter": ("adapter.py", "AdapterConfig"),
    "model.frozen_prefix": ("state_store.py", "CacheConfig"),
    "model.cpu": ("cpu.py", "CpuConfig"),
    "model.curriculum": ("curriculum.py", "PrefixRatio"),
    "model.adapter.guard": ("guard.py", "GuardConfig"),
    "model.kl_penalty": ("kl_penalty.py", "KlPenaltyConfig"),
}
"""Settings objects, whose fields are options."""

GENERAL = (
    ("config FILE", "YAML with keys as below; later files override earlier ones, and options override both"),
    ("seed_everything SEED", "seed of all random numbers (default: 42)"),
    ("ckpt_path FILE", "checkpoint to resume from; last is the newest of the run whose --config is given"),
    ("print_config", "print the resolved configuration and exit"),
    ("model.help CLASS, --data.help CLASS", "print all arguments of a class, your own included, and exit"),
)

LEFT = 34


@dataclass(frozen=True)
class Argument:
    """One argument of a class: what it takes, its default as source, and what its docstring says."""

    name: str
    kind: str
    default: str
    help: str


def fit_help(command: str, width: int | None = None) -> str:
    """The help of one of LightningCLI's subcommands.

    Args:
        command: `fit`, `validate`, `test` or `predict`.
        width: Columns; None asks the terminal.
    """
    page = _Page(width or min(shutil.get_terminal_size((120, 24)).columns, 120))
    from pml.cli import FIT_COMMANDS

    page.line(f"usage: pml {command} {USAGES[command]}")
    page.paragraph(f"{FIT_COMMANDS[command]}.")
    if command != "fit":
        page.paragraph(
            f"RUN is a run's folder: backbone, corpus and adapter are taken from it. `pml {command} --config FILE` and "
            "--ckpt_path FILE take them from elsewhere; other keys are those of `pml fit --help`."
        )
        return page.text
    page.paragraph("Keys of the configuration are options: --trainer.max_epochs 50 is `trainer: {max_epochs: 50}`.")
    for name, text in GENERAL:
        page.option(f"--{name}", text)
    page.heading("method: --model")
    for name in ("SFT", "MemFT"):
        page.item(name, _summary(_classes(PML / "modules.py")[name]))
    for argument in _arguments(PML / "memorization.py", "Memorization"):
        page.argument("model", argument)
    page.heading("MemFT alone")
    for argument in _arguments(PML / "modules.py", "MemFT"):
        page.argument("model", argument)
    weightings = {"Weighting"}
    for name, node in _classes(PML / "weighting.py").items():
        if weightings & {base.id for base in node.bases if isinstance(base, ast.Name)}:
            weightings.add(name)
            page.item(name, _summary(node))
    for key, (file, name) in SETTINGS.items():
        page.heading(f"--{key}: {_summary(_classes(PML / file)[name])}")
        for argument in _arguments(PML / file, name):
            page.argument(key, argument)
    page.heading("corpus: --data")
    for path, name, node in _exported("data_modules"):
        if name != "MemorizationDataModule":
            page.item(name, _summary(node))
            for argument in _arguments(path, name):
                page.argument("data", argument)
    page.heading("every corpus")
    for argument in _arguments(_room("data_modules") / "base.py", "MemorizationDataModule"):
        page.argument("data", argument)
    own = yaml.safe_load(DEFAULTS.read_text(encoding="utf-8"))["trainer"]
    default = {callback["class_path"].rpartition(".")[2] for callback in own["callbacks"]}
    page.heading("callbacks: --trainer.callbacks+=CLASS adds one; --trainer.callbacks replaces the defaults, marked *")
    for _, name, node in _exported("callbacks"):
        page.item(f"{name} *" if name in default else name, _summary(node))
    page.heading("trainer: Lightning's")
    for argument in _trainer_arguments(own):
        page.argument("trainer", argument)
    return page.text


class _Page:
    """Lines of help, wrapped."""

    def __init__(self, width: int) -> None:
        self.width = width
        self._lines: list[str] = []

    @property
    def text(self) -> str:
        return "\n".join(self._lines)

    def line(self, text: str) -> None:
        self._lines.append(text)

    def paragraph(self, text: str) -> None:
        self._lines += ["", *textwrap.wrap(text, self.width)]

    def heading(self, text: str) -> None:
        self._lines += ["", *textwrap.wrap(text, self.width)]

    def item(self, name: str, text: str) -> None:
        self._columns(f"  {name}", text)

    def option(self, name: str, text: str) -> None:
        self._columns(f"  {name}", text)

    def argument(self, group: str, argument: Argument) -> None:
        default = f" (default: {argument.default})" if argument.default else ""
        self._columns(f"    --{group}.{argument.name}", f"{argument.help or argument.kind}{default}")

    def _columns(self, left: str, right: str) -> None:
        lines = textwrap.wrap(right, max(self.width - LEFT, 20)) or [""]
        if len(left) < LEFT - 1:
            self._lines.append(f"{left:<{LEFT}}{lines.pop(0)}".rstrip())
        else:
            self._lines.append(left)
        self._lines += [" " * LEFT + line for line in lines]


def _room(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations)))


def _classes(path: Path) -> dict[str, ast.ClassDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def _exported(package: str) -> Iterator[tuple[Path, str, ast.ClassDef]]:
    """Classes that a room exports, in the order of its imports."""
    folder = _room(package)
    for node in ast.parse((folder / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            path = folder.parent.joinpath(*node.module.split(".")).with_suffix(".py")
            for name in node.names:
                yield path, name.name, _classes(path)[name.name]


def _summary(node: ast.ClassDef) -> str:
    return (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ")


def _arguments(path: Path, name: str) -> list[Argument]:
    """Arguments of a class, or fields of a dataclass, in the order that they are written."""
    node = _classes(path)[name]
    helps = _helps(ast.get_docstring(node) or "")
    init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    if init is None:
        fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
        return [_argument(n.target.id, n.annotation, n.value, helps) for n in fields]  # type: ignore[union-attr]
    positional = init.args.args[1:]
    defaults = [None] * (len(positional) - len(init.args.defaults)) + list(init.args.defaults)
    pairs = [*zip(positional, defaults, strict=True), *zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True)]
    return [_argument(argument.arg, argument.annotation, default, helps) for argument, default in pairs]


def _argument(name: str, kind: ast.expr | None, default: ast.expr | None, helps: Mapping[str, str]) -> Argument:
    shown = "" if default is None else ast.unparse(default)
    shown = {"None": "null", "True": "true", "False": "false"}.get(shown, shown.strip("'"))
    # What is None in Python is null in a configuration.
    help_text = re.sub(r"\bNone\b", "null", helps.get(name, ""))
    return Argument(name, "" if kind is None else ast.unparse(kind), shown if _is_plain(shown) else "", help_text)


def _is_plain(default: str) -> bool:
    """Whether it is a value, rather than a call that makes one."""
    return default != "null" and not re.search(r"field\(|[A-Za-z]\.|^[A-Z_]+$", default)


def _helps(doc: str) -> dict[str, str]:
    """What the `Args` of a Google docstring say, by name."""
    part = re.search(r"^(?:Args|Attributes):\n(.*?)(?=^\S|\Z)", doc, re.MULTILINE | re.DOTALL)
    if part is None:
        return {}
    found = re.findall(r"^    (\w+): (.*?)(?=^    [\w*]+: |\Z)", part[1] + "\n", re.MULTILINE | re.DOTALL)
    return {name: " ".join(text.split()) for name, text in found}


def _trainer_arguments(own: Mapping[str, Any]) -> list[Argument]:
    """Arguments of Lightning's Trainer with the first sentence of each; defaults are ours where we have some."""
    path = _room("lightning") / "pytorch" / "trainer" / "trainer.py"
    init = next(
        node for node in _classes(path)["Trainer"].body if isinstance(node, ast.FunctionDef) and node.name == "__init__"
    )
    doc = ast.get_docstring(init) or ""
    sentences = {
        name: re.split(r"(?<=[.!])\s", " ".join(text.split()))[0].replace("``", "")
        for name, text in re.findall(r"^    (\w+): (.*?)(?=^    \w+: |^\S|\Z)", doc + "\n", re.MULTILINE | re.DOTALL)
    }
    sentences["precision"] = "32-true; others are refused, and the type of the frozen weights is --model.dtype."
    arguments = []
    for argument, default in zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True):
        found = _argument(argument.arg, None, default, sentences)
        if found.name in own and not isinstance(own[found.name], (dict, list)):
            found = Argument(found.name, found.kind, yaml.safe_dump(own[found.name]).split("\n")[0], found.help)
        arguments.append(found)
    return arguments
