"""Commands use the available accelerator, and all their tensors are on the device of the model."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import pml.certificate
from pml.backbone import Backbone, load_backbone, shared_backbones
from pml.certificate import _margins_one_by_one
from pml.cli import main
from pml.corpus import Example
from pml.decoding import CachedRows, generate_greedily
from pml.devices import best_device
from pml.runs import open_run
from tests.fits import module_on


@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu"])
def test_the_best_device_is_the_accelerator_that_torch_finds(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    there = torch.device(kind)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: there)
    assert best_device() == there


def test_the_best_device_is_the_cpu_if_no_accelerator_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    def current(check_available: bool) -> torch.device | None:
        # As PyTorch built for CUDA does on a machine without a driver.
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", current)
    assert best_device() == torch.device("cpu")


def test_opening_a_run_moves_its_whole_model_to_the_best_device(
    tiny_backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["fit", "--model=SFT", f"--model.backbone={tiny_backbone_folder}", "--model.adapter.block=2"]
    arguments += ["--data=PhoneBook", "--data.pairs=2", "--trainer.max_epochs=1", "--trainer.accelerator=cpu"]
    assert main([*arguments, "--trainer.enable_progress_bar=false"]) == 0
    # Tensors on `meta` have shapes but no values, and operations that mix them with CPU tensors raise.
    monkeypatch.setattr("pml.runs.best_device", lambda: torch.device("meta"))
    module, _ = open_run(Path("runs/fit/version_0"))
    assert module.device.type == module.model.device.type == "meta"
    assert {tensor.device.type for tensor in module.model.state_dict().values()} == {"meta"}


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_decoding_and_certificates_keep_all_tensors_on_the_device_of_the_model(
    architecture: str, make_tiny_backbone: Callable[[str], Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_tiny_backbone(architecture).model.to("meta")
    prompts = torch.tensor([[5, 6, 7], [8, 9, 10]], device=model.device)
    assert generate_greedily(model, prompts, 12).device.type == "meta"
    monkeypatch.setitem(pml.decoding.LOGITS_BYTES, "cpu", 4 * 259)
    monkeypatch.setattr(pml.decoding, "LOGITS_BYTES_ELSEWHERE", 4 * 259 * 5)
    examples = [Example(0, (5, 6, 7), tuple(range(40, 52))), Example(1, (8, 9, 10), (11, 12))]
    pieces = list(pml.certificate._forced(model, examples[0]))
    assert [tuple(piece.shape) for piece in pieces] == [(5, 259), (5, 259), (2, 259)]
    assert {piece.device.type for piece in pieces} == {"meta"}
    margins = _margins_one_by_one(model, examples)
    assert [(len(m), m.device.type) for m in margins] == [(12, "meta"), (2, "meta")]
    reader = CachedRows(model)
    reader.read(prompts)
    reader.keep(torch.tensor([1], device=model.device))
    assert reader.read(prompts[1:]).shape == (1, 1, 259)


def test_a_backbone_shared_by_sweep_cells_stays_on_its_device_between_them(tiny_backbone_folder: Path) -> None:
    with shared_backbones():
        module = module_on(tiny_backbone_folder)
        module.configure_model()
        module.to("meta")
        # Lightning's strategies do this at the end of a fit.
        module.cpu()
        assert module.device.type == module.model.device.type == "meta"
        module.release()
        assert load_backbone(str(tiny_backbone_folder)).model.device.type == "meta"


def test_a_module_that_shares_no_backbone_moves_to_the_cpu_after_a_fit(tiny_backbone_folder: Path) -> None:
    module = module_on(tiny_backbone_folder)
    module.configure_model()
    module.to("meta")
    # There is nothing on that device to move, which shows that it is tried.
    with pytest.raises(NotImplementedError, match="meta"):
        module.cpu()
