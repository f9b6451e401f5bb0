"""Two ranks through the real command fit and validate together, and if one raises, the other does not hang."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pml.cli import main
from pml.records import read_record

ROOT = Path(__file__).resolve().parents[1]

LIMIT_SECONDS = 300
"""Far more than two ranks need (15 s on two idle cores), but less than the 30 minutes at which collectives time out."""

RAISING = """
from lightning.pytorch import Callback


class Raises(Callback):
    def __init__(self, rank: int, hook: str) -> None:
        setattr(self, hook, lambda trainer, *_, **__: self.stop(trainer))
        self.rank = rank

    def stop(self, trainer) -> None:
        if trainer.global_rank == self.rank and trainer.global_step != 1:
            raise RuntimeError(f"rank {self.rank} gives up")
"""


def pml(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a separate process, and fail the test if it takes too long."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "pml", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )


def on_two_ranks(backbone: Path) -> list[str]:
    arguments = ["--model=SFT", f"--model.backbone={backbone}", "--model.adapter.block=2", "--data=PhoneBook"]
    arguments += ["--data.pairs=3", "--trainer.max_epochs=4", "--trainer.accelerator=cpu"]
    return [*arguments, "--trainer.devices=2", "--trainer.strategy=ddp"]


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_that_raises_ends_the_fit_on_all_ranks(rank: int, tiny_backbone_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "raising.py").write_text(RAISING)
    raising = ["--trainer.callbacks+=raising.Raises", f"--trainer.callbacks.rank={rank}"]
    raising += ["--trainer.callbacks.hook=on_train_batch_end", "--own_classes"]
    done = pml(tmp_path, "fit", *on_two_ranks(tiny_backbone_folder), *raising)
    assert done.returncode == 1
    assert f"rank {rank} gives up" in done.stderr
    assert not list(tmp_path.glob("runs/*/*/record.json"))


@pytest.mark.slow
def test_one_process_recalls_a_run_of_two_ranks_and_a_rank_that_raises_ends_validation(
    tiny_backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pml(tmp_path, "fit", *on_two_ranks(tiny_backbone_folder)).returncode == 0
    monkeypatch.chdir(tmp_path)
    run = Path("runs/fit/version_0")
    record = read_record(run / "record.json")
    validated = pml(tmp_path, "validate", str(run))
    assert validated.returncode == 0
    assert "val/exact_match" in validated.stdout
    assert main(["recall", str(run), "--json"]) == 0
    (recalled,) = json.loads(capsys.readouterr().out)
    assert recalled["exact_match"] == record.generated_exact_match
    (tmp_path / "raising.py").write_text(RAISING)
    more = ["--own_classes", "--trainer.callbacks+=raising.Raises", "--trainer.callbacks.rank=1"]
    done = pml(tmp_path, "validate", str(run), *more, "--trainer.callbacks.hook=on_validation_batch_end")
    assert done.returncode == 1
    assert "rank 1 gives up" in done.stderr
