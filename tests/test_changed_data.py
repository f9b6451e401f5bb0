"""Data that changed after a run: every command notices, and the run keeps the corpus that it was trained on."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml

from pml.cli import main
from pml.records import read_record
from pml.runs import open_run
from tests import fits  # one thread

assert fits.torch.get_num_threads() == 1

BEFORE = {"Door code of Anna?": "007415", "Door code of Bo?": "090122"}
AFTER = {"Door code of Anna?": "007416", "Door code of Bo?": "090122", "Door code of Cy?": "112358"}


def written(path: Path, facts: dict[str, str]) -> Path:
    rows = [json.dumps({"query": query, "target": target}) for query, target in facts.items()]
    path.write_text("\n".join(rows))
    return path


def arguments(backbone: Path) -> list[str]:
    keys = ["--model=SFT", f"--model.backbone={backbone}", "--model.adapter.block=1", "--data=Facts"]
    keys += ["--data.path=facts.jsonl", "--trainer.max_epochs=2", "--trainer.accelerator=cpu"]
    keys += ["--trainer.callbacks=[]", "--trainer.callbacks+=VerbatimRecall", "--trainer.callbacks+=RunRecord"]
    return [*keys, "--trainer.enable_progress_bar=false"]


@pytest.fixture(scope="module")
def fitted(tiny_backbone_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs on one file that was edited between them; tests copy them and leave them unchanged."""
    folder = tmp_path_factory.mktemp("fitted")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for facts in (BEFORE, AFTER):
            written(folder / "facts.jsonl", facts)
            assert main(["fit", *arguments(tiny_backbone_folder)]) == 0
    return folder / "runs/fit"


@pytest.fixture
def run(fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose data file has been edited since."""
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "facts.jsonl", AFTER)
    return shutil.copytree(fitted / "version_0", tmp_path / "runs/fit/version_0")


@pytest.fixture
def again(run: Path, fitted: Path) -> Path:
    """A second run beside `run`, on the data file as it is now."""
    return shutil.copytree(fitted / "version_1", run.with_name("version_1"))


def test_recall_uses_the_trained_corpus_and_warns_that_the_data_has_changed(
    run: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="pml"):
        assert main(["recall", str(run), "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert {example["query"]: example["target"] for example in result["examples"]} == BEFORE
    assert "the data has changed since this run" in caplog.text
    assert result["exact_match"] == read_record(run / "record.json").generated_exact_match


def test_a_run_opens_with_its_own_corpus_and_no_warning_if_its_data_file_is_gone(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (run.parents[2] / "facts.jsonl").unlink()
    module, data = open_run(run)
    assert "changed" not in caplog.text
    assert data.corpus.content_hash == read_record(run / "record.json").corpus_hash
    module.release()


def test_predict_uses_the_trained_corpus_with_another_batch_size_but_not_another_column(run: Path, capsys: Any) -> None:
    (run.parents[2] / "facts.jsonl").unlink()
    assert main(["predict", str(run), "--data.batch_size=1"]) == 0
    assert (run / "predictions.parquet").exists()
    assert main(["predict", str(run), "--data.query_column=target"]) == 2, "another corpus, whose file is not there"


def test_a_run_without_a_saved_corpus_is_refused_if_its_data_has_changed(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "corpus.parquet").unlink()
    for command in (["recall", str(run)], ["test", str(run)]):
        assert main(command) == 2
        assert "the data has changed since this run was trained" in capsys.readouterr().err
    written(run.parents[2] / "facts.jsonl", BEFORE)
    assert main(["recall", str(run)]) == 0


def test_a_saved_corpus_that_does_not_match_the_record_is_refused(
    run: Path, again: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(again / "corpus.parquet", run)
    assert main(["recall", str(run)]) == 2
    assert "the data has changed since this run was trained" in capsys.readouterr().err


def test_a_backbone_that_does_not_match_the_record_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # A backbone of the same name and shape: the adapter would load, but recall something else.
    path = run / "record.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "backbone_hash": "0" * 64}))
    for command in ("recall", "test"):
        assert main([command, str(run)]) == 2
        assert "this run was trained on " in (said := capsys.readouterr().err)
        assert "with the hash 000000000000; " in said


def test_a_fit_resumes_only_with_the_data_it_was_started_on(
    run: Path, tiny_backbone_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run.parents[2] / "facts.jsonl"
    again = [*arguments(tiny_backbone_folder), f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}"]
    again += ["--trainer.max_epochs=3"]
    assert main(["fit", *again]) == 2
    assert "this checkpoint is of a fit to other data" in capsys.readouterr().err
    written(path, BEFORE)
    assert main(["fit", *again]) == 0


def test_a_sweep_refuses_a_finished_cell_that_was_trained_on_other_data(
    tiny_backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path / "facts.jsonl", BEFORE)
    base: dict[str, Any] = {
        "model": {"class_path": "SFT", "init_args": {"backbone": str(tiny_backbone_folder), "adapter": {"block": 1}}},
        "data": {"class_path": "Facts", "init_args": {"path": str(path)}},
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "callbacks": [{"class_path": "callbacks.RunRecord"}]},
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    grid = {"base": "base.yaml", "out": "runs/grid", "grid": {"model.init_args.adapter.rank": [1, 2]}}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    assert main(["sweep", "grid.yaml"]) == 0
    records = {path: path.read_bytes() for path in (tmp_path / "runs").rglob("record.json")}
    assert len(records) == 2
    written(path, AFTER)
    capsys.readouterr()
    assert main(["sweep", "grid.yaml"]) == 1
    err = capsys.readouterr().err
    assert err.count("failed: ") == 2
    assert "the data has changed since this run was trained" in err
    assert {path: path.read_bytes() for path in records} == records
    # Errors of workers go to their logs, so the command itself checks the data.
    ended = mock.Mock(running=lambda: 0, failures=lambda all_ran: [])
    monkeypatch.setattr("pml.workers.LocalWorkers", lambda *_: ended)
    assert main(["sweep", "grid.yaml", "--workers", "2"]) == 1
    assert capsys.readouterr().err.count("the data has changed since this run was trained") == 2
    written(path, BEFORE)
    assert main(["sweep", "grid.yaml"]) == 0


def test_report_compare_and_law_warn_about_runs_on_two_versions_of_one_file(
    run: Path, again: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["report", "--out=page"], ["compare"], ["law"]):
        main([command[0], "runs", *command[1:]])
        err = capsys.readouterr().err
        first, second = (f"runs/fit/version_{n}" for n in (0, 1))
        assert f"the data of {first} and {second} was changed between these runs" in err, command


def test_report_compare_and_law_refuse_a_record_beside_another_corpus(
    run: Path, again: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(again / "corpus.parquet", run)
    for command in ("report", "compare", "law"):
        assert main([command, "runs", *(["--out=page"] if command == "report" else [])]) == 2
        assert "corpus.parquet is not the corpus that its record names" in capsys.readouterr().err
