"""A user's own classes: found beside the configuration, recorded with their arguments, and loaded again."""

import contextlib
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse._common import parsing_settings

from pml.cli import main
from pml.errors import InputError
from pml.modules import SFT, MemFT, Memorization
from pml.records import read_record
from pml.runs import open_run
from tests import fits  # one thread
from tests.test_going_on import stop_at

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
    """A configuration with classes beside it, outside the working directory."""
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


def test_own_classes_beside_the_configuration_are_found_and_recorded(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", f"--config={config}", "--trainer.callbacks+=own_classes.Watch"]) == 0
    assert "watching" in capsys.readouterr().out
    record = read_record(Path("runs/fit/version_0/record.json"))
    assert (record.corpus, record.method_settings["patience"]) == ("mine", 7)


def test_the_command_that_resumes_a_stopped_fit_finds_the_classes_beside_its_configuration(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (config.parent / "own_classes.py").rename(config.parent / "classes_to_find_again.py")
    config.write_text(config.read_text().replace("own_classes.", "classes_to_find_again."))
    monkeypatch.setattr("pml.own_classes._State.appended", [])
    assert main(["fit", f"--config={config}", *stop_at(step=0)]) == 143
    advice = capsys.readouterr().err.splitlines()[-1].partition("; go on with: ")[2]
    run = "runs/fit/version_0"
    assert advice == f"PYTHONPATH={config.parent} pml fit --config {run}/config.yaml --ckpt_path last"


def test_the_own_classes_option_may_be_written_with_a_hyphen_or_an_underscore(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", f"--config={config}"]) == 0
    run = "runs/fit/version_0"
    for option in ("--own-classes", "--own_classes"):
        assert main(["recall", run, option, "--json"]) == 0
    capsys.readouterr()


def test_a_checkpoint_loads_through_its_base_classes_but_not_through_another_method(config: Path) -> None:
    assert main(["fit", f"--config={config}"]) == 0
    checkpoint = "runs/fit/version_0/checkpoints/last.ckpt"
    for method in (Memorization, MemFT):
        module = method.load_from_checkpoint(checkpoint)
        assert type(module).__name__ == "MyMemFT"
        assert module.hparams["patience"] == 7
        module.release()
    with pytest.raises(Exception, match=r"was written by the method MyMemFT; expected one of SFT"):
        SFT.load_from_checkpoint(checkpoint)


def test_a_data_module_that_is_not_a_corpus_is_refused_with_what_it_lacks(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", f"--config={config}", "--data=own_classes.Foreign"]) == 2
    err = capsys.readouterr().err
    assert "data is a Foreign, which has no build and no corpus and no held_out; derive it from data_modules." in err


def test_a_run_with_own_classes_is_opened_only_with_the_own_classes_option(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["fit", f"--config={config}"]) == 0
    # As in another process, whose import path does not have the folder of the classes.
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


EVIL = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
class Sly: pass
"""


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"class_path": "pml.MemFT", "init_args": {"weighting": "evil.Sly"}}},
        {"model": {"class_path": "pml.MemFT", "init_args": {"curriculum": "evil.Sly"}}},
        {"model": "pml.yaml"},
        {"model.class_path": "evil.Sly"},
        {"trainer.callbacks": "evil.Sly"},
        {"trainer": {"callbacks": ["evil.Sly"]}},
    ],
    ids=str,
)
def test_no_own_class_named_by_a_run_is_executed_without_the_own_classes_option(
    change: dict[str, Any], config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path("run")
    run.mkdir()
    sane = {"model": {"class_path": "pml.SFT"}, "data": {"class_path": "data_modules.PhoneBook"}}
    (run / "config.yaml").write_text(yaml.safe_dump({**sane, **change}))
    for folder in (run, Path()):
        (folder / "evil.py").write_text(EVIL)
        (folder / "pml.yaml").write_text("class_path: evil.Sly")
    monkeypatch.syspath_prepend(str(Path.cwd()))
    assert main(["validate", "run"]) == 2
    with contextlib.suppress(InputError):
        open_run(run)
    assert not [*Path().rglob("ran")] and "evil" not in sys.modules
    # Afterwards any class may be named again.
    assert "*" not in parsing_settings["import_path_verdicts"]
    main(["validate", "run", "--own_classes"])
    sys.modules.pop("evil", None)
    assert [*Path().rglob("ran")], "it runs where that is allowed"


def test_no_file_of_a_run_is_executed_in_place_of_a_package_that_is_not_installed(
    tiny_backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = ["fit", "--model=SFT", f"--model.backbone={tiny_backbone_folder}", "--model.adapter.block=1"]
    made += ["--data=RandomTokens", "--data.length=4", "--trainer.max_epochs=1", "--trainer.accelerator=cpu"]
    assert main(made) == 0
    run = tmp_path / "runs/fit/version_0"
    (run / "not_installed.py").write_text(EVIL)
    before, found = list(sys.path), list[Any]()
    # As libraries do that look for an optional package.
    monkeypatch.setattr(
        "callbacks.VerbatimRecall.setup", lambda *_, **__: found.append(find_spec("not_installed")), raising=False
    )
    for folder, command in ((tmp_path, ["test", str(run)]), (run, ["validate", "."])):
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "path", [place for place in before if place not in ("", str(tmp_path), str(run))])
        found.clear()
        assert main(command) == 0
        assert found and not any(found)
    # A configuration that the user gives is trusted.
    monkeypatch.chdir(tmp_path)
    found.clear()
    assert main(["validate", f"--config={run}/config.yaml", "--trainer.logger=false"]) == 0
    assert found and all(found)


def test_a_checkpoint_that_names_a_foreign_class_is_refused_without_importing_it(
    config: Path, tiny_backbone_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("evil.py").write_text(EVIL)
    monkeypatch.syspath_prepend(str(Path.cwd()))
    made_with = {"_class_path": "evil.MemFT", "backbone": str(tiny_backbone_folder)}
    torch.save({"state_dict": {}, "pml": {}, "hyper_parameters": made_with}, "x.ckpt")
    for command in ("fit", "validate"):
        assert main([command, "--model=MemFT", "--data=PhoneBook", "--ckpt_path=x.ckpt"]) == 2
        assert "x.ckpt names the class evil.MemFT, which is not pml's" in capsys.readouterr().err
    assert not [*Path().rglob("ran")]
