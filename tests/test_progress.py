"""What a fit shows: the time left, a bar in an interactive terminal, and why it ended early."""

import io
import logging
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, Timer
from rich.console import Console
from tiny_runs import Ids, make_trainer, uneven

import pml.progress
from pml.progress import FitProgress, SayWhyItEnded, is_interactive, seconds_left, show_seconds
from tests.fits import module_on


@pytest.mark.parametrize(
    ("steps", "total", "seconds", "time_left", "expected"),
    [
        (10, 40, 5.0, None, 15.0),  # half a second each, 30 to go
        (10, 40, 5.0, 8.0, 8.0),  # max_time comes first
        (10, 40, 5.0, 60.0, 15.0),  # the last step comes first
        (10, None, 5.0, 8.0, 8.0),
        (0, 40, 0.0, None, None),  # no step to extrapolate from
        (10, None, 5.0, None, None),
        (40, 40, 20.0, None, 0.0),
        (10, 40, 5.0, -1.0, 0.0),
    ],
)
def test_time_left_counts_to_the_step_limit_or_max_time_whichever_comes_first(
    steps: int, total: int | None, seconds: float, time_left: float | None, expected: float | None
) -> None:
    assert seconds_left(steps, total, seconds, time_left) == expected


def test_durations_are_shown_in_at_most_two_units() -> None:
    shown = [show_seconds(seconds) for seconds in (0.4, 59.4, 59.6, 75, 3599, 3725, 90000)]
    assert shown == ["0 s", "59 s", "1 min 00 s", "1 min 15 s", "59 min 59 s", "1 h 02 min", "25 h 00 min"]


def test_only_a_capable_terminal_outside_ci_is_interactive(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CI", "TERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.stderr", SimpleNamespace(isatty=lambda: True))
    assert is_interactive()
    monkeypatch.setenv("CI", "true")
    assert not is_interactive()
    monkeypatch.delenv("CI")
    monkeypatch.setenv("TERM", "dumb")
    assert not is_interactive()
    monkeypatch.setattr("sys.stderr", SimpleNamespace(isatty=lambda: False))
    monkeypatch.delenv("TERM")
    assert not is_interactive()


def test_the_bar_covers_the_whole_fit_with_loss_share_of_certain_tokens_and_time_left(
    tiny_backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pml.progress.FitProgress, "seconds_between_looks", 0.0)
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    bar = FitProgress(console)
    words: list[str] = []
    monkeypatch.setattr(bar, "_words", lambda *a: words.append(FitProgress._words(bar, *a)) or words[-1])
    trainer = make_trainer(tmp_path, max_epochs=3, callbacks=[bar], enable_progress_bar=True)
    trainer.fit(module_on(tiny_backbone_folder), datamodule=Ids(uneven(4), batch_size=2))
    assert [line.split(",")[0] for line in words] == ["step 0/6", *(f"step {n}/6" for n in range(1, 7))]
    assert words[-1].startswith("step 6/6, loss ")
    assert words[-1].endswith("% certain, 0 s left")
    assert "epoch" not in console.file.getvalue().lower()  # type: ignore[attr-defined]
    assert bar._bar is None


class Ask(Callback):
    """Requests the end of the fit after its third step."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == 3


class Clock(Timer):
    """A timer that runs out after the third step."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 3:
            self._offset = 3600
            self._check_time_remaining(trainer)


def reasons(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "pml.progress"]


@pytest.mark.parametrize(
    ("callbacks", "said"),
    [
        ([], []),
        ([Ask()], ["stopped after 3 of 12 steps: a callback asked for it"]),
        ([Clock(timedelta(minutes=60))], ["stopped after 3 of 12 steps: its time is over (1 h 00 min)"]),
        (
            [EarlyStopping("train/loss", min_delta=1e9, patience=1, check_on_train_epoch_end=True)],
            ["stopped after 4 of 12 steps: EarlyStopping: Monitored metric train/loss did not improve in the last 1 "],
        ),
        (
            [EarlyStopping("train/loss", stopping_threshold=1e9, check_on_train_epoch_end=True)],
            ["stopped after 2 of 12 steps: EarlyStopping: Stopping threshold reached: train/loss = "],
        ),
    ],
    ids=["its last step", "a callback", "max_time", "EarlyStopping", "its first epoch"],
)
def test_the_reason_a_fit_ended_before_its_last_step_is_logged(
    callbacks: list[Callback],
    said: list[str],
    tiny_backbone_folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "pml")
    trainer = make_trainer(tmp_path, max_epochs=6, callbacks=[SayWhyItEnded(), *callbacks])
    trainer.fit(module_on(tiny_backbone_folder), datamodule=Ids(uneven(4), batch_size=2))
    found = reasons(caplog)
    assert len(found) == len(said)
    assert all(line.startswith(start) for line, start in zip(found, said, strict=True))
