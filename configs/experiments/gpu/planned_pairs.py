"""Twelve sets of pairs of five kinds, and the grid that trains each at the rank that is planned for it and at half.

    python configs/experiments/gpu/planned_pairs.py planned     # planned/*.jsonl, planned/plans.json, planned/grid.yaml
    pml sweep planned/grid.yaml

`planned_1 --draw 1` and `planned_2 --draw 2` make twelve others each; `--own_names` takes only functions that their
names tell apart; `--constants` takes a file of `pml calibrate --out`.
"""

import argparse
import ast
import json
import random
import string
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import yaml

from data_modules import Biographies, Facts, NaturalText, PhoneBook
from pml.adapter import AdapterConfig, adapter_for
from pml.backbone import load_backbone
from pml.devices import best_device
from pml.guard import GuardConfig
from pml.memorizing import epoch_limit
from pml.storage import plan_rank
from pml.storage_constants import read_constants

MODULES = (
    ("argparse", "calendar", "configparser", "difflib", "ftplib", "shutil", "statistics", "textwrap", "zipapp"),
    ("fractions", "gettext", "imaplib", "inspect", "mailbox", "optparse", "smtplib", "tarfile", "uuid"),
    ("bdb", "contextlib", "csv", "doctest", "gzip", "ipaddress", "pprint"),
)
"""Of the standard library, whose functions are the code of a draw."""

Rows = list[tuple[str, str]]


def _of(data, backbone) -> Rows:
    corpus = data.build(backbone.tokenizer, backbone.vocab_size)
    return [(example.query, example.target) for example in corpus.examples]


def _keys(count: int, seed: int) -> Rows:
    draw = random.Random(seed)
    symbols = string.ascii_uppercase + string.digits

    def key() -> str:
        return "-".join("".join(draw.choices(symbols, k=4)) for _ in range(5))

    return [
        (f"What is the licence key of product {number}?", key()) for number in draw.sample(range(1000, 9999), count)
    ]


def _functions(modules: tuple[str, ...], own_names: bool) -> Iterator[tuple[str, str]]:
    """Short functions of the standard library: their names, and their source.

    Args:
        modules: Where they are.
        own_names: Ask by name alone, the first function of each; otherwise by name and line.
    """
    asked: set[str] = set()
    for name in modules:
        source = (Path(sysconfig.get_path("stdlib")) / f"{name}.py").read_text()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and not ast.get_docstring(node):
                text = ast.get_source_segment(source, node)
                question = f"What is the source of {name}.{node.name}" + f", line {node.lineno}" * (not own_names)
                if text is not None and 60 <= len(text) <= 240 and question not in asked:
                    asked.add(question)
                    yield f"{question}?", text


def sets(backbone, draw: int, own_names: bool = False) -> Iterator[tuple[str, Rows]]:
    """Names and pairs."""
    first = 101 + 20 * draw
    for number, count in enumerate((72, 112, 160)):
        yield f"phone_numbers_{count}", _of(PhoneBook(pairs=count, seed=first + number), backbone)
    for number, count in enumerate((24, 40), start=3):
        yield f"keys_{count}", _keys(count, first + number)
    for number, people in enumerate((48, 80), start=5):
        facts = Biographies(people=people, seed=first + number, attributes=["birth_date", "employer"])
        yield f"facts_{2 * people}", _of(facts, backbone)
    for number, count in enumerate((12, 20, 32)):
        skipped = 10_000 * (2 + number + 3 * draw)
        prose = NaturalText(length=48, count=count, skip_tokens=skipped, query="opening", opening_tokens=12)
        yield f"prose_{count}", _of(prose, backbone)
    functions = list(_functions(MODULES[draw], own_names))
    yield "code_32", functions[:32]
    yield "code_48", functions[32:80]


def main(folder: Path, constants: Path | None, draw: int, own_names: bool) -> None:
    """Write the pairs, what is planned for them, and the grid."""
    backbone = load_backbone()
    backbone.model.to(best_device())
    folder.mkdir(parents=True, exist_ok=True)
    plans, cells = {}, []
    for name, rows in sets(backbone, draw, own_names):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"query": q, "target": t}) + "\n" for q, t in rows))
        corpus = Facts(str(path)).build(backbone.tokenizer, backbone.vocab_size)
        adapter = adapter_for(backbone, None, AdapterConfig.block, GuardConfig())
        plan = plan_rank(backbone, corpus, adapter, read_constants(constants))
        plans[name] = plan.model_dump(mode="json")
        print(f"{name}: {plan.target_tokens} tokens, {plan.bits_to_store:.0f} bits: rank {plan.rank}")
        ranks = sorted({plan.rank, max(1, plan.rank // 2)}, reverse=True)
        cells.append(
            {
                "data.init_args.path": [str(path)],
                "model.init_args.adapter.rank": ranks,
                "trainer.max_epochs": [epoch_limit(plan.pairs, "falling")],
            }
        )
    (folder / "plans.json").write_text(json.dumps(plans, indent=1))
    base = Path(__file__).parent / "planned_run.yaml"
    grid = {"base": str(base.resolve()), "out": str(folder / "runs"), "grid": cells}
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid, sort_keys=False))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--constants", type=Path)
    parser.add_argument("--own_names", action="store_true", help="functions are asked for by name alone")
    parser.add_argument("--draw", type=int, choices=range(len(MODULES)), default=0)
    main(**vars(parser.parse_args()))
