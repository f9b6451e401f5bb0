"""Classes of people's own: found beside their configuration, recorded with their arguments, loaded again."""

import sys
from pathlib import Path

import pytest
import yaml

from pml.cli import main
from pml.modules import SFT, MemFT, Memorization
from pml.records import read_record
from tests import fits  # one thread

assert fits.torch.get_num_threads() == 1

MINE = """
from lightning.pytorch import Callback, LightningDataModule
from pml.corpus import Corpus, Pair, encode_pairs
from pml.modules import MemFT
from data_modules import MemorizationDataModule

class MyMemFT(MemFT):
    def __init__(self, patience: int = 3, **kwargs):
        super().__init__(**kwargs)
        self.patience = patience

class MyCorpus(MemorizationDataModule):
    def __init__(self, word: str = "x", **kwargs):
        super().__init__(**kwargs)
        self.word = word
    def make_corpus(self, tokenizer, vocabulary):
        encoder = self.encoder(tokenizer)
        return Corpus("mine", encode_pairs([Pair("Who?", self.word)], encoder).examples, settings=self.settings)

class Watch(Callback):
    def on_fit_start(self, trainer, pl_module):
        print("watching")

class Foreign(LightningDataModule):
    pass
"""


@pytest.fixture
def config(tiny_backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration with classes beside it, in another folder than the working directory."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "own_classes.py").write_text(MINE)
    adapter = {"rank": 2, "block": 1}
    content = {
        "model": {
            "class_path": "own_classes.MyMemFT",
            "init_args": {"backbone": str(tiny_backbone_folder), "adapter": adapter, "patience": 7},
        },
        "data": {"class_path": "own_classes.MyCorpus", "init_args": {"word": "007"}},
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False},
    }
    (home / "run.yaml").write_text(yaml.safe_dump(content))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return home / "run.yaml"


def test_own_method_corpus_and_callback_are_found_beside_the_configuration_and_recorded(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", f"--config={config}", "--trainer.callbacks+=own_classes.Watch"]) == 0
    assert "watching" in capsys.readouterr().out
    record = read_record(Path("runs/fit/version_0/record.json"))
    assert (record.corpus, record.method_settings["patience"]) == ("mine", 7)


def test_a_checkpoint_of_any_method_loads_from_what_they_share(config: Path) -> None:
    assert main(["fit", f"--config={config}"]) == 0
    checkpoint = "runs/fit/version_0/checkpoints/last.ckpt"
    for method in (Memorization, MemFT):
        module = method.load_from_checkpoint(checkpoint)
        assert type(module).__name__ == "MyMemFT"
        assert module.hparams["patience"] == 7
        module.release()
    with pytest.raises(Exception, match=r"is of the method MyMemFT; expected one of SFT"):
        SFT.load_from_checkpoint(checkpoint)


def test_a_data_module_of_another_kind_is_refused_with_what_it_lacks(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", f"--config={config}", "--data=own_classes.Foreign"]) == 2
    err = capsys.readouterr().err
    assert "data is a Foreign, which has no build and no corpus and no held_out; derive it from data_modules." in err


def test_a_run_with_own_classes_is_opened_only_when_that_is_allowed(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["fit", f"--config={config}"]) == 0
    # As in another process, and in another folder than that of the classes.
    monkeypatch.delitem(sys.modules, "own_classes")
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder != str(config.parent)])
    for command in ("recall", "validate"):
        capsys.readouterr()
        assert main([command, "runs/fit/version_0"]) == 2
        assert "names the class own_classes.My" in capsys.readouterr().err
    assert "own_classes" not in sys.modules
    (Path("runs/fit/version_0") / "own_classes.py").write_text(MINE)
    assert main(["recall", "runs/fit/version_0", "--own_classes"]) == 0
    assert "true     007" in capsys.readouterr().out


def test_what_a_terminal_would_obey_is_spelled_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recall", "no\x1b[2Jsuch\rrun"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no\\x1b[2Jsuch" in line
    assert line.isprintable()
