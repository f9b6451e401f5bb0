"""Open a run from its folder: its module with the trained adapter, and the corpus that it was trained on."""

from pathlib import Path
from typing import Any, NamedTuple

import jsonargparse
from lightning.pytorch import LightningDataModule

from pml.corpus import Corpus
from pml.devices import best_device
from pml.errors import InputError, reason
from pml.lightning_cli import prepare
from pml.modules import Memorization
from pml.own_classes import own_classes_refused
from pml.plain import renamed
from pml.run_folder import CONFIG_NAME, use_corpus_of_run
from pml.yaml_file import read_yaml

__all__ = ["Run", "open_run"]


class Run(NamedTuple):
    """An opened run.

    Attributes:
        module: Module with the trained adapter, in evaluation mode, on the best available device.
        data: Data module with the corpus that the run was trained on.
    """

    module: Memorization
    data: Any

    @property
    def corpus(self) -> Corpus:
        """The corpus that was memorised."""
        return self.data.corpus


def open_run(folder: str | Path) -> Run:
    """Open a run: its module, with the saved adapter, and its corpus.

    Args:
        folder: A run folder, with `config.yaml` and `adapter/`.

    Raises:
        InputError: If the folder lacks either, its configuration does not parse or names foreign classes (see
            `pml.own_classes`), its corpus cannot be read or built, or the backbone is another than the record's.
    """
    folder = Path(folder)
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected the folder of a run that `pml fit` or `pml sweep` made")
    prepare()
    content = renamed(read_yaml(path))
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Memorization, "model", required=True)
    parser.add_subclass_arguments(LightningDataModule, "data", required=True)
    try:
        asked = {key: content[key] for key in ("model", "data")}
        with own_classes_refused(asked, path):
            made = parser.instantiate(parser.parse_object(asked))
    except InputError:
        raise
    except KeyError as error:
        raise InputError(f"{path}: not the configuration of a run: it has no {error}") from error
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not the configuration of a run: {reason(error)}") from error
    module: Memorization = made.model
    module.load_adapter(folder / "adapter")
    use_corpus_of_run(folder, made.data, module)
    return Run(module.eval().to(best_device()), made.data)
