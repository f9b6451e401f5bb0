"""A finished run opened again: its module with the trained adapter, and its corpus."""

from pathlib import Path

import jsonargparse
import yaml
from lightning.pytorch import LightningDataModule

from pml.corpus import Corpus
from pml.errors import InputError
from pml.lightning_cli import prepare, reason
from pml.modules import Memorization

__all__ = ["open_run"]


def open_run(folder: Path) -> tuple[Memorization, Corpus]:
    """The module of a run, with its adapter as it was saved, and the corpus that it was trained on.

    Args:
        folder: A run folder, with `config.yaml` and `adapter/`.

    Raises:
        InputError: If the folder lacks either, or its configuration no longer parses.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected the folder of a run that `pml fit` or `pml sweep` made")
    prepare()
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Memorization, "model", required=True)
    parser.add_subclass_arguments(LightningDataModule, "data", required=True)
    try:
        made = parser.instantiate_classes(parser.parse_object({key: content[key] for key in ("model", "data")}))
    except KeyError as error:
        raise InputError(f"{path}: not the configuration of a run: it has no {error}") from error
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not the configuration of a run: {reason(error)}") from error
    module: Memorization = made.model
    module.load_adapter(folder / "adapter")
    return module.eval(), made.data.build(module.tokenizer, module.vocab_size, module.max_positions)
