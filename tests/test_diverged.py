"""A fit whose loss became infinite or NaN leaves a record that everything which reads records can handle."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from record_factory import make_record
from simulated_runs import write_diverged_run, write_simulated_grid
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pml.cli import main
from pml.law import observations_from_records, read_law
from pml.law.observations import usable
from pml.records import Record, read_record, read_records
from pml.search import read_search, run_search
from tests import fits  # one thread, which makes runs comparable bit for bit

assert fits.torch.get_num_threads() == 1

RATE = "model.init_args.learning_rate"
# Two steps of this size overflow float32; the backbone's normalisation layers absorb any smaller one.
TOO_HIGH = 1e37
LOST = ("final_loss", "loss_reduction", "min_target_probability", "memorized_bits", "bits_per_parameter")


@pytest.fixture
def write(tiny_backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A function that writes a grid over a base configuration in `tmp_path`, the working directory."""
    monkeypatch.chdir(tmp_path)
    init = {"backbone": str(tiny_backbone_folder), "adapter": {"rank": 16, "block": 2}, "schedule": "constant"}
    base = {
        "model": {"class_path": "SFT", "init_args": init},
        "data": {"class_path": "RandomTokens", "init_args": {"length": 8}},
        "trainer": {
            "max_epochs": 20,
            "accelerator": "cpu",
            "callbacks": [{"class_path": "callbacks.VerbatimRecall"}, {"class_path": "callbacks.RunRecord"}],
        },
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))

    def write(**content: object) -> Path:
        path = tmp_path / "grid.yaml"
        path.write_text(yaml.safe_dump({"base": "base.yaml", "out": "out", **content}, sort_keys=False))
        return path

    return write


def without_a_loss(folder: Path) -> Record:
    """The record of a run that diverged, from a file that is strict JSON without NaN or Infinity."""
    content = json.loads((folder / "record.json").read_text(), parse_constant=pytest.fail)
    assert content["status"] == "diverged"
    assert [content[name] for name in (*LOST, "late_loss_drop", "extraction_probability")] == [None] * 7
    return read_record(folder / "record.json")


