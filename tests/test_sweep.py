"""Grids of runs are checked before anything runs, and resumed; each cell runs exactly as it would alone."""

import errno
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import pml.backbone
import pml.states_below
from pml.backbone import Backbone
from pml.cli import main
from pml.errors import InputError
from pml.grid import Cell, _label, expand, read_grid, resolve
from pml.lightning_cli import parse_run
from pml.records import read_record
from pml.sweep import claims_of, run_cells
from tests import fits  # one thread, which makes runs comparable bit for bit

assert fits.torch.get_num_threads() == 1


@pytest.fixture
def base(tiny_backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes `base.yaml`: two epochs on eight random tokens, with no measures beyond those of the record.

    The working directory is `tmp_path`.
    """
    monkeypatch.chdir(tmp_path)

    def write(**model: Any) -> Path:
        init = {"backbone": str(tiny_backbone_folder), "adapter": {"rank": 2, "block": 1}, **model}
        content = {
            "model": {"class_path": "MemFT", "init_args": init},
            "data": {"class_path": "RandomTokens", "init_args": {"length": 8}},
            "trainer": {"max_epochs": 2, "accelerator": "cpu", "callbacks": [{"class_path": "callbacks.RunRecord"}]},
        }
        path = tmp_path / "base.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    write()
    return write


def write_grid(tmp_path: Path, grid: Any, **more: Any) -> Path:
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump({"base": "base.yaml", "out": "out", "grid": grid, **more}, sort_keys=False))
    return path


def cells_of(tmp_path: Path, grid: Any) -> list[Cell]:
    return resolve(read_grid(write_grid(tmp_path, grid)))


RANKS = {"model.init_args.adapter.rank": [1, 3]}


# Expanding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        ([{"a": [1]}], [{"a": 1}]),
        ([{"a": [1, 2], "b": [3, 4]}], [{"a": 1, "b": 3}, {"a": 1, "b": 4}, {"a": 2, "b": 3}, {"a": 2, "b": 4}]),
        ([{"a": [1]}, {"a": [2], "b": [5, 6]}], [{"a": 1}, {"a": 2, "b": 5}, {"a": 2, "b": 6}]),
        ([{"a": [[1, 2], None]}], [{"a": [1, 2]}, {"a": None}]),
        ([{}], [{}]),
    ],
)
def test_a_grid_expands_to_every_combination_of_values_within_each_part(grid: list[Any], expected: list[Any]) -> None:
    assert expand(grid) == expected


def test_cells_are_named_by_the_settings_that_vary_and_have_folders_below_out(
    base: Callable[..., Path], tmp_path: Path
) -> None:
    cells = cells_of(tmp_path, {**RANKS, "seed_everything": [7], "data.init_args.length": [4, 8]})
    labels = [cell.name.rpartition("-")[0] for cell in cells]
    assert labels == ["rank=1,length=4", "rank=1,length=8", "rank=3,length=4", "rank=3,length=8"]
    assert [cell.folder for cell in cells] == [Path("out") / cell.name for cell in cells]
    assert not Path("out").exists()


def test_a_cell_takes_one_device_even_on_a_machine_with_several_gpus(base: Callable[..., Path], tmp_path: Path) -> None:
    # Left to itself, Lightning would start the whole sweep once more for every further GPU.
    whatever, third = cells_of(tmp_path, {"trainer.devices": ["auto", [2]]})
    assert [parse_run(cell.arguments).trainer.devices for cell in (whatever, third)] == ["1", [2]]


def test_a_label_keeps_a_whole_path_but_only_the_last_part_of_a_class_name() -> None:
    keys = {"data.path": "texts/of.facts.jsonl", "model": "pml.modules.MemFT", "data.ratio": 0.5, "data.query": "a.txt"}
    assert _label(keys, list(keys)) == "path=texts_of.facts.jsonl,model=MemFT,ratio=0.5,query=a.txt"


def test_cell_names_are_stable_but_change_with_the_base_configuration(
    base: Callable[..., Path], tmp_path: Path
) -> None:
    first = [cell.name for cell in cells_of(tmp_path, RANKS)]
    assert [cell.name for cell in cells_of(tmp_path, RANKS)] == first
    assert len(set(first)) == 2
    base(learning_rate=0.123)
    changed = [cell.name for cell in cells_of(tmp_path, RANKS)]
    assert not set(changed) & set(first)
    assert [name[:7] for name in changed] == [name[:7] for name in first]


def test_a_cell_keeps_its_hash_in_a_larger_grid(base: Callable[..., Path], tmp_path: Path) -> None:
    small = {cell.name[-8:] for cell in cells_of(tmp_path, {**RANKS, "seed_everything": [7]})}
    large = {cell.name[-8:] for cell in cells_of(tmp_path, {**RANKS, "seed_everything": [7, 8]})}
    assert small < large


def test_a_cell_that_has_a_folder_keeps_it_when_the_grid_grows(base: Callable[..., Path], tmp_path: Path) -> None:
    one = {"model.init_args.adapter.rank": [1], "seed_everything": [7]}
    (alone,) = cells_of(tmp_path, one)
    assert "=" not in alone.name
    alone.folder.mkdir(parents=True)
    # A folder that was moved aside is not a cell's.
    Path(f"{alone.folder}.unfinished-1").mkdir()
    first, second = cells_of(tmp_path, {**RANKS, "seed_everything": [7]})
    assert (first, second.name[:7]) == (alone, "rank=3-")
    second.folder.mkdir()
    grown = cells_of(tmp_path, {**RANKS, "seed_everything": [7, 8]})
    assert grown[::2] == [first, second]
    assert [cell.name[:24] for cell in grown[1::2]] == ["rank=1,seed_everything=8", "rank=3,seed_everything=8"]


def test_classes_and_lists_as_grid_values_reach_the_configuration(base: Callable[..., Path], tmp_path: Path) -> None:
    grid = {
        "model.init_args.weighting": [
            {"class_path": "pml.weighting.SlidingWindow", "init_args": {"window": 4}},
            {"class_path": "pml.weighting.OnlyThreshold"},
        ],
        "model.init_args.adapter.placement": [["down_proj", "up_proj"]],
    }
    cells = cells_of(tmp_path, grid)
    assert [cell.name.rpartition("-")[0] for cell in cells] == ["weighting=SlidingWindow", "weighting=OnlyThreshold"]
    outcomes = run_cells(cells, lambda outcome: None)
    settings = [outcome.record.method_settings["weighting"] for outcome in outcomes if outcome.record]
    assert [s["class_path"] for s in settings] == ["pml.weighting.SlidingWindow", "pml.weighting.OnlyThreshold"]
    assert settings[0]["init_args"]["window"] == 4
    assert outcomes[0].record is not None
    assert outcomes[0].record.placement == ["down_proj", "up_proj"]


# Invalid grids -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("out: out\ngrid: {a: [1]}\n", r"base: Field required; the file has the keys `base`, `out`, `grid`"),
        ("base: base.yaml\ngrid: {a: [1]}\n", r"grid\.yaml: out: Field required"),
        ("base: base.yaml\nout: out\n", r"grid\.yaml: grid: Field required"),
        ("base: base.yaml\nout: out\ngrid: {a: [1]}\ngird: {}\n", r"grid\.yaml: gird: Extra inputs are not permitted"),
        ("base: base.yaml\nout: out\ngrid: {a: []}\n", r"grid\.yaml: grid key a has no values"),
        ("base: base.yaml\nout: out\ngrid: {a: 1}\n", r"grid\.yaml: grid\.0\.a: Input should be a valid list"),
        ("base: base.yaml\nout: out\ngrid: []\n", r"grid\.yaml: grid: List should have at least 1 item"),
        ("base: []\nout: out\ngrid: {a: [1]}\n", r"grid\.yaml: base: List should have at least 1 item"),
        ("base: [unclosed\n", r"grid\.yaml:2: not YAML: "),
        ("just words\n", r"grid\.yaml: expected keys with values"),
        ("", r"grid\.yaml: base: Field required"),
        ("base: nowhere.yaml\nout: out\ngrid: {a: [1]}\n", r"grid\.yaml: base .*nowhere\.yaml: no such file"),
    ],
)
def test_an_invalid_grid_file_is_refused_with_the_file_and_the_key(
    content: str, message: str, base: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "grid.yaml").write_text(content)
    with pytest.raises(InputError, match=message):
        read_grid(tmp_path / "grid.yaml")


def test_environment_variables_and_the_home_folder_are_expanded_in_the_folder_of_a_grid(
    base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    grid = {"model.init_args.adapter.rank": [1]}
    for out, expected in (("$SCRATCH/runs", "scratch/runs"), ("~/runs", "home/runs")):
        assert read_grid(write_grid(tmp_path, grid, out=out)).out == tmp_path / expected


def test_dates_in_a_grid_are_read_as_text(base: Callable[..., Path], tmp_path: Path) -> None:
    Path("grid.yaml").write_text("base: base.yaml\nout: out\ngrid: {data.template_date: [2024-01-05, 2025-06-07]}\n")
    assert [cell.name.rpartition("-")[0] for cell in resolve(read_grid(Path("grid.yaml")))] == [
        "template_date=2024-01-05",
        "template_date=2025-06-07",
    ]


def test_single_template_variables_are_merged_with_those_of_the_base(base: Callable[..., Path], tmp_path: Path) -> None:
    content = yaml.safe_load(Path("base.yaml").read_text())
    content["data"]["init_args"]["template_kwargs"] = {"day": "off"}
    Path("base.yaml").write_text(yaml.safe_dump(content))
    key = "data.init_args.template_kwargs"
    cells = resolve(read_grid(write_grid(tmp_path, {f"{key}.thinking": [True, False], f"{key}.level": ["007"]})))
    given = [json.loads(next(a for a in cell.arguments if key in a).partition("=")[2]) for cell in cells]
    assert given == [{"day": "off", "thinking": on, "level": "007"} for on in (True, False)]


def test_template_variables_are_merged_with_a_base_that_only_the_cell_completes(
    base: Callable[..., Path], tmp_path: Path
) -> None:
    content = yaml.safe_load(Path("base.yaml").read_text())
    model, content["data"]["init_args"]["template_kwargs"] = content.pop("model"), {"day": "off"}
    Path("base.yaml").write_text(yaml.safe_dump(content))
    grid = {"model": [model], "data.init_args.template_kwargs.thinking": [True]}
    (cell,) = resolve(read_grid(write_grid(tmp_path, grid)))
    (given,) = (a.partition("=")[2] for a in cell.arguments if a.startswith("--data.init_args.template_kwargs="))
    assert json.loads(given) == {"day": "off", "thinking": True}


def test_dates_within_template_variables_are_read_as_text(base: Callable[..., Path], tmp_path: Path) -> None:
    grid = "base: base.yaml\nout: out\ngrid: {data.init_args.template_kwargs: [{days: [2024-01-05]}]}\n"
    Path("grid.yaml").write_text(grid)
    assert read_grid(Path("grid.yaml")).grid[0]["data.init_args.template_kwargs"] == [{"days": ["2024-01-05"]}]


def test_a_cell_name_from_long_text_of_any_script_is_a_valid_file_name(
    base: Callable[..., Path], tmp_path: Path
) -> None:
    grid = {"data.init_args.prompt": ["\u8bf7" * 200, "# \u8bf7: \u4e00"]}
    cells = resolve(read_grid(write_grid(tmp_path, grid)))
    assert all(len(cell.name.encode()) < 140 for cell in cells)
    assert cells[1].name.startswith("prompt=_\u8bf7_\u4e00-")


def test_a_missing_grid_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.yaml: cannot be read \(No such file or directory\)"):
        read_grid(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"model.init_args.adapter.rnak": [2]}, "cell rnak=2: .*rnak"),
        ({"trainer.max_epoch": [2]}, "cell max_epoch=2: .*max_epoch"),
        ({"nothing": [2]}, "cell nothing=2: .*nothing"),
        ({"trainer.max_epochs": ["many"]}, "cell max_epochs=many: .*max_epochs"),
        ({"model.init_args.adapter.rank": [2, 0]}, r"cell rank=0: adapter\.rank is 0; expected at least 1"),
        ({"data.init_args.length": [0]}, "cell length=0: length is 0; expected at least 1 token per target"),
        # Values that would become other text, as an argument of a command.
        ({"data.init_args.prompt": [1.10]}, "data.init_args.prompt: 1.1 would become '1.1'; expected text in quotes"),
        ({"data.init_args.prompt": [True]}, "data.init_args.prompt: True would become 'true'; expected text in quotes"),
        (
            {"trainer.callbacks": [[]]},
            r"trainer.callbacks has no callbacks.RunRecord, so the cell would leave no record",
        ),
        (
            {"trainer.callbacks": [[{"class_path": "callbacks.RunRecord", "init_args": {"dirpath": "here"}}]]},
            "RunRecord has dirpath here; expected none, since each cell has a folder of its own",
        ),
        ({"trainer.devices": [2]}, "trainer.devices is 2, num_nodes 1; expected one device for each cell"),
        ({"trainer.devices": [[0, 1]]}, r"trainer.devices is \[0, 1\], num_nodes 1; expected one device for each cell"),
        ({"trainer.devices": ["-1"]}, "trainer.devices is -1, num_nodes 1; expected one device for each cell"),
        ({"trainer.num_nodes": [2]}, "trainer.devices is auto, num_nodes 2; expected one device for each cell"),
        ({"model.init_args.adapter.rank": [2, 2]}, "the grid has the same cell twice: .*; write each combination once"),
    ],
)
def test_an_invalid_cell_is_refused_by_name_before_anything_runs(
    grid: dict[str, list[Any]], message: str, base: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        cells_of(tmp_path, grid)
    assert not Path("out").exists()


# Running -----------------------------------------------------------------------------------------------------------


def run(path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, list[dict[str, Any]], str]:
    code = main(["sweep", str(path), "--json", *options])
    out, err = capsys.readouterr()
    return code, json.loads(out), err


def test_a_finished_cell_is_reported_leaves_a_whole_run_folder_and_is_not_run_again(
    base: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = write_grid(tmp_path, RANKS)
    code, cells, err = run(grid, capsys)
    assert (code, [cell["status"] for cell in cells]) == (0, ["finished", "finished"])
    assert "2 cells, 0 recorded before, 2 to run" in err
    lines = [line for line in err.splitlines() if line.startswith("[")]
    assert lines[0].startswith(f"[1/2] {cells[0]['name']}: loss ")
    assert " left" in lines[0]
    assert lines[1].startswith(f"[2/2] {cells[1]['name']}: loss ")
    assert " left" not in lines[1]
    for cell in cells:
        names = {path.name for path in Path(cell["folder"]).iterdir()}
        assert {"record.json", "tokens.parquet", "adapter", "config.yaml"} <= names
        assert any(name.startswith("events.out.tfevents") for name in names)
    records = {cell["folder"]: (Path(cell["folder"]) / "record.json").read_bytes() for cell in cells}
    code, again, err = run(grid, capsys)
    assert (code, [cell["status"] for cell in again]) == (0, ["recorded", "recorded"])
    assert "2 cells, 2 recorded before, 0 to run" in err
    assert {folder: (Path(folder) / "record.json").read_bytes() for folder in records} == records
    write_grid(tmp_path, {"model.init_args.adapter.rank": [1, 3, 5]})
    code, more, _ = run(grid, capsys)
    assert (code, [cell["status"] for cell in more]) == (0, ["recorded", "recorded", "finished"])


def test_the_status_option_lists_cells_and_runs_nothing(
    base: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = write_grid(tmp_path, RANKS)
    code, cells, _ = run(grid, capsys, "--status")
    assert (code, [cell["status"] for cell in cells]) == (0, ["to run", "to run"])
    assert not Path("out").exists()


def test_files_of_an_unfinished_attempt_are_moved_aside(base: Callable[..., Path], tmp_path: Path) -> None:
    (cell,) = cells_of(tmp_path, {"model.init_args.adapter.rank": [1]})
    for text in ("first", "second"):
        cell.folder.mkdir(parents=True)
        (cell.folder / "leftover.txt").write_text(text)
        (outcome,) = run_cells([cell], lambda outcome: None)
        assert outcome.record is not None
        assert not (cell.folder / "leftover.txt").exists()
        (cell.folder / "record.json").unlink()
        for path in sorted(cell.folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        cell.folder.rmdir()
    aside = [Path(f"{cell.folder}.unfinished-{n}") / "leftover.txt" for n in (1, 2)]
    assert [path.read_text() for path in aside] == ["first", "second"]


def test_an_interrupted_cell_without_a_checkpoint_is_run_again_from_the_start(
    base: Callable[..., Path], tmp_path: Path
) -> None:
    (cell,) = cells_of(tmp_path, {"model.init_args.adapter.rank": [1]})
    run_cells([cell], lambda outcome: None)
    path = cell.folder / "record.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "status": "interrupted"}))
    shutil.rmtree(cell.folder / "checkpoints")
    (outcome,) = run_cells([cell], lambda outcome: None)
    assert not outcome.skipped
    assert read_record(path).status == "finished"
    assert (Path(f"{cell.folder}.unfinished-1") / "record.json").is_file()


def test_a_cell_whose_record_was_deleted_is_run_again(
    base: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = write_grid(tmp_path, {"model.init_args.adapter.rank": [1]})
    _, (cell,), _ = run(grid, capsys)
    record = Path(cell["folder"], "record.json")
    record.unlink()
    code, (again,), _ = run(grid, capsys)
    assert (code, again["status"], read_record(record).status) == (0, "finished", "finished")
    assert Path(f"{cell['folder']}.unfinished-1").is_dir()


def test_a_sweep_says_once_which_claim_it_waits_for(
    base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (cell,) = cells_of(tmp_path, {"model.init_args.adapter.rank": [1]})
    other, looks = claims_of([cell]), itertools.count(1)
    assert other.take(cell.name)
    monkeypatch.setattr("pml.sweep.time.sleep", lambda _: other.release(cell.name) if next(looks) == 3 else None)
    caplog.set_level("INFO")
    (outcome,) = run_cells([cell], lambda outcome: None)
    assert outcome.status == "finished"
    (said,) = [message for message in caplog.messages if message.startswith("waiting for")]
    assert said.startswith(f"waiting for {cell.name}, claimed by ")
    assert said.endswith(f", process {os.getpid()} (out/.claims/{cell.name}.lock)")


def test_a_cell_that_another_host_has_finished_is_not_run_again_though_nfs_remembers_no_record(
    base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cell,) = cells_of(tmp_path, {"model.init_args.adapter.rank": [1]})
    run_cells([cell], lambda outcome: None)
    record = (cell.folder / "record.json").resolve()
    # The client answers from memory until the folder is opened.
    remembered, exists, listdir = {record}, Path.exists, os.listdir
    monkeypatch.setattr(Path, "exists", lambda path: path.resolve() not in remembered and exists(path))

    def opened(folder: Any = ".") -> list[str]:
        remembered.discard(Path(folder).resolve() / "record.json")
        return listdir(folder)

    monkeypatch.setattr(os, "listdir", opened)
    (outcome,) = run_cells([cell], lambda outcome: None)
    assert outcome.record == read_record(record)
    assert not list(Path("out").glob("*.unfinished-*"))


def test_a_cell_whose_error_was_moved_aside_while_it_was_read_has_none(
    base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cell,) = cells_of(tmp_path, {"model.init_args.adapter.rank": [1]})

    def stale(*_: Any, **__: Any) -> str:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Path, "read_text", stale)
    assert cell.error is None


def test_an_error_after_the_run_has_ended_leaves_a_finished_cell(
    base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def teardown(*_: Any, **__: Any) -> None:
        raise RuntimeError("no network")

    monkeypatch.setattr("callbacks.RunRecord.teardown", teardown)
    grid = write_grid(tmp_path, {"model.init_args.adapter.rank": [1]})
    code, (cell,), err = run(grid, capsys)
    assert (code, cell["status"]) == (0, "finished")
    assert not Path(cell["folder"], "error.txt").exists()
    assert "an error after the run had ended: RuntimeError: no network" in err
    code, (again,), _ = run(grid, capsys, "--status")
    assert again["status"] == "recorded"


def test_a_cell_that_fails_with_a_name_that_is_not_text_leaves_its_error(
    base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("caf\udce9.txt")

    monkeypatch.setattr("callbacks.RunRecord.on_train_epoch_start", fails)
    code, (cell,), _ = run(write_grid(tmp_path, {"model.init_args.adapter.rank": [1]}), capsys)
    assert (code, cell["status"]) == (1, "failed")
    assert r"RuntimeError: caf\udce9.txt" in Path(cell["folder"], "error.txt").read_text()


def test_a_failed_cell_leaves_its_error_and_the_others_finish(
    base: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # That rank 40 exceeds the backbone's width of 32 is found only when the backbone is loaded.
    code, cells, err = run(write_grid(tmp_path, {"model.init_args.adapter.rank": [1, 40, 3]}), capsys)
    assert (code, [cell["status"] for cell in cells]) == (1, ["finished", "failed", "finished"])
    assert "adapter.rank is 40; above the width 32" in cells[1]["error"]
    text = (Path(cells[1]["folder"]) / "error.txt").read_text()
    assert "Traceback" in text
    assert "adapter.rank is 40" in text
    (said,) = [line for line in err.splitlines() if line.startswith("failed: ")]
    assert f"{cells[1]['name']}: InputError: adapter.rank is 40" in said
    assert said.endswith("error.txt; --retry_failed runs it again)")


def test_the_backbone_is_loaded_once_and_each_corpus_runs_through_the_frozen_layers_once(
    base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    captured: list[tuple[int, ...]] = []
    load, capture = pml.backbone._load_model, pml.states_below.states_below

    def loading(name: str, *rest: Any) -> Any:
        loaded.append(name)
        return load(name, *rest)

    def capturing(backbone: Backbone, block: int, mlp: Any, input_ids: torch.Tensor) -> Any:
        captured.append(tuple(input_ids[0].tolist()))
        return capture(backbone, block, mlp, input_ids)

    monkeypatch.setattr(pml.backbone, "_load_model", loading)
    monkeypatch.setattr(pml.states_below, "states_below", capturing)
    harm = [{"class_path": "callbacks.Harm"}, {"class_path": "callbacks.RunRecord"}]
    grid = {"model.init_args.adapter.rank": [1, 3], "data.init_args.length": [6, 9], "trainer.callbacks": [harm]}
    cells = cells_of(tmp_path, grid)
    outcomes = run_cells(cells, lambda outcome: None)
    assert all(outcome.record is not None for outcome in outcomes)
    assert len(loaded) == 1
    # Two corpora of one example each, and the twelve passages on which harm is measured; the batch on which each cut is
    # tried is shorter than all of them.
    examples = [ids for ids in captured if len(ids) > 20]
    assert len(examples) == len(set(examples)) == 2 + 12


def test_cells_of_different_rank_share_the_backbone_and_leave_it_bit_for_bit_unchanged(
    base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Backbone] = []
    load = pml.memorization.load_backbone

    def loading(*arguments: Any) -> Backbone:
        kept.append(load(*arguments))
        return kept[-1]

    monkeypatch.setattr(pml.memorization, "load_backbone", loading)
    cells = cells_of(tmp_path, {"model.init_args.adapter.rank": [1, 4]})
    states = []

    def note(_: Any) -> None:
        states.append({name: value.clone() for name, value in kept[-1].model.state_dict().items()})

    run_cells(cells, note)
    assert kept[0] is kept[1]
    fresh = load(kept[0].name).model.state_dict()
    for state in states:
        assert state.keys() == fresh.keys()
        assert all(torch.equal(state[name], value) for name, value in fresh.items())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_cell_of_a_sweep_matches_the_same_run_of_the_fit_command_bit_for_bit(
    dropout: float, base: Callable[..., Path], tmp_path: Path
) -> None:
    grid = {
        "model.init_args.adapter.rank": [1, 3],
        "model.init_args.adapter.dropout": [dropout],
        "seed_everything": [5],
    }
    outcomes = run_cells(cells_of(tmp_path, grid), lambda outcome: None)
    for rank, outcome in zip((1, 3), outcomes, strict=True):
        alone = ["fit", "--config=base.yaml", f"--model.init_args.adapter.rank={rank}", "--seed_everything=5"]
        alone += [f"--model.init_args.adapter.dropout={dropout}", f"--trainer.logger.name=rank{rank}"]
        assert main([*alone, "--trainer.enable_progress_bar=false"]) == 0
        record = read_record(tmp_path / f"runs/rank{rank}/version_0/record.json")
        swept = outcome.record
        assert swept is not None
        for name in (
            "initial_loss",
            "final_loss",
            "min_target_probability",
            "memorized_bits",
            "optimizer_steps",
            "seed",
        ):
            assert getattr(record, name) == getattr(swept, name), name
        assert record.final_loss < record.initial_loss
