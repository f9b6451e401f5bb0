"""`pml calibrate`: bits per parameter against values worked out by hand, and the file that `pml plan` reads."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from pml import calibration
from pml.adapter import AdapterConfig
from pml.cli import main
from pml.errors import InputError
from pml.kl_penalty import KlPenaltyConfig
from pml.modules import SFT
from pml.storage_constants import CONSTANTS_VERSION, Constant, ConstantsFile, read_constants, read_constants_file


def test_the_constant_is_the_mean_over_texts_with_a_student_t_interval(
    tiny_backbone_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    penalty = KlPenaltyConfig(weight=2)

    def stored(module: SFT, tokens: int, steps: int) -> float:
        assert module.kl_penalty == penalty
        asked.append((tokens, module.seed))
        return 64 * (0.4, 0.5, 0.6)[module.seed]  # 2 d parameters at rank 1

    monkeypatch.setattr(calibration, "_stored_bits", stored)
    told: list[tuple[int, float]] = []
    constant = calibration.calibrate(
        str(tiny_backbone_folder),
        "mlp_block",
        1,
        kl_penalty=penalty,
        on_text=lambda number, bits: told.append((number, bits)),
    )
    assert [number for number, _ in told] == [1, 2, 3]
    assert [bits for _, bits in told] == pytest.approx([0.4, 0.5, 0.6])
    assert constant.bits_per_parameter == pytest.approx(0.5)
    # The 97.5 % quantile of Student's t with 2 degrees of freedom is 4.3027; the standard error is 0.1 / sqrt(3).
    assert constant.high == pytest.approx(0.5 + 4.3027 * 0.1 / math.sqrt(3), rel=1e-4)
    assert constant.low == pytest.approx(0.5 - 4.3027 * 0.1 / math.sqrt(3), rel=1e-4)
    # 1.6 bits per parameter; the vocabulary has 259 tokens.
    assert asked == [(math.ceil(1.6 * 64 / math.log2(259)), seed) for seed in range(3)]
    assert "block 1, 3 sets of random pairs at rank 1, 300 steps at 0.03, KL penalty 2" in constant.source


def test_stored_bits_are_the_entropy_minus_the_loss_in_bits(
    tiny_backbone_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    class Untrained:
        def fit(self, module: SFT, datamodule: Any) -> None:
            module.configure_model()
            datamodule.build(module.tokenizer, module.vocab_size)
            asked["targets"] = [len(example.target_ids) for example in datamodule.corpus.examples]
            asked["batch_size"] = datamodule.batch_size

    monkeypatch.setattr(calibration, "bare_trainer", lambda **settings: asked.update(settings) or Untrained())
    monkeypatch.setattr(calibration, "score_corpus", lambda *_: None)
    monkeypatch.setattr(calibration.metrics, "mean_loss", lambda _: torch.tensor(2.0))
    module = SFT(backbone=str(tiny_backbone_folder), adapter=AdapterConfig(rank=1, block=1), seed=3)
    stored = calibration._stored_bits(module, 70, steps=77)
    module.release()
    # Three targets of 24 tokens hold at least 70; the tokenizer has 256 ordinary tokens, 8 bits each, and 2 nats are
    # 2.885 bits.
    assert asked == {"max_steps": 77, "max_epochs": -1, "targets": [24] * 3, "batch_size": 4}
    assert stored == pytest.approx(72 * (8 - 2 / math.log(2)))


def test_a_text_that_stores_nothing_ends_the_calibration_with_advice(
    tiny_backbone_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "_stored_bits", lambda module, *_: 30.0 if module.seed == 0 else 0.0)
    with pytest.raises(InputError, match=r"text 2 of 3 stored nothing in 300 steps at a learning rate of 0.03; give a"):
        calibration.calibrate(str(tiny_backbone_folder), "mlp_block", 1)


def test_the_command_adds_a_constant_to_the_file_and_replaces_one_of_the_same_placement(
    tiny_backbone_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "own.json"
    common = [f"--backbone={tiny_backbone_folder}", "--block=1", "--guard=false", "--kl_penalty=false", "--texts=2"]
    common.append(f"--out={out}")
    asked = ["calibrate", *common, "--placement=mlp_block", "--learning_rate=0.05"]
    assert main([*asked, "--steps=100", "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert 0 < measured["bits_per_parameter"] < 1.6
    assert main(["calibrate", *common, "--placement=[down_proj]", "--steps=50"]) == 0
    assert "bits a parameter (" in capsys.readouterr().out
    first, second, *_ = read_constants(out)
    assert (first.placement, second.placement) == (["down_proj"], "mlp_block")
    assert second.bits_per_parameter == measured["bits_per_parameter"]
    # A constant that is measured again replaces the earlier one.
    assert main([*asked, "--steps=100", "--json"]) == 0
    assert len(json.loads(out.read_text())["constants"]) == 2


def test_a_constant_that_another_calibration_wrote_meanwhile_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "own.json"
    fields = {"bits_per_parameter": 1.0, "low": 0.9, "high": 1.1, "interval": "95 %", "source": "here"}
    first, second, third = (
        Constant.model_validate({"placement": [name], **fields}) for name in ("q_proj", "down_proj", "up_proj")
    )
    out.write_text(ConstantsFile(version=CONSTANTS_VERSION, constants=[first]).model_dump_json())

    def calibrate(*args: Any, **options: Any) -> Constant:
        out.write_text(ConstantsFile(version=CONSTANTS_VERSION, constants=[first, second]).model_dump_json())
        return third

    monkeypatch.setattr(calibration, "calibrate", calibrate)
    assert main(["calibrate", f"--out={out}"]) == 0
    assert read_constants_file(out).constants == [third, first, second]


@pytest.mark.parametrize("numbers", [{"texts": 1}, {"steps": 0}])
def test_too_few_texts_or_steps_are_refused(numbers: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="expected at least 2 texts and 1 step"):
        calibration.calibrate("nowhere", **numbers)


def test_a_file_that_holds_no_constants_is_not_overwritten(
    tmp_path: Path, tiny_backbone_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine.json"
    out.write_text("[1, 2]")
    assert main(["calibrate", f"--backbone={tiny_backbone_folder}", f"--out={out}"]) == 2
    assert f"{out}: not a file of constants of version 1" in capsys.readouterr().err
    assert out.read_text() == "[1, 2]"
