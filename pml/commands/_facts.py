"""A file of pairs as token ids, for commands that take one beside a backbone or an adapter."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jsonargparse

from pml.errors import InputError

if TYPE_CHECKING:
    from pml.corpus import Corpus
    from pml.encoding import TextEncoder

__all__ = [
    "FACT_FILES",
    "Facts",
    "add_adapter_arguments",
    "base_of",
    "check_adapter_arguments",
    "open_adapter",
    "read_facts",
]

FACT_FILES = (".jsonl", ".csv", ".parquet", ".yaml", ".yml")
"""What `data_modules.Facts` reads."""


class Facts(NamedTuple):
    """Pairs and how they became ids."""

    data: Any
    corpus: "Corpus"
    encoder: "TextEncoder"


def read_facts(path: Path, backbone: str) -> Facts:
    """Read pairs with a backbone's tokenizer; its weights are not loaded.

    Args:
        path: As `data_modules.Facts` reads it.
        backbone: Name of the backbone.

    Raises:
        InputError: If either will not do.
    """
    from pml.backbone import load_config, load_tokenizer
    from pml.lightning_cli import make_run
    from pml.positions import max_positions

    _, data = make_run([f"--model.backbone={backbone}", "--model=SFT", "--data=Facts", f"--data.path={path}"])
    tokenizer, config = load_tokenizer(backbone), load_config(backbone)
    corpus = data.build(tokenizer, int(config.vocab_size), max_positions(config))
    return Facts(data, corpus, data.encoder(tokenizer))


def base_of(adapter: Path) -> str:
    """The backbone that a saved adapter names as its base.

    Raises:
        InputError: If it names none.
    """
    from pml.default_backbone import DEFAULT_BACKBONE, DEFAULT_HUB_ID

    try:
        base = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{adapter}: no adapter_config.json that names a base; give --backbone") from error
    if base is None:
        raise InputError(f"{adapter}: its adapter_config.json names no base; give --backbone")
    return DEFAULT_BACKBONE if base == DEFAULT_HUB_ID else str(base)


def add_adapter_arguments(parser: jsonargparse.ArgumentParser) -> None:
    """Arguments by which a command takes an adapter that somebody else trained, in place of a run."""
    parser.add_argument("--adapter", type=Path | None, help="folder of any PEFT LoRA adapter, in place of RUN")
    parser.add_argument("--data", type=Path | None, help="file of pairs for --adapter, as data_modules.Facts reads it")
    parser.add_argument("--backbone", type=str | None, help="backbone of --adapter; its own base unless given")


def check_adapter_arguments(args: jsonargparse.Namespace) -> None:
    """Refuse a run and an adapter at once, neither, or an adapter without pairs.

    Raises:
        InputError: If the arguments are none of the two.
    """
    if (args.run is None) == (args.adapter is None):
        raise InputError("expected either the folder of a run, or --adapter with --data")
    if args.adapter is not None and args.data is None:
        raise InputError("--adapter needs --data, a file of pairs that it is to recall")
    if args.adapter is None and (given := [name for name in ("data", "backbone") if args[name] is not None]):
        raise InputError(f"--{given[0]} belongs to --adapter; a run has its own")


def open_adapter(args: jsonargparse.Namespace) -> tuple[Any, Any]:
    """A module with the adapter of --adapter on it, in evaluation mode on the device that is there, and the pairs.

    Raises:
        InputError: If either will not do.
    """
    from pml.devices import best_device
    from pml.modules import SFT

    backbone = args.backbone or base_of(args.adapter)
    data = read_facts(args.data, backbone).data
    module = SFT(backbone=backbone)
    module.load_adapter(args.adapter)
    return module.eval().to(best_device()), data
