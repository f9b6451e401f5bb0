"""The settings with which the loggers of a resumed fit continue those of its run."""

import inspect
from pathlib import Path

import pytest
from lightning.pytorch import loggers

from pml.records import write_record
from pml.same_folder import GO_ON_BY, logger_settings, run_to_go_on_in
from tests.record_factory import make_record

CHECKPOINT = {
    "global_step": 7,
    "pml_loggers": [
        {"class": "TensorBoardLogger", "folder": ".", "version": "0"},
        {"class": "CSVLogger", "folder": "../../rows/version_3", "version": "3"},
        {"class": "WandbLogger", "folder": "", "version": "k2j3h4"},
        {"class": "MLFlowLogger", "folder": "", "version": "abc"},
    ],
}


def test_each_logger_resumes_where_it_stopped() -> None:
    asked = [
        {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {"save_dir": "runs", "name": "fit"}},
        {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "runs"}},
        {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": {"project": "law"}},
        {"class_path": "mine.Logger"},
    ]
    board, rows, weights_and_biases, mine = logger_settings(asked, Path("runs/fit/version_2"), CHECKPOINT)
    assert board["init_args"] == {"save_dir": "runs/fit", "name": "version_2", "version": ""}
    assert board["dict_kwargs"] == {"purge_step": 8}
    assert rows["init_args"] == {"save_dir": "runs/rows", "name": "version_3", "version": ""}
    assert weights_and_biases["init_args"] == {"project": "law", "version": "k2j3h4"}
    assert mine["init_args"] == {}


@pytest.mark.parametrize("folder", ["/etc/cron.d", "../../../../elsewhere", "../version_1"])
def test_a_checkpoint_cannot_make_a_logger_write_outside_its_run(folder: str, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = {"global_step": 7, "pml_loggers": [{"class": "TensorBoardLogger", "folder": folder, "version": "0"}]}
    found = logger_settings(True, Path("runs/fit/version_2"), checkpoint)
    assert found["init_args"] == {"save_dir": "runs/fit", "name": "version_2", "version": ""}
    assert "outside of its run; it goes on in runs/fit/version_2" in caplog.text


@pytest.mark.parametrize("asked", [False, None])
def test_a_logger_setting_of_false_or_none_is_kept(asked: bool | None) -> None:
    assert logger_settings(asked, Path("run"), CHECKPOINT) is asked


@pytest.mark.parametrize("name", GO_ON_BY)
def test_loggers_accept_the_argument_by_which_they_resume(name: str) -> None:
    assert GO_ON_BY[name] in inspect.signature(getattr(loggers, name).__init__).parameters


def test_a_fit_resumes_in_the_folder_of_its_run_only_if_that_run_is_unfinished(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    assert run_to_go_on_in(checkpoint) == tmp_path
    write_record(tmp_path, make_record(status="interrupted"))
    assert run_to_go_on_in(checkpoint) == tmp_path
    write_record(tmp_path, make_record())
    assert run_to_go_on_in(checkpoint) is None
    assert run_to_go_on_in(tmp_path / "elsewhere.ckpt") is None
