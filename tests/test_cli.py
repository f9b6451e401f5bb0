"""The command line as users run it: what it writes, what it prints, and how it reports wrong input."""

import contextlib
import gc
import inspect
import json
import logging
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from lightning.pytorch import Trainer

import callbacks
import data_modules
from pml import quiet, weighting
from pml.adapter import AdapterConfig
from pml.cli import COMMANDS, FIT_COMMANDS, main
from pml.guard import GuardConfig
from pml.kl_penalty import KlPenaltyConfig
from pml.lightning_cli import MemorizationCLI, parse_run, prepare
from pml.modules import SFT, MemFT
from pml.quiet import keep_quiet
from pml.records import read_record
from pml.weighting import Weighting
from tests import fits  # one thread

assert fits.torch.get_num_threads() == 1

ROOT = Path(__file__).resolve().parents[1]

# The environment of a user who has installed pml, except for the single thread, which suits tiny matrices.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}


def pml(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pml", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)


def fit_arguments(folder: Path) -> list[str]:
    """A fit of two epochs on eight random tokens."""
    arguments = ["--model=SFT", f"--model.backbone={folder}", "--model.adapter.block=1", "--data=RandomTokens"]
    arguments += ["--data.length=8", "--trainer.max_epochs=2", "--trainer.accelerator=cpu"]
    return arguments


@pytest.fixture
def _nothing_said_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has just started and has written no line to stderr yet."""
    keep_quiet()
    for name in quiet.OWN:
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, quiet._ToStderr):
                monkeypatch.setattr(handler, "_written", set())


def quick(folder: Path) -> list[str]:
    return [*fit_arguments(folder), "--trainer.enable_progress_bar=false"]


RECORD_ALONE = ["--trainer.callbacks=[]", "--trainer.callbacks+=callbacks.RunRecord"]
"""Replaces all that a fit measures by default, for tests of something else."""


@pytest.fixture(scope="module")
def finished(tiny_backbone_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run that memorises a phone book, by `pml fit` in a separate process."""
    tmp_path = tmp_path_factory.mktemp("finished")
    arguments = ["--model=MemFT", f"--model.backbone={tiny_backbone_folder}", "--model.adapter.block=1"]
    arguments += ["--data=PhoneBook", "--data.pairs=3", "--trainer.max_epochs=5", "--trainer.accelerator=cpu"]
    done = pml("fit", *arguments, "--trainer.callbacks+=TokenThresholds", cwd=tmp_path)
    return {"done": done, "cwd": tmp_path, "run": tmp_path / "runs/fit/version_0", "arguments": arguments}


# Help --------------------------------------------------------------------------------------------------------------


def test_an_unusable_path_gives_a_one_line_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("pml.cli._dispatch", lambda *_: (tmp_path / "file").mkdir())
    assert main(["fetch"]) == 2
    assert capsys.readouterr().err == (
        f"pml fetch: error: {tmp_path}/file: File exists; expected a usable file or folder\n"
    )


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"pml {version('pml')}\n"


def test_the_overview_lists_every_command_with_a_description(tmp_path: Path) -> None:
    for arguments in ([], ["--help"]):
        done = pml(*arguments, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        named = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")]
        assert named == [*FIT_COMMANDS, *COMMANDS]
        assert all(len(line.split()) > 3 for line in done.stdout.splitlines() if line.startswith("  "))


@pytest.mark.parametrize("command", [*FIT_COMMANDS, *COMMANDS])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: Any = main([command, "--help"])
    except SystemExit as stop:  # raised by a parser's own help
        code = stop.code or 0
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    assert out.startswith("usage: pml ")
    assert f" {command} " in out.splitlines()[0]
    assert len(out.splitlines()) > 5


def test_the_help_of_fit_lists_every_option_and_class_that_it_accepts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    options = {line.split()[0] for line in lines if line.strip().startswith("--")}
    settings = {"model.adapter": AdapterConfig, "model.adapter.guard": GuardConfig, "model.kl_penalty": KlPenaltyConfig}
    for group, made in (("trainer", Trainer), ("model", MemFT), ("model", SFT), *settings.items()):
        names = inspect.signature(made).parameters.keys() - {"kwargs"}
        assert {f"--{group}.{name}" for name in names} <= options
    data = inspect.signature(data_modules.PhoneBook).parameters.keys() - {"kwargs"}
    assert {f"--data.{name}" for name in data} <= options
    named = {line.split()[0] for line in lines if line.startswith("  ")}
    assert {*data_modules.__all__} - {"MemorizationDataModule"} | {*callbacks.__all__} <= named
    kinds = {name for name, kind in vars(weighting).items() if inspect.isclass(kind) and issubclass(kind, Weighting)}
    assert kinds - {"Weighting"} <= named
    (rank,) = [line for line in lines if "--model.adapter.rank" in line]
    assert rank.split(maxsplit=1)[1] == "LoRA rank r. (default: 4)"
    assert any("--trainer.max_epochs" in line and "(default: 200)" in line for line in lines)
    assert "  RunRecord *" in "\n".join(lines) and "  Retention *" not in "\n".join(lines), "on by default or not"
    assert not any("None" in line.split() for line in lines if "--model" in line), "null in a configuration"


@pytest.mark.parametrize("option", ["--retry-failed", "--retry_failed", "--cluster-options={}"])
def test_options_may_be_written_with_hyphens_or_underscores(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "no-such-grid.yaml", option]) == 2
    assert "no-such-grid.yaml: " in capsys.readouterr().err


def test_examples_in_the_help_of_a_command_keep_their_line_breaks(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert "    pml plan PAIRS.jsonl --placement mlp_block --guard false" in lines
    assert sum(line.startswith("    pml plan ") for line in lines) == 6


@pytest.mark.parametrize("command", [*FIT_COMMANDS, "law", "plan", "compare", "sweep"])
def test_help_imports_no_slow_library(command: str, tmp_path: Path) -> None:
    heavy = ["torch", "lightning", "transformers", "scipy", "lmfit", "matplotlib"]
    code = f"import sys; from pml.cli import main\ntry: main([{command!r}, '--help'])\nexcept SystemExit: pass\n"
    code += f"print([name for name in {heavy} if name in sys.modules], file=sys.stderr)"
    command_line = [sys.executable, "-c", code]
    done = subprocess.run(command_line, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


# Runs --------------------------------------------------------------------------------------------------------------


CHOSEN_FOR_SPEED = ["float32 products", "frozen layers", "the blocks above the adapter are not compiled"]
"""What a fit on a CPU reports before it starts, each in a line that gives the reason."""


def test_a_fit_leaves_a_complete_run_folder_and_prints_the_path_of_its_record(finished: dict[str, Any]) -> None:
    assert finished["done"].returncode == 0
    names = {path.name for path in finished["run"].iterdir()}
    assert {"config.yaml", "record.json", "tokens.parquet", "adapter"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert read_record(finished["run"] / "record.json").status == "finished"
    # Stderr has the choices made for speed, the harm and the record, but no greeting, advice or warning.
    *chosen, harm, last = finished["done"].stderr.splitlines()
    assert harm.startswith("harm: ")
    assert last == "record: runs/fit/version_0/record.json"
    assert [line.partition(":")[0] for line in chosen] == CHOSEN_FOR_SPEED


@pytest.mark.usefixtures("_nothing_said_yet")
def test_a_fit_that_recalls_its_corpus_prints_the_steps_to_recall(
    tiny_backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sharp = fits.save_sharpened(tiny_backbone_folder, tmp_path / "sharp")
    arguments = ["--model.learning_rate=0.05", "--model.adapter.rank=16", "--trainer.max_epochs=300"]
    capsys.readouterr()
    assert main(["fit", *quick(sharp), *arguments]) == 0
    said = capsys.readouterr().err.splitlines()
    steps = read_record(tmp_path / "runs/fit/version_0/record.json").steps_to_recall
    assert steps is not None
    (harm,) = [line for line in said if line.startswith("harm: ")]
    assert said[len(CHOSEN_FOR_SPEED) :] == [
        f"recalled: all 8 target tokens above p = 0.5 after {steps} steps",
        harm,
        "record: runs/fit/version_0/record.json",
    ]


def test_a_fit_without_logger_callbacks_and_checkpoints_writes_no_file(
    tiny_backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("mine\n")
    nothing = ["--trainer.logger=false", "--trainer.callbacks=[]", "--trainer.enable_checkpointing=false"]
    assert main(["fit", *quick(tiny_backbone_folder), *nothing]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    assert (tmp_path / "config.yaml").read_text() == "mine\n"


def test_a_second_fit_gets_its_own_run_folder(
    tiny_backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main(["fit", *quick(tiny_backbone_folder), *RECORD_ALONE]) == 0
    first, second = (read_record(tmp_path / f"runs/fit/version_{n}/record.json") for n in (0, 1))
    assert first.final_loss == second.final_loss


def test_a_printed_configuration_is_yaml_that_fit_accepts(
    tiny_backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["fit", *quick(tiny_backbone_folder), *RECORD_ALONE, "--print_config"])
    assert not stop.value.code
    out = capsys.readouterr().out
    assert yaml.safe_load(out)["data"]["init_args"]["length"] == 8
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "printed.yaml").write_text(out)
    assert main(["fit", "--config=printed.yaml"]) == 0
    assert read_record(tmp_path / "runs/fit/version_0/record.json").target_tokens == 8


def test_the_saved_configuration_reproduces_the_run(
    finished: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", f"--config={finished['run'] / 'config.yaml'}", "--trainer.enable_progress_bar=false"]) == 0
    again = read_record(tmp_path / "runs/fit/version_0/record.json")
    record = read_record(finished["run"] / "record.json")
    assert (again.final_loss, again.corpus_hash) == (record.final_loss, record.corpus_hash)


def table_values(text: str) -> dict[str, float]:
    """Values in the table that Lightning prints after an evaluation."""
    rows = [line.strip("│ ").split("│") for line in text.splitlines() if line.startswith("│")]
    return {name.strip(): float(value) for name, value in rows}


@pytest.mark.parametrize(("command", "prefix"), [("validate", "val"), ("test", "test")])
def test_evaluating_a_checkpoint_reproduces_the_recorded_metrics(
    command: str,
    prefix: str,
    finished: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    record = read_record(finished["run"] / "record.json")
    checkpoint = finished["run"] / "checkpoints" / "last.ckpt"
    arguments = [*finished["arguments"], "--trainer.enable_progress_bar=false", f"--ckpt_path={checkpoint}"]
    assert main([command, *arguments]) == 0
    values = table_values(capsys.readouterr().out)
    assert values[f"{prefix}/loss"] == pytest.approx(record.final_loss, rel=1e-5)
    assert values[f"{prefix}/token_accuracy"] == pytest.approx(record.token_accuracy, rel=1e-5)
    assert values[f"{prefix}/min_target_probability"] == pytest.approx(record.min_target_probability, rel=1e-4)
    assert (f"{prefix}/generated_token_accuracy" in values) is (command == "test")


@pytest.mark.parametrize("named", ["run", "adapter", "config"])
def test_validate_evaluates_the_run_given_by_its_folder_adapter_or_configuration(
    named: str,
    finished: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    run = finished["run"]
    record = read_record(run / "record.json")
    before = sorted(path.name for path in run.iterdir())
    which = {"run": [str(run)], "adapter": [str(run / "adapter")], "config": [f"--config={run / 'config.yaml'}"]}[named]
    assert main(["validate", *which, "--trainer.enable_progress_bar=false"]) == 0
    values = table_values(capsys.readouterr().out)
    assert values["val/loss"] == pytest.approx(record.final_loss, rel=1e-5)
    assert record.final_loss is not None and record.initial_loss is not None
    assert abs(record.final_loss - record.initial_loss) > 0.1
    assert sorted(path.name for path in run.iterdir()) == before


def test_a_run_can_be_evaluated_on_other_data(
    finished: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    other = ["--data.pairs=4", "--trainer.enable_progress_bar=false"]
    assert main(["validate", str(finished["run"]), *other]) == 0
    record = read_record(finished["run"] / "record.json")
    assert table_values(capsys.readouterr().out)["val/loss"] != pytest.approx(record.final_loss, rel=1e-3)


def test_a_later_configuration_gives_a_run_other_data_to_be_evaluated_on(
    finished: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run, quiet = str(finished["run"]), "--trainer.enable_progress_bar=false"
    losses = []
    for data in (
        None,
        {"init_args": {"batch_size": 1}},
        {"init_args": {"pairs": 4}},
        {"class_path": "PhoneBook", "init_args": {"pairs": 4}},
    ):
        (tmp_path / "other.yaml").write_text(yaml.safe_dump({"data": data} if data else {"seed_everything": 1}))
        assert main(["validate", run, "--config=other.yaml", quiet]) == 0
        losses.append(table_values(capsys.readouterr().out)["val/loss"])
    assert main(["validate", run, "--data.pairs=4", quiet]) == 0
    other = table_values(capsys.readouterr().out)["val/loss"]
    known = read_record(finished["run"] / "record.json").final_loss
    assert losses == pytest.approx([known, known, other, other], rel=1e-5)
    assert other != pytest.approx(known, rel=1e-3)


def test_a_run_that_made_no_validation_can_be_validated(
    finished: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = shutil.copytree(finished["run"], tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["trainer"]["limit_val_batches"] = 0
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["validate", str(run), "--trainer.enable_progress_bar=false"]) == 0
    known = read_record(run / "record.json").final_loss
    assert table_values(capsys.readouterr().out)["val/loss"] == pytest.approx(known, rel=1e-5)
    assert main(["validate", f"--config={run}/config.yaml", "--trainer.logger=false"]) == 2
    assert "trainer.limit_val_batches is 0, so nothing is left to validate; raise it" in capsys.readouterr().err


def test_ckpt_path_last_finds_the_last_checkpoint_of_a_run(
    finished: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["test", str(finished["run"]), "--ckpt_path=last", "--trainer.enable_progress_bar=false"]) == 0
    record = read_record(finished["run"] / "record.json")
    assert table_values(capsys.readouterr().out)["test/loss"] == pytest.approx(record.final_loss, rel=1e-5)


def test_predict_writes_token_scores_beside_the_record_and_logs_their_path(
    finished: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    shutil.copytree(finished["run"], run)
    with caplog.at_level(logging.INFO, logger="pml"):
        for _ in range(2):
            assert main(["predict", str(run), "--trainer.enable_progress_bar=false"]) == 0
    said = [message for message in caplog.messages if message.startswith("predictions: ")]
    assert said == [f"predictions: {run / name}" for name in ("predictions.parquet", "predictions_1.parquet")]
    table, tokens = (pq.read_table(run / name) for name in ("predictions.parquet", "tokens.parquet"))
    assert table.num_rows == read_record(run / "record.json").target_tokens
    assert table.drop(["query", "token", "probability", "loss"]).equals(tokens.drop(["loss"]))
    np.testing.assert_allclose(table["loss"].to_numpy(), tokens["loss"].to_numpy(), rtol=1e-5)
    np.testing.assert_allclose(np.exp(-table["loss"].to_numpy()), table["probability"].to_numpy(), rtol=1e-6)
    first = [row for row in table.to_pylist() if row["example_id"] == 0]
    assert first[0]["query"].endswith(":")
    assert "".join(row["token"] for row in first[:-1]).isdigit()


def test_predict_takes_some_batches_and_refuses_none(
    finished: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = shutil.copytree(finished["run"], tmp_path / "run")
    arguments = ["predict", str(run), "--trainer.enable_progress_bar=false", "--data.batch_size=1"]
    assert main([*arguments, "--trainer.limit_predict_batches=1"]) == 0
    table = pq.read_table(run / "predictions.parquet")
    assert set(table["example_id"].to_pylist()) == {0}
    assert main([*arguments, "--trainer.limit_predict_batches=0"]) == 2
    assert "trainer.limit_predict_batches is 0, so nothing is left to predict" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_evaluating_without_an_existing_run_or_checkpoint_is_refused(
    command: str, finished: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, *finished["arguments"]]) == 2
    assert f"nothing to {command}: expected a run's folder, as in `pml {command} RUN`" in capsys.readouterr().err
    assert main([command, str(tmp_path)]) == 2
    assert "config.yaml: no such file; expected the folder of a run" in capsys.readouterr().err
    run = str(finished["run"] / "config.yaml")
    assert main([command, f"--config={run}", "--ckpt_path=none.ckpt"]) == 2
    assert "ckpt_path is none.ckpt; expected an existing checkpoint file" in capsys.readouterr().err


def test_evaluating_does_not_overwrite_the_configuration_of_the_run(
    finished: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    backbone = Path(read_record(finished["run"] / "record.json").backbone)
    assert main(["fit", *quick(backbone), *RECORD_ALONE]) == 0
    path = tmp_path / "runs/fit/version_0/config.yaml"
    before = path.read_bytes()
    checkpoint = f"--ckpt_path={finished['run'] / 'checkpoints' / 'last.ckpt'}"
    assert main(["validate", *finished["arguments"], "--trainer.logger.version=version_0", checkpoint]) == 0
    assert path.read_bytes() == before


def test_a_fit_into_the_folder_of_a_finished_run_is_refused(
    tiny_backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    same = [*quick(tiny_backbone_folder), *RECORD_ALONE, "--trainer.logger.version=version_0"]
    assert main(["fit", *same]) == 0
    record = (tmp_path / "runs/fit/version_0/record.json").read_bytes()
    capsys.readouterr()
    assert main(["fit", *same]) == 2
    assert "record.json is the record of an earlier run; choose another folder" in capsys.readouterr().err
    assert (tmp_path / "runs/fit/version_0/record.json").read_bytes() == record


# Recall, sweeps, law -----------------------------------------------------------------------------------------------


def test_recall_queries_every_pair_and_agrees_with_the_record(
    finished: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["recall", str(finished["run"]), "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    (result,) = json.loads(out)
    record = read_record(finished["run"] / "record.json")
    assert result["exact_match"] == record.generated_exact_match
    assert result["token_accuracy"] == record.generated_token_accuracy
    assert len(result["examples"]) == 3
    for example in result["examples"]:
        assert example["query"].endswith(":")
        assert len(example["target"]) == 10
        assert example["target"].isdigit()


def test_recall_accepts_an_adapter_folder_a_record_and_a_folder_of_runs(
    finished: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    answers = []
    for path in (finished["run"] / "adapter", finished["run"] / "record.json", finished["cwd"] / "runs"):
        assert main(["recall", str(path), "--limit=2"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] == answers[2]
    assert answers[0].count("      true     ") == 2


def test_recall_shows_the_first_wrong_character_of_a_failed_pair(
    finished: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["recall", str(finished["run"]), "--limit=1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("  ! ")
    true, recalled = (line.split()[-1] for line in lines[2:4])
    same = next(i for i, (a, b) in enumerate(zip(true + " ", recalled + " ", strict=False)) if a != b)
    assert lines[4].startswith(f"      first wrong at character {same + 1}: ")
    assert lines[5].startswith("  greedy decoding: exact match 0.0000")


def test_recall_reports_predicted_and_sampled_recall_and_refuses_temperature_zero(
    finished: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["recall", str(finished["run"]), "--limit=2", "--sample=3", "--temperature=0.5", "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert 0 <= result["predicted_exact"] < 0.01
    assert result["sampled_exact"] == 0
    assert main(["recall", str(finished["run"]), "--sample=1", "--temperature=0"]) == 2
    assert "--temperature is 0.0; expected a number above 0" in capsys.readouterr().err


def test_recall_answers_a_prompt(finished: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recall", str(finished["run"]), "--prompt=Ann Other:", "--tokens=5", "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert result["prompt"] == "Ann Other:"
    assert isinstance(result["answer"], str)


@pytest.mark.parametrize("chat_template", ["true", "false"])
def test_recall_formats_a_prompt_as_the_corpus_was_formatted(
    chat_template: str,
    finished: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [*finished["arguments"], *RECORD_ALONE]
    arguments += [f"--data.chat_template={chat_template}", "--data.end_of_turn=false"]
    assert main(["fit", *arguments, "--trainer.enable_progress_bar=false"]) == 0
    capsys.readouterr()
    assert main(["recall", "runs", "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    for example in result["examples"]:
        # As many tokens as the target has.
        assert main(["recall", "runs", f"--prompt={example['query']}", "--tokens=10", "--json"]) == 0
        (answer,) = json.loads(capsys.readouterr().out)
        assert answer["answer"] == example["generated"]


@pytest.mark.usefixtures("_nothing_said_yet")
def test_a_sweep_exits_with_0_if_every_cell_is_recorded_and_with_1_if_a_cell_fails(
    tiny_backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    base = ["fit", *quick(tiny_backbone_folder), *RECORD_ALONE, "--print_config"]
    with (tmp_path / "base.yaml").open("w") as file, contextlib.redirect_stdout(file), contextlib.suppress(SystemExit):
        main(base)
    grid = {"base": "base.yaml", "out": "cells", "grid": {"model.init_args.adapter.rank": [1, 2]}}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    capsys.readouterr()
    assert main(["sweep", "grid.yaml"]) == 0
    said = capsys.readouterr().err.splitlines()
    # What was chosen for speed is printed once, not once per cell.
    heads = [line.partition(":")[0] for line in said if not line.startswith("record: ")]
    assert [head[:6] for head in heads if head not in CHOSEN_FOR_SPEED] == ["2 cell", "[1/2] ", "[2/2] "]
    chosen = [head for head in heads if head in CHOSEN_FOR_SPEED]
    assert len(chosen) == len(set(chosen)) >= 2  # an earlier fit of this process may have made the first choice
    grid["grid"] = {"model.init_args.adapter.rank": [2, 40]}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    assert main(["sweep", "grid.yaml", "--json"]) == 1
    out, err = capsys.readouterr()
    assert [cell["status"] for cell in json.loads(out)] == ["recorded", "failed"]
    assert "Traceback" not in err


def test_law_prints_json_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.record_factory import write_run

    for rank in (1, 2, 4, 8):
        for length in (64, 128, 256, 512):
            reduction = 20 * rank**0.5 * length**-0.6 + 0.3
            folder = tmp_path / f"r{rank}-l{length}"
            write_run(folder, rank=rank, target_tokens=length, initial_loss=13.0, final_loss=13.0 - reduction)
    assert main(["law", str(tmp_path), "--json"]) == 0
    out, err = capsys.readouterr()
    assert len(json.loads(out)["observations"]) == 16
    assert err == ""


# Wrong input -------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder of invalid files, beside the working directory."""
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "malformed.jsonl").write_text('{"query": "a", "target": "b"}\n\n{"query": "c", "target"\n')
    (folder / "empty.jsonl").write_text('{"query": "a", "target": "b"}\n{"query": "c", "target": ""}\n')
    (folder / "base.yaml").write_text(
        "trainer: {max_epochs: 1}\nmodel: {class_path: SFT}\ndata: {class_path: RandomTokens}\n"
    )
    (folder / "grid.yaml").write_text("base: base.yaml\nout: cells\ngrid: {trainer.max_epoch: [1]}\n")
    return folder


def memft(threshold: str) -> Callable[[Path, Path], list[str]]:
    weighting = ["--model.weighting=OnlyThreshold", f"--model.weighting.threshold={threshold}"]
    return lambda folder, files: ["fit", *quick(folder), "--model=MemFT", f"--model.backbone={folder}", *weighting]


def fit(*more: str) -> Callable[[Path, Path], list[str]]:
    return lambda folder, files: ["fit", *quick(folder), *more]


def phonebook(name: str) -> Callable[[Path, Path], list[str]]:
    model = ["--model=SFT", "--trainer.accelerator=cpu", "--data=PhoneBook"]
    return lambda folder, files: ["fit", *model, f"--model.backbone={folder}", f"--data.path={files / name}"]


# Most cases are in the table of `test_wrong_input.py`; these need files of their own, or fail elsewhere.
WRONG: dict[str, tuple[Callable[[Path, Path], Sequence[str]], str, str]] = {
    "unknown backbone": (
        fit("--model.backbone=nobody/nothing"),
        "pml fit",
        "'nobody/nothing' is not a folder here",
    ),
    "malformed JSONL": (phonebook("malformed.jsonl"), "pml fit", "malformed.jsonl:3: malformed JSON at column"),
    "empty target": (phonebook("empty.jsonl"), "pml fit", "empty.jsonl:2: the target is empty; expected text"),
    "missing file": (phonebook("none.jsonl"), "pml fit", "none.jsonl: cannot be read (No such file or directory)"),
    "rank above d": (fit("--model.adapter.rank=33"), "pml fit", "adapter.rank is 33; above the width 32"),
    "threshold 1.5": (memft("1.5"), "pml fit", "threshold is 1.5; expected a probability strictly between 0 and 1"),
    "unknown grid key": (lambda folder, files: ["sweep", str(files / "grid.yaml")], "pml sweep", "trainer.max_epoch"),
    "law without a record": (lambda folder, files: ["law", str(files)], "pml law", "no record.json in it or below it"),
    "recall without a record": (lambda folder, files: ["recall", str(files)], "pml recall", "no record.json in it"),
    "unknown option of a command": (
        lambda folder, files: ["law", str(files), "--jsno"],
        "pml law",
        "unrecognized arguments: --jsno",
    ),
    "abbreviated option": (
        lambda folder, files: ["law", str(files), "--js"],
        "pml law",
        "unrecognized arguments: --js",
    ),
}


def check_refused(code: int, err: str, name: str, message: str, cwd: Path) -> None:
    (line,) = err.splitlines()
    assert code == 2
    assert line.startswith(f"{name}: error: ")
    assert message in line
    assert list(cwd.iterdir()) == []


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_gives_a_one_line_error_and_exit_code_2_and_writes_nothing(
    case: str,
    tiny_backbone_folder: Path,
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    # `capfd` also captures what native libraries write to stderr.
    arguments, name, message = WRONG[case]
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    monkeypatch.chdir(cwd)
    code = main(arguments(tiny_backbone_folder, files))
    out, err = capfd.readouterr()
    check_refused(code, err, name, message, cwd)
    assert out == ""


def test_wrong_input_gives_a_one_line_error_in_a_separate_process_too(
    tiny_backbone_folder: Path, files: Path, tmp_path: Path
) -> None:
    arguments, name, message = WRONG["unknown option of a command"]
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    done = pml(*arguments(tiny_backbone_folder, files), cwd=cwd)
    check_refused(done.returncode, done.stderr, name, message, cwd)
    assert done.stdout == ""


def test_a_closed_output_pipe_gives_exit_code_141_and_no_traceback(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as unread:
        command = [sys.executable, "-m", "pml", "--help"]
        done = subprocess.run(
            command, cwd=tmp_path, env=ENVIRONMENT, stdout=unread, stderr=subprocess.PIPE, timeout=120, check=False
        )
    assert (done.returncode, done.stderr) == (141, b"")


def test_an_integer_batch_limit_stays_an_integer_whatever_was_imported_before(monkeypatch: pytest.MonkeyPatch) -> None:
    # typing caches whichever union of int and float was made first; Lightning declares these options as int | float.
    names = ("limit_train_batches", "limit_val_batches", "overfit_batches")
    for name in names:
        monkeypatch.setitem(inspect.unwrap(Trainer.__init__).__annotations__, name, float | int | None)
    batches = ["--trainer.limit_train_batches=1", "--trainer.limit_val_batches=0.5"]
    trainer = parse_run(["--model=SFT", "--data=RandomTokens", *batches]).trainer
    assert [repr(trainer[name]) for name in names] == ["1", "0.5", "0.0"]


def test_a_deleted_cli_leaves_no_reference_to_its_model() -> None:
    prepare()
    made = MemorizationCLI(["--model=SFT", "--data=RandomTokens", "--trainer.accelerator=cpu"], run=False)
    model = weakref.ref(made.model)
    del made
    gc.collect()
    assert model() is None
