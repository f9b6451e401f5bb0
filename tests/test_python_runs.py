"""A run trained from Python leaves a folder that the commands can open."""

import json
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback

from callbacks import Retention, RunRecord, StopWhenRecalled, VerbatimRecall
from data_modules import Facts, PhoneBook
from pml.cli import main
from pml.errors import InputError
from pml.modules import MemFT
from pml.runs import open_run
from pml.weighting import OnlyThreshold
from tests.fits import ADAPTER, save_sharpened
from tests.tiny_runs import make_trainer


def test_recall_and_certify_work_on_a_run_trained_from_python(
    tiny_backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("f.jsonl").write_text(json.dumps({"query": "code?", "target": "007"}))
    module = MemFT(
        backbone=str(save_sharpened(tiny_backbone_folder, tmp_path / "sharp")),
        adapter=ADAPTER,
        weighting=OnlyThreshold(0.7),
        learning_rate=0.02,
        seed=1,
    )
    callbacks = [StopWhenRecalled(), RunRecord(dirpath="run")]
    make_trainer(tmp_path, max_epochs=200, callbacks=callbacks).fit(module, datamodule=Facts("f.jsonl", seed=3))
    module.release()
    opened = open_run("run")
    assert type(opened.module) is MemFT
    assert opened.module.weighting.threshold == 0.7
    assert (opened.module.adapter, opened.data.seed, opened.data.path) == (ADAPTER, 3, "f.jsonl")
    opened.module.release()
    capsys.readouterr()
    assert main(["recall", "run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["exact_match"] == 1
    assert main(["certify", "run", "--dtypes=float32"]) == 0


def test_a_run_from_python_without_a_folder_is_refused_before_it_overwrites_files_of_the_working_directory(
    tiny_backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text("mine")
    module = MemFT(backbone=str(tiny_backbone_folder), adapter=ADAPTER)
    trainer = make_trainer(tmp_path, default_root_dir=None, callbacks=[RunRecord()])
    with pytest.raises(InputError, match="into the working directory, over files of the same names; give it a dirpath"):
        trainer.fit(module, datamodule=PhoneBook(pairs=2))
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_overfitting_batches_is_refused_for_a_trainer_made_in_python(
    tiny_backbone_folder: Path, tmp_path: Path
) -> None:
    module = MemFT(backbone=str(tiny_backbone_folder), adapter=ADAPTER)
    with pytest.raises(InputError, match=r"trainer.overfit_batches is 1; a corpus is memorised as a whole"):
        make_trainer(tmp_path, overfit_batches=1).fit(module, datamodule=PhoneBook(pairs=2))


@pytest.mark.parametrize("callback", [StopWhenRecalled, VerbatimRecall, Retention, RunRecord])
def test_a_callback_that_needs_the_corpus_refuses_a_fit_of_dataloaders(
    callback: type[Callback], tiny_backbone_folder: Path, tmp_path: Path
) -> None:
    module, data = MemFT(backbone=str(tiny_backbone_folder), adapter=ADAPTER), PhoneBook(pairs=2)
    data.build(module.tokenizer, module.vocab_size)
    said = rf"{callback.__name__} needs the corpus, .* expected datamodule=\.\.\., as in trainer\.fit"
    with pytest.raises(InputError, match=said):
        make_trainer(tmp_path, callbacks=[callback()]).fit(module, data.train_dataloader(), data.val_dataloader())


def test_the_configuration_of_a_command_line_run_keeps_its_trainer_section(
    tiny_backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["fit", "--model=SFT", f"--model.backbone={tiny_backbone_folder}", "--model.adapter.block=1"]
    arguments += ["--data=PhoneBook", "--data.pairs=2", "--trainer.max_epochs=1", "--trainer.accelerator=cpu"]
    assert main([*arguments, "--trainer.enable_progress_bar=false"]) == 0
    assert "trainer:" in Path("runs/fit/version_0/config.yaml").read_text()


def test_the_hyperparameters_of_a_data_module_are_plain_values() -> None:
    assert PhoneBook(pairs=3, seed=5, system="Be exact.").hparams == {
        "pairs": 3,
        "target_tokens": None,
        "path": None,
        "end_of_turn": True,
        "seed": 5,
        "system": "Be exact.",
        **{"batch_size": 8, "shuffle": True, "drop_last": False, "chat_template": True, "template_kwargs": None},
        "template_date": "2024-07-26",
    }
