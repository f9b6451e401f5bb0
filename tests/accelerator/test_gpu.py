"""A GPU computes what a CPU computes; skipped without a CUDA device."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from callbacks import StopWhenRecalled
from pml.adapter import AdapterConfig, adapter_state
from pml.certificate import allow_for_rounding, certify, greedy_answers, measure_rounding
from pml.cli import main
from pml.cuda_graphs import CapturedPasses
from pml.evaluating import evaluating
from pml.kl_penalty import KlPenaltyConfig
from pml.modules import SFT, MemFT, Memorization
from pml.records import read_record
from pml.state_store import CacheConfig
from pml.weighting import ExpectedRecall, OnlyThreshold, SlidingWindow
from tests.fits import save_sharpened
from tests.tiny_runs import Ids, make_trainer, uneven

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

METHODS: dict[str, Callable[..., Memorization]] = {
    "SFT": SFT,
    "OnlyThreshold": lambda **k: MemFT(weighting=OnlyThreshold(position_decay=2.0), **k),
    "WholeTargets": MemFT,
    "ExpectedRecall": lambda **k: MemFT(weighting=ExpectedRecall(), **k),
    "SlidingWindow": lambda **k: MemFT(weighting=SlidingWindow(), **k),
}
PLACEMENTS = {
    "mlp_block": AdapterConfig(rank=4, block=2),
    "all linear layers": AdapterConfig(rank=2, block=1, placement=["q_proj", "o_proj", "gate_proj", "down_proj"]),
}


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[CapturedPasses]:
    """Every `CapturedPasses` made during the test."""
    made: list[CapturedPasses] = []
    monkeypatch.setattr(CapturedPasses, "__init__", _noting(CapturedPasses.__init__, made))
    return made


def _noting(make: Any, made: list[CapturedPasses]) -> Any:
    def __init__(self: CapturedPasses, *arguments: Any) -> None:
        make(self, *arguments)
        made.append(self)

    return __init__


def fit(folder: Path, to: Path, accelerator: str, method: str = "SFT", trainer: Any = None, **settings: Any) -> Any:
    make = METHODS[method]
    module = make(
        backbone=str(folder), **{"adapter": PLACEMENTS["mlp_block"], "seed": 1, "learning_rate": 0.02, **settings}
    )
    data = Ids(uneven(6), batch_size=3)
    made = make_trainer(to, accelerator=accelerator, **{"max_epochs": 8, **(trainer or {})})
    made.fit(module, datamodule=data)
    return module


def weights(module: Memorization) -> dict[str, torch.Tensor]:
    return {name: values.detach().cpu().double() for name, values in adapter_state(module.model).items()}


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("method", METHODS)
def test_a_fit_on_a_gpu_ends_with_the_weights_of_a_fit_on_a_cpu(
    method: str, placement: str, tiny_backbone_folder: Path, tmp_path: Path, captured: list[CapturedPasses]
) -> None:
    adapter = PLACEMENTS[placement]
    ours = weights(fit(tiny_backbone_folder, tmp_path, "gpu", method, adapter=adapter))
    assert captured
    theirs = weights(fit(tiny_backbone_folder, tmp_path, "cpu", method, adapter=adapter))
    # Each of 16 AdamW steps normalises its own gradients, so float32 rounding errors grow.
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(
    ("trainer", "settings"),
    [
        ({}, {}),
        ({"accumulate_grad_batches": 2}, {}),
        ({"gradient_clip_val": 0.1}, {}),
        ({}, {"kl_penalty": KlPenaltyConfig(tokens=4)}),
        ({}, {"frozen_prefix": {"release": True}}),
        ({}, {"frozen_prefix": {"place": "host"}}),
    ],
    ids=["plain", "accumulated", "clipped", "penalised", "released", "kept on the host"],
)
def test_replayed_steps_end_with_the_weights_of_plain_steps(
    trainer: dict[str, Any],
    settings: dict[str, Any],
    placement: str,
    tiny_backbone_folder: Path,
    tmp_path: Path,
    captured: list[CapturedPasses],
) -> None:
    settings = {**settings, "adapter": PLACEMENTS[placement]}
    plain = weights(fit(tiny_backbone_folder, tmp_path, "gpu", trainer=trainer, cuda_graphs=False, **settings))
    assert not captured
    replayed = weights(fit(tiny_backbone_folder, tmp_path, "gpu", trainer=trainer, **settings))
    assert captured
    torch.testing.assert_close(replayed, plain, rtol=1e-3, atol=1e-4)


def test_steps_with_dropout_are_not_captured(
    tiny_backbone_folder: Path, tmp_path: Path, captured: list[CapturedPasses]
) -> None:
    fit(tiny_backbone_folder, tmp_path, "gpu", adapter=AdapterConfig(rank=2, block=1, dropout=0.5))
    assert not captured


def test_random_numbers_can_be_drawn_after_a_failed_capture() -> None:
    def looks(states: torch.Tensor, parameters: Any) -> torch.Tensor:
        return states * float(states.sum())

    with pytest.raises(RuntimeError, match="captur"):
        CapturedPasses(looks, torch.ones(1, 2, 3, device="cuda", requires_grad=True), {})
    assert torch.rand(3, device="cuda").shape == (3,)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_greedy_decoding_returns_every_certified_target(dtype: str, tiny_backbone_folder: Path, tmp_path: Path) -> None:
    folder = save_sharpened(tiny_backbone_folder, tmp_path / "sharp")
    trainer = {"max_epochs": 300, "callbacks": [StopWhenRecalled(margin=0.8)]}
    adapter = AdapterConfig(rank=16, block=2)
    module = fit(folder, tmp_path, "gpu", trainer=trainer, dtype=dtype, schedule="constant", adapter=adapter)
    assert module.trainer.should_stop
    module.to("cuda")
    examples = module.trainer.datamodule.corpus.examples
    with evaluating(module.model):
        certificates = certify(module.model, examples)
        rounding = measure_rounding(module.model, examples, [known.margins for known in certificates])
        sure = [c for c in allow_for_rounding(certificates, rounding.logits) if c.verdict == "certain"]
        assert len(sure) == len(examples)
        for batch_size in (1, 3):
            answers = greedy_answers(module.model, examples, batch_size=batch_size)
            assert answers == [example.target_ids for example in examples]


def test_the_commands_of_a_run_work_on_a_machine_with_a_gpu(
    tiny_backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["fit", "--model=MemFT", f"--model.backbone={tiny_backbone_folder}", "--model.adapter.block=2"]
    arguments += ["--data=PhoneBook", "--data.pairs=2", "--trainer.max_epochs=4"]
    assert main([*arguments, "--trainer.enable_progress_bar=false"]) == 0
    record = read_record(Path("runs/fit/version_0/record.json"))
    assert (record.status, record.optimizer_steps) == ("finished", 4)
    for command in ("recall", "validate", "predict"):
        assert main([command, "runs/fit/version_0"]) == 0
    # Two random pairs are not certain after four steps.
    assert main(["certify", "runs/fit/version_0"]) == 1
    assert pq.read_table("runs/fit/version_0/predictions.parquet").num_rows == record.target_tokens


def test_a_fit_that_releases_frozen_blocks_holds_fewer_than_two_of_them_on_the_gpu(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    config = LlamaConfig(vocab_size=len(tiny_tokenizer), hidden_size=512, intermediate_size=2048, num_hidden_layers=16)
    model = LlamaForCausalLM(config)
    block = sum(p.numel() * p.element_size() for p in model.model.layers[0].parameters())
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    peaks = {}
    for release in (False, True):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        adapter = AdapterConfig(rank=2, block=14)
        fit(tmp_path / "model", tmp_path, "gpu", adapter=adapter, frozen_prefix=CacheConfig(release=release))
        peaks[release] = torch.cuda.max_memory_allocated() - before
    # 14 blocks lie below the adapter; released, they are on the device one at a time.
    assert peaks[True] < peaks[False] - 12 * block
