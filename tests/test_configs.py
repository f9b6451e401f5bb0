"""Every shipped configuration parses and can be instantiated, and its header says how to run it."""

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from pml.grid import Grid, expand, read_grid, resolve
from pml.lightning_cli import MemorizationCLI, prepare
from pml.modules import Memorization
from pml.search import SearchGrid, read_search

FOLDER = Path(__file__).resolve().parents[1] / "configs"
ALL = sorted(FOLDER.rglob("*.yaml"))
GRIDS = [path for path in ALL if "grid" in yaml.safe_load(path.read_text())]
RUNS = [path for path in ALL if path not in GRIDS]


def name(path: Path) -> str:
    return path.relative_to(FOLDER).as_posix()


def test_there_are_configurations_of_runs_and_of_grids() -> None:
    assert len(RUNS) >= 6
    assert len(GRIDS) >= 2


@pytest.mark.parametrize("path", RUNS, ids=name)
def test_a_run_can_be_instantiated_without_writing_a_file(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    prepare()
    cli = MemorizationCLI(["--config", str(path), "--trainer.accelerator=cpu"], run=False)
    assert isinstance(cli.model, Memorization)
    assert cli.datamodule is not None
    assert list(tmp_path.iterdir()) == []


def cells_with_every_value() -> dict[Path, list[dict[str, list[Any]]]]:
    """Single-cell grids from each grid: at least one each, and enough to cover every value of all grids once.

    The paper's grids have too many cells to make them all.
    """
    seen: dict[str, list[Any]] = {}
    cells: dict[Path, list[dict[str, list[Any]]]] = {path: [] for path in GRIDS}
    for path in GRIDS:
        grid = read(path)
        for part in [*grid.grid, *([grid.search] if isinstance(grid, SearchGrid) else [])]:
            new = {key: [v for v in values if v not in seen.get(key, [])] for key, values in part.items()}
            tried = {key: values or part[key][:1] for key, values in new.items()}
            if cells[path] and not any(new.values()):
                continue
            for i in range(max(map(len, tried.values()))):
                cells[path].append({key: [values[i % len(values)]] for key, values in tried.items()})
            for key, values in new.items():
                seen.setdefault(key, []).extend(values)
    return cells


def read(path: Path) -> Grid | SearchGrid:
    return read_search(path) if "search" in yaml.safe_load(path.read_text()) else read_grid(path)


CELLS = cells_with_every_value()


@pytest.mark.parametrize("path", GRIDS, ids=name)
def test_every_value_of_a_grid_parses(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    grid = read(path)
    assert resolve(Grid(base=grid.base, out=grid.out, grid=CELLS[path]))
    assert list(tmp_path.iterdir()) == []


def test_the_papers_grids_have_all_cells_of_the_paper() -> None:
    # Lengths x ranks x ratios x methods, and for Llama 7 ranks more on random text.
    folder = FOLDER / "experiments" / "paper"
    cells = {path.stem: len(expand(read_grid(path).grid)) for path in folder.glob("*b_*.yaml")}
    # PhoneBook: 8 sizes x 7 ranks x 3 methods.
    assert cells == {
        "qwen3_8b_long_context": 14 * 9 * 6 * 3,
        "llama31_8b_long_context": 14 * 9 * 6 * 3 + 14 * 7,
        "qwen3_8b_phonebook": 8 * 7 * 3,
        "llama31_8b_phonebook": 8 * 7 * 3,
    }


@pytest.mark.parametrize("path", ALL, ids=name)
def test_a_configuration_begins_with_a_header_that_has_a_purpose_and_a_command(path: Path) -> None:
    lines = path.read_text().splitlines()
    header = [line for line in lines if line.startswith("#")]
    assert lines[: len(header)] == header
    assert header[0].endswith((".", ",")) or len(header[0]) > 60
    # A backslash at the end of a line continues its command.
    text = "\n".join(line.removeprefix("#   ") for line in header).replace("\\\n", " ")
    commands = [shlex.split(line, comments=True) for line in text.splitlines() if line.startswith("pml ")]
    assert commands
    given = [Path(word.removeprefix("--config=")) for command in commands for word in command if "configs/" in word]
    assert all((FOLDER.parent / file).is_file() for file in given)
    if path in GRIDS:
        kind = "search" if "search" in yaml.safe_load(path.read_text()) else "sweep"
        assert ["pml", kind, f"configs/{name(path)}"] in [command[:3] for command in commands]
    else:
        # Its own path, or a grid that is made of it, or the script that makes one.
        grids = [read(FOLDER.parent / file) for file in given if FOLDER.parent / file in GRIDS]
        bases = [base.resolve() for grid in grids for base in grid.base]
        assert path in [FOLDER.parent / file for file in given] + bases or path.stem == "planned_run"


def test_the_demo_grid_has_at_least_four_ranks_and_four_lengths() -> None:
    grid = read_grid(FOLDER / "demo" / "law.yaml").grid[0]
    assert {key.rsplit(".", 1)[-1]: len(values) >= 4 for key, values in grid.items()} == {"length": True, "rank": True}