def test_a_diverged_fit_warns_and_leaves_its_record_adapter_and_curves(
    write: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write()
    with caplog.at_level("WARNING", logger="callbacks"):
        assert main(["fit", "--config=base.yaml", f"--{RATE}={TOO_HIGH}", "--trainer.logger.name=lost"]) == 0
    folder = tmp_path / "runs" / "lost" / "version_0"
    record = without_a_loss(folder)
    assert (record.optimizer_steps, record.steps_to_recall) == (20, None)
    assert record.initial_loss is not None
    assert record.initial_loss > 1
    # No token counts as certain.
    assert (record.sub_threshold_fraction, record.exact_match) == (1.0, 0.0)
    assert all(map(math.isnan, pq.read_table(folder / "tokens.parquet")["loss"].to_pylist()))
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    first, *_, last = EventAccumulator(str(folder)).Reload().Scalars("val/loss")
    assert first.value == pytest.approx(record.initial_loss)
    assert math.isnan(last.value)
    (said,) = [message for message in caplog.messages if message.startswith("diverged: ")]
    assert "lower the learning rate of 1e+37" in said


def test_a_sweep_names_a_diverged_cell_and_counts_it_as_done_and_recall_leaves_it_out(
    write: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    grid = write(grid={RATE: [0.05, TOO_HIGH]})
    assert main(["sweep", str(grid), "--json"]) == 0
    out, err = capsys.readouterr()
    cells = json.loads(out)
    assert [cell["status"] for cell in cells] == ["finished", "diverged"]
    assert f"[2/2] {cells[1]['name']}: DIVERGED, 20 steps" in err
    kept = without_a_loss(Path(cells[1]["folder"]))

    def said(err: str) -> str:
        # The fit itself warns too, in a separate line, the first time in a process.
        (line,) = [line for line in err.splitlines() if line.startswith(f"diverged: {cells[1]['name']}: ")]
        return line

    assert said(err).startswith(f"diverged: {cells[1]['name']}: its loss is not a finite number; a lower learning rate")
    assert main(["sweep", str(grid)]) == 0
    captured = capsys.readouterr()
    assert "2 cells, 2 recorded before, 0 to run" in captured.err
    assert said(captured.err) == said(err)
    assert "(diverged)" in captured.out
    assert main(["sweep", str(grid), "--status", "--json"]) == 0
    out, listed = capsys.readouterr()
    assert [cell["status"] for cell in json.loads(out)] == ["recorded", "diverged"]
    assert listed == ""
    assert read_record(Path(cells[1]["folder"]) / "record.json") == kept
    assert [path.name for path in Path("out").iterdir() if "unfinished" in path.name] == []
    sound, lost = (cell["folder"] for cell in cells)
    assert main(["recall", "out", "--json"]) == 0
    out, err = capsys.readouterr()
    assert [result["run"] for result in json.loads(out)] == [sound]
    assert err.count("note: ") == 1
    assert f"note: {lost} diverged: " in err
    assert main(["recall", lost]) == 2
    assert "diverged, so it recalls nothing" in capsys.readouterr().err


def test_a_search_ranks_a_diverged_candidate_last(write: Callable[..., Path]) -> None:
    grid = write(grid={"seed_everything": [1]}, search={RATE: [TOO_HIGH, 1e-9]}, epochs=[3, 5])
    (choice,) = run_search(read_search(grid))
    best, worst = choice.candidates
    assert choice.chosen == best.settings == {RATE: 1e-9}
    assert (worst.settings, worst.final_loss) == ({RATE: TOO_HIGH}, {3: None})
    (cell,) = json.loads(Path("out/search.json").read_text(), parse_constant=pytest.fail)["cells"]
    assert cell["candidates"][1]["final_loss"] == {"3": None}


def test_a_search_in_which_every_candidate_diverges_chooses_none(
    write: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    grid = write(grid={"seed_everything": [1]}, search={RATE: [TOO_HIGH, 2 * TOO_HIGH]}, epochs=[3, 5])
    assert main(["search", str(grid)]) == 1
    assert 'diverged: {"seed_everything": 1}: every candidate ended with a loss that' in capsys.readouterr().err
    (cell,) = json.loads(Path("out/search.json").read_text())["cells"]
    assert (cell["chosen"], cell["at_the_edge"]) == (None, [])


@pytest.mark.parametrize("status", ["diverged", "interrupted"])
def test_a_law_leaves_out_a_run_without_a_finite_loss_as_diverged(status: str) -> None:
    cells = observations_from_records(
        {Path("a"): make_record(final_loss=None, status=status), Path("b"): make_record()}
    )
    assert cells[0].stored_bits is None
    sound, (left_out,) = usable(cells)
    assert [cell.source for cell in sound] == ["b"]
    assert (left_out.source, left_out.reason) == ("a", "diverged")


def test_the_law_command_names_the_diverged_run_and_still_fits_a_recall_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_simulated_grid(tmp_path / "runs", seeds=(0,))
    write_diverged_run(tmp_path / "runs" / "lost", 4, 128, seed=5)
    assert main(["law", str(tmp_path / "runs"), "--details", "--out", str(tmp_path / "law")]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"left out: 1 diverged", printed)
    assert "From loss to recall" in printed
    (lost,) = [cell for cell in read_law(tmp_path / "law" / "law.json").left_out if cell.source.endswith("lost")]
    assert lost.reason == "diverged"


def test_the_compare_command_leaves_out_the_diverged_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_simulated_grid(tmp_path, ranks=(1, 2), lengths=(64,), methods=("sft", "memft"))
    lost = tmp_path / "sft-rank-2-length-64-seed-1"
    write_diverged_run(lost, 2, 64, seed=1)
    assert len(read_records([tmp_path])) == 8
    assert main(["compare", str(tmp_path), "--json"]) == 0
    (content,) = json.loads(capsys.readouterr().out)
    assert {found["pairs"] for found in content["differences"]} == {3}
    assert {"runs": [lost.as_posix()], "reason": "diverged"} in content["left_out"]
