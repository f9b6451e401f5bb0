"""Fixtures for callback tests: a tiny backbone that can become certain of tokens, and trainers that log curves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from tests.fits import save_sharpened
from tests.tiny_runs import make_trainer


@pytest.fixture(scope="session")
def sharp(tiny_backbone_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny backbone with a larger LM head, so that it can reach high probabilities."""
    return save_sharpened(tiny_backbone_folder, tmp_path_factory.mktemp("sharp"))


@pytest.fixture
def logged_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    """Makes trainers that validate every epoch and log every step into `tmp_path/run`."""

    def make(**arguments: Any) -> Trainer:
        logger = TensorBoardLogger(tmp_path, name="run", version="", default_hp_metric=False)
        defaults: dict[str, Any] = {"logger": logger, "limit_val_batches": 1.0, "log_every_n_steps": 1}
        return make_trainer(tmp_path, **{**defaults, **arguments})

    return make
