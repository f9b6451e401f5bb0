"""A file of pairs as token ids, for commands that take one beside a backbone or an adapter."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pml.errors import InputError

if TYPE_CHECKING:
    from pml.corpus import Corpus
    from pml.encoding import TextEncoder

__all__ = ["FACT_FILES", "Facts", "base_of", "read_facts"]

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

    _, data = make_run([f"--model.backbone={backbone}", "--model=SFT", "--data=Facts", f"--data.path={path}"])
    tokenizer, config = load_tokenizer(backbone), load_config(backbone)
    corpus = data.build(tokenizer, int(config.vocab_size), getattr(config, "max_position_embeddings", None))
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
    return DEFAULT_BACKBONE if base == DEFAULT_HUB_ID else str(base)
