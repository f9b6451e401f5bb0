"""The help of `pml fit|validate|test|predict`, read from source files because importing them takes seconds."""

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
    "fit": "[--config FILE ...] [--model METHOD] [--data CORPUS] [--KEY VALUE ...]",
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
"""Settings classes whose fields are options, with the files that define them."""

GENERAL = (
    ("config FILE", "YAML file with the keys below; what comes later overrides what came before, so give files first"),
    ("seed_everything SEED", "seed of the adapter and its dropout (default: 42); --data.seed is that of the corpus"),
    ("ckpt_path FILE", "checkpoint to resume from; last: the newest one of the run whose --config is given"),
    ("print_config", "print the resolved configuration and exit"),
    ("model.help CLASS, --data.help CLASS", "print all arguments of a class, your own included, and exit"),
)

LEFT = 34


@dataclass(frozen=True)
class Argument:
    """One argument of a class: its name, type and default as source text, and its description in the docstring."""

    name: str
    kind: str
    default: str
    help: str


def fit_help(command: str, width: int | None = None) -> str:
    """Help text of one of LightningCLI's subcommands.

    Args:
        command: `fit`, `validate`, `test` or `predict`.
        width: Columns; None takes the terminal's, at most 120.
    """
    page = _Page(width or min(shutil.get_terminal_size((120, 24)).columns, 120))
    from pml.cli import FIT_COMMANDS

    page.line(f"usage: pml {command} {USAGES[command]}")
    page.paragraph(f"{FIT_COMMANDS[command]}.")
    if command != "fit":
        page.paragraph(
            f"RUN is a run folder: it holds corpus and adapter and names the backbone. `pml {command} --config FILE` "
            "and --ckpt_path FILE take them from elsewhere; for other keys see `pml fit --help`."
        )
        return page.text
    page.paragraph("Configuration keys are also options: --trainer.max_epochs 50 sets `trainer: {max_epochs: 50}`.")
    for name, text in GENERAL:
        page.option(f"--{name}", text)
    page.heading("method: --model")
    for name in ("SFT", "MemFT"):
        page.item(name, _summary(_classes(PML / "modules.py")[name]))
    for argument in _arguments(PML / "memorization.py", "Memorization"):
        page.argument("model", argument)
    page.heading("MemFT only")
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
    page.heading("every corpus: --data")
    for argument in _arguments(_package_folder("data_modules") / "base.py", "MemorizationDataModule"):
        page.argument("data", argument)
    own = yaml.safe_load(DEFAULTS.read_text(encoding="utf-8"))["trainer"]
    default = {callback["class_path"].rpartition(".")[2] for callback in own["callbacks"]}
    page.heading(
        "callbacks: --trainer.callbacks+=CLASS adds one; --trainer.callbacks replaces the defaults (marked *); "
        "Checkpoints are there unless --trainer.enable_checkpointing false"
    )
    for _, name, node in _exported("callbacks"):
        page.item(f"{name} *" if name in default else name, _summary(node))
    page.heading("Lightning's Trainer: --trainer")
    for argument in _trainer_arguments(own):
        page.argument("trainer", argument)
    return page.text


class _Page:
    """Wrapped lines of help."""

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


def _package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations)))


def _classes(path: Path) -> dict[str, ast.ClassDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def _exported(package: str) -> Iterator[tuple[Path, str, ast.ClassDef]]:
    """Yield file, name and syntax tree of each class that a package exports, in the order of its imports."""
    folder = _package_folder(package)
    for node in ast.parse((folder / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            path = folder.parent.joinpath(*node.module.split(".")).with_suffix(".py")
            for name in node.names:
                yield path, name.name, _classes(path)[name.name]


def _summary(node: ast.ClassDef) -> str:
    return (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ")


def _arguments(path: Path, name: str) -> list[Argument]:
    """Arguments of a class, or fields of a dataclass, in source order."""
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
    # None in Python is null in a configuration.
    help_text = re.sub(r"\bNone\b", "null", helps.get(name, ""))
    return Argument(name, "" if kind is None else ast.unparse(kind), shown if _is_plain(shown) else "", help_text)


def _is_plain(default: str) -> bool:
    """Whether a default is a literal worth showing: not null, a call, an attribute or a constant's name."""
    return default != "null" and not re.search(r"field\(|[A-Za-z]\.|^[A-Z_]+$", default)


def _helps(doc: str) -> dict[str, str]:
    """Descriptions in the `Args` or `Attributes` of a Google style docstring, by name."""
    part = re.search(r"^(?:Args|Attributes):\n(.*?)(?=^\S|\Z)", doc, re.MULTILINE | re.DOTALL)
    if part is None:
        return {}
    found = re.findall(r"^    (\w+): (.*?)(?=^    [\w*]+: |\Z)", part[1] + "\n", re.MULTILINE | re.DOTALL)
    return {name: " ".join(text.split()) for name, text in found}


def _trainer_arguments(own: Mapping[str, Any]) -> list[Argument]:
    """Arguments of Lightning's Trainer with the first sentence of each description, and pml's defaults."""
    path = _package_folder("lightning") / "pytorch" / "trainer" / "trainer.py"
    init = next(
        node for node in _classes(path)["Trainer"].body if isinstance(node, ast.FunctionDef) and node.name == "__init__"
    )
    doc = ast.get_docstring(init) or ""
    sentences = {
        name: re.split(r"(?<=[.!])\s", " ".join(text.split()))[0].replace("``", "")
        for name, text in re.findall(r"^    (\w+): (.*?)(?=^    \w+: |^\S|\Z)", doc + "\n", re.MULTILINE | re.DOTALL)
    }
    sentences["precision"] = "32-true; others are refused. The dtype of the frozen weights is --model.dtype."
    arguments = []
    for argument, default in zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True):
        found = _argument(argument.arg, None, default, sentences)
        if found.name in own and not isinstance(own[found.name], (dict, list)):
            found = Argument(found.name, found.kind, yaml.safe_dump(own[found.name]).split("\n")[0], found.help)
        arguments.append(found)
    return arguments
