"""Lower precision of matrix products applies to training steps only, not to cached states or reported values."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from callbacks import RunRecord
from pml.errors import InputError
from pml.products import float32_products, highest_products
from pml.recall import score_corpus
from tests.fits import module_on
from tests.tiny_runs import Ids, make_trainer, uneven


def cpu_products() -> str:
    mkldnn: Any = torch.backends.mkldnn
    return str(mkldnn.matmul.fp32_precision)


def gpu_products() -> str:
    """The precision set for GPUs; that for CPUs may differ, see `pml.cpu`."""
    matmul: Any = torch.backends.cuda.matmul
    return "lower" if matmul.fp32_precision == "tf32" else "highest"


@pytest.fixture(autouse=True)
def _as_pytorch_comes() -> Iterator[None]:
    mkldnn: Any = torch.backends.mkldnn
    before = cpu_products()
    highest_products()
    yield
    torch.set_float32_matmul_precision("highest")
    mkldnn.matmul.fp32_precision = before


@pytest.mark.parametrize("tuned", ["none", "bf16"])
def test_leaving_a_context_restores_the_precision_and_highest_means_the_outermost_settings(tuned: str) -> None:
    mkldnn: Any = torch.backends.mkldnn
    mkldnn.matmul.fp32_precision = tuned
    with float32_products("high"):
        assert (gpu_products(), cpu_products()) == ("lower", "tf32")
        with float32_products("highest"):
            assert (gpu_products(), cpu_products()) == ("highest", tuned)
            with float32_products("medium"):
                assert (gpu_products(), cpu_products()) == ("lower", "bf16")
        assert (gpu_products(), cpu_products()) == ("lower", "tf32")
    assert (gpu_products(), cpu_products()) == ("highest", tuned)
    with pytest.raises(ZeroDivisionError), float32_products("medium"):
        raise ZeroDivisionError
    assert (gpu_products(), cpu_products()) == ("highest", tuned)


def test_an_unknown_precision_is_refused(tiny_backbone_folder: Path) -> None:
    with pytest.raises(InputError, match="matmul_precision is 'low'; expected highest, high, medium"):
        module_on(tiny_backbone_folder, matmul_precision="low")


class Blocks(Callback):
    """Notes the precision set during each pass through the lowest and the highest block."""

    def __init__(self) -> None:
        self.seen: dict[str, set[str]] = {}

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        lowest, highest = pl_module.backbone.blocks[0], pl_module.backbone.blocks[3]
        lowest.register_forward_hook(lambda *_: self._note("kept"))
        highest.register_forward_hook(
            lambda *_: self._note("forward in a step" if torch.is_grad_enabled() else "forward elsewhere")
        )
        highest.register_full_backward_hook(lambda *_: self._note("backward"))

    def _note(self, name: str) -> None:
        self.seen.setdefault(name, set()).add(gpu_products())


def test_only_training_steps_use_the_lower_precision_and_the_record_states_it(
    tiny_backbone_folder: Path, tmp_path: Path
) -> None:
    # PyTorch Lightning advises users to set this; the run must ignore it, since its own setting differs.
    torch.set_float32_matmul_precision("high")
    module, blocks, record = module_on(tiny_backbone_folder, matmul_precision="medium"), Blocks(), RunRecord(tmp_path)
    module.configure_model()
    _ = module.frozen_layers  # Made before the hooks: its trial runs forward passes of its own.
    data = Ids(uneven(3), batch_size=2)
    make_trainer(tmp_path, max_epochs=2, limit_val_batches=1.0, callbacks=[blocks, record]).fit(module, datamodule=data)
    assert blocks.seen == {
        "kept": {"highest"},
        "forward in a step": {"lower"},
        "backward": {"lower"},
        "forward elsewhere": {"highest"},
    }
    score_corpus(module, data.val_dataloader())
    assert blocks.seen["forward elsewhere"] == {"highest"}
    assert record.record is not None
    assert record.record.method_settings["matmul_precision"] == "medium"


def test_states_first_cached_during_a_step_are_computed_in_the_highest_precision(
    tiny_backbone_folder: Path, tmp_path: Path
) -> None:
    # No measurement comes before the first step, so that step fills the cache.
    module, blocks = module_on(tiny_backbone_folder, matmul_precision="medium"), Blocks()
    module.configure_model()
    _ = module.frozen_layers
    make_trainer(tmp_path, callbacks=[blocks]).fit(module, datamodule=Ids(uneven(3), batch_size=3))
    assert blocks.seen == {"kept": {"highest"}, "forward in a step": {"lower"}, "backward": {"lower"}}


def test_the_default_precision_is_not_listed_in_the_settings(tiny_backbone_folder: Path) -> None:
    assert "matmul_precision" not in module_on(tiny_backbone_folder).settings()
