"""The benchmark measures what it reports, on a tiny backbone; speed itself is never tested."""

import io
import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from pml.adapter import AdapterConfig
from pml.backbone import Backbone
from pml.bench.fits import FitCost, _fit, measure_recall
from pml.bench.steps import Case, _Stepper, step_flops
from pml.cli import main
from pml.commands.bench import _fits_table
from pml.corpus import Corpus, Example
from pml.weighting import OnlyThreshold, Uniform, WholeTargets


def test_the_flops_of_a_step_match_a_count_by_hand(tiny_backbone: Backbone) -> None:
    # One block above block 2 of 4; per block q, o: 32 x 32, k, v: 32 x 16, gate, up, down: 32 x 64; head: 259 x 32.
    weights = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64
    corpus = Corpus("two", [Example(0, (1, 2, 3), (4, 5)), Example(1, (1,), (2,))])
    tokens, targets = 4 + 1, 2 + 1
    attention = (4**2 + 1**2) * 32
    # Attention has two products forward and four backward; everything else has as many backward as forward.
    expected = 2 * 2 * (weights * tokens + 259 * 32 * targets) + 3 * (2 * attention)
    assert step_flops(tiny_backbone, corpus, AdapterConfig(block=2)) == expected
    # The other two also run the three blocks up to the adapter forward; the ordinary one runs the head on all tokens.
    below = 3 * (2 * weights * tokens + 2 * attention)
    assert step_flops(tiny_backbone, corpus, AdapterConfig(block=2), "whole") == expected + below
    longer = 2 * 2 * 259 * 32 * (tokens - targets)
    assert step_flops(tiny_backbone, corpus, AdapterConfig(block=2), "ordinary") == expected + below + longer


def test_bench_measures_every_way_of_stepping_on_every_case(
    tiny_backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # `conftest.py` preloads the fork server, which makes starting processes fast.
    forked = multiprocessing.get_context("forkserver")
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: forked)
    out = tmp_path / "bench.json"
    arguments = ["--backbone", str(tiny_backbone_folder), "--targets", "8", "--pairs", "2", "--dtypes", "float32"]
    arguments += ["--repeats", "2", "--steps", "1", "--recall", "0", "--fit_steps", "5"]
    assert main(["bench", *arguments, "--out", str(out), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content == json.loads(out.read_text())
    cases = [(m["case"]["corpus"], m["case"]["size"], m["way"], m["cut"]) for m in content["steps"]]
    assert cases == [
        (corpus, size, way, cut)
        for corpus, size in (("random_tokens", 8), ("phonebook", 2))
        for way, cut in (("ordinary", "whole"), ("whole", "whole"), ("split", "after_block"))
    ]
    for m in content["steps"]:
        assert 0 < m["fastest_seconds"] <= m["step_seconds"] <= m["slowest_seconds"]
        assert m["gflop"] > 0
    # Each batch also runs through the Trainer, and watching takes a share of that time.
    assert [(fit["case"]["size"], fit["steps"]) for fit in content["fits"]] == [(8, 5), (2, 5)]
    for fit in content["fits"]:
        assert min(fit["bare_seconds"], fit["trainer_seconds"], fit["watched_seconds"]) > 0
        assert 0 < fit["watching_share"] < 1
    assert content["matmul_gflop_per_second"]["float32"] > 0


def test_an_epoch_of_a_timed_fit_is_one_step_on_the_whole_batch(tiny_backbone_folder: Path, tmp_path: Path) -> None:
    case = Case("phonebook", 9, "float32", str(tiny_backbone_folder))  # more pairs than a default batch holds
    _, module, batch = _fit(case, [], str(tmp_path), steps=2)
    assert (module.trainer.global_step, len(batch["lengths"])) == (2, 9)
    module.release()


def test_all_ways_of_stepping_have_the_same_loss_after_the_warm_up_steps(tiny_backbone_folder: Path) -> None:
    case = Case("phonebook", 3, "float32", str(tiny_backbone_folder))
    ends = {}
    for way in ("ordinary", "whole", "split"):
        stepper = _Stepper(way, case)
        loss = stepper._loss()
        ends[way] = loss.detach()
        stepper.close()
    # Each has taken the same warm-up steps, which AdamW makes larger than the rounding of the gradients.
    torch.testing.assert_close(ends["ordinary"], ends["split"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ends["whole"], ends["split"], rtol=1e-4, atol=1e-4)


def test_recall_is_measured_with_the_published_and_with_the_best_settings(
    tiny_backbone_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    monkeypatch.setattr(
        "callbacks.StopWhenRecalled.on_fit_start",
        lambda _, trainer, module: made.append((module.learning_rate, module.adapter.dropout, module.weighting)),
        raising=False,
    )
    runs = measure_recall(str(tiny_backbone_folder), 4, rank=2, most_steps=3)
    assert made == [
        (0.01, 0.1, Uniform()),
        (0.01, 0.1, OnlyThreshold(threshold=0.5, when_memorized="uniform")),
        (0.2, 0.0, Uniform()),
        (0.2, 0.0, WholeTargets()),
    ]
    assert [(run.settings, run.method) for run in runs] == [
        ("published", "SFT"),
        ("published", "MemFT"),
        ("best", "SFT"),
        ("best", "MemFT"),
    ]
    assert all(1 <= run.steps <= 3 and run.seconds > 0 for run in runs)
    assert not any(run.recalled for run in runs)


def test_the_table_of_fits_shows_the_cost_of_the_trainer_and_the_share_of_watching() -> None:
    case = Case("phonebook", 3, "float32", "tiny", matmul_precision="medium")
    printed = io.StringIO()
    console = Console(width=80, file=printed)
    console.print(_fits_table([FitCost(case, 0.1, 0.125, 0.13, 0.021, steps=50)]))
    row = "medium 3 pairs 0.1000 0.1250 25.0% 0.1300 2.1%"
    assert row in [" ".join(line.split()) for line in printed.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats", "0"], "--repeats is 0; expected at least 1"),
        (["--matmul_precision", "low"], "matmul_precision is 'low'; expected highest, high, medium"),
        (["--fit_steps", "2"], "--fit_steps is 2; expected at least 3, or 0 for none"),
        (["--targets", "0"], "--targets and --pairs take numbers of at least 1"),
        (["--dtypes", "int8"], "--dtypes has int8; expected float32, bfloat16, float16"),
    ],
)
def test_invalid_arguments_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    assert capsys.readouterr().err == f"pml bench: error: {message}\n"
