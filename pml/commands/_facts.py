"""Pairs from a file and adapters from anywhere, for commands that do not need a run."""

import json
import logging
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jsonargparse

from pml.errors import InputError

if TYPE_CHECKING:
    from pml.corpus import Corpus
    from pml.encoding import TextEncoder
    from pml.records import Record

__all__ = [
    "COLUMNS",
    "FACT_FILES",
    "Facts",
    "add_adapter_arguments",
    "add_column_arguments",
    "base_of",
    "check_adapter_arguments",
    "open_adapter",
    "read_facts",
    "record_of",
]

log = logging.getLogger(__name__)

FACT_FILES = (".jsonl", ".csv", ".parquet", ".yaml", ".yml")
"""Suffixes of the files that `data_modules.Facts` reads."""

COLUMNS = ("query_column", "target_column")


class Facts(NamedTuple):
    """A data module of pairs, its corpus, and the encoder that made the token ids."""

    data: Any
    corpus: "Corpus"
    encoder: "TextEncoder"


def add_column_arguments(parser: jsonargparse.ArgumentParser, what: str = "") -> None:
    """Add the arguments that name the columns of a file of pairs; `what` says where they apply."""
    parser.add_argument("--query_column", type=str | None, help=f"{what}column with the queries; default: query")
    parser.add_argument("--target_column", type=str | None, help=f"{what}column with the targets; default: target")


def read_facts(path: Path, backbone: str, args: jsonargparse.Namespace) -> Facts:
    """Read pairs and encode them with a backbone's tokenizer, without loading its weights.

    Args:
        path: A file that `data_modules.Facts` reads.
        backbone: `smollm2-135m`, a folder, or a hub id.
        args: Arguments of the command, with those of `add_column_arguments`.

    Raises:
        InputError: If the file or the backbone cannot be used.
    """
    from pml.backbone import load_config, load_tokenizer
    from pml.lightning_cli import make_run
    from pml.positions import max_positions

    columns = [f"--data.{name}={args[name]}" for name in COLUMNS if args[name] is not None]
    _, data = make_run([f"--model.backbone={backbone}", "--model=SFT", "--data=Facts", f"--data.path={path}", *columns])
    tokenizer, config = load_tokenizer(backbone), load_config(backbone)
    corpus = data.build(tokenizer, int(config.vocab_size), max_positions(config))
    return Facts(data, corpus, data.encoder(tokenizer))


def record_of(adapter: Path) -> "Record | None":
    """Record of the run that a saved adapter lies in; None if it lies elsewhere."""
    from pml.records import RECORD_NAME, read_record

    if adapter.resolve().name == "adapter":
        with suppress(InputError):  # no record, or a damaged one
            return read_record(adapter.resolve().parent / RECORD_NAME)
    return None


def base_of(adapter: Path) -> str:
    """Name of the backbone that a saved adapter was trained on: that of the run that it lies in, or of its own file.

    Raises:
        InputError: If it names no base, or pins a revision of it, since pml would load the default one.
    """
    from pml.default_backbone import DEFAULT_BACKBONE, DEFAULT_HUB_ID

    if not adapter.is_dir():
        raise InputError(f"{adapter}: no such folder; expected an adapter saved by PEFT")
    if (record := record_of(adapter)) is not None:
        return record.backbone
    try:
        config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        base, revision = config["base_model_name_or_path"], config.get("revision")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{adapter}: no adapter_config.json that names a base model; give --backbone") from error
    if base is None:
        raise InputError(f"{adapter}: its adapter_config.json names no base model; give --backbone")
    if revision and revision != "main" and not Path(str(base)).is_dir():
        raise InputError(
            f"{adapter}: its base model is revision {revision} of {base}; download that revision with "
            f"`hf download {base} --revision {revision} --local-dir FOLDER` and give --backbone FOLDER"
        )
    if base != DEFAULT_HUB_ID:
        return str(base)
    log.warning(
        "%s: taking its base to be %s, the 4-bit weights of %s from the package index; if it was trained on the hub's "
        "own weights, give --backbone %s",
        *(adapter, DEFAULT_BACKBONE, base, base),
    )
    return DEFAULT_BACKBONE


def add_adapter_arguments(parser: jsonargparse.ArgumentParser) -> None:
    """Add the arguments that name an adapter trained elsewhere, in place of a run."""
    parser.add_argument("--adapter", type=Path | None, help="folder of any PEFT LoRA adapter, instead of RUN")
    parser.add_argument("--data", type=Path | None, help="file of pairs for --adapter (.jsonl, .csv, .parquet, .yaml)")
    parser.add_argument(
        "--backbone", type=str | None, help="backbone of --adapter; default: the base model that the adapter names"
    )
    add_column_arguments(parser, "--data: ")


def check_adapter_arguments(args: jsonargparse.Namespace) -> None:
    """Require either a run, or an adapter with a file of pairs.

    Raises:
        InputError: If both are given, neither is, or an argument does not fit the choice.
    """
    if (args.run is None) == (args.adapter is None):
        raise InputError("expected either the folder of a run, or --adapter with --data")
    if args.adapter is not None and args.data is None:
        raise InputError("--adapter needs --data, a file of the pairs to recall")
    if args.adapter is None and (given := [name for name in ("data", "backbone", *COLUMNS) if args[name] is not None]):
        raise InputError(f"--{given[0]} is only for --adapter; a run has its own, so leave it out")


def open_adapter(args: jsonargparse.Namespace) -> tuple[Any, Any]:
    """Module with the adapter of `--adapter`, in evaluation mode on the best device, and the data module of `--data`.

    Raises:
        InputError: If the adapter, its backbone or the pairs cannot be used.
    """
    from pml.devices import best_device
    from pml.modules import SFT

    backbone, record = args.backbone or base_of(args.adapter), record_of(args.adapter)
    data = read_facts(args.data, backbone, args).data
    module = SFT(backbone=backbone, dtype=record.dtype if record is not None else "float32")
    module.load_adapter(args.adapter)
    return module.eval().to(best_device()), data
