"""Every shipped configuration parses and can be made; its header says how to run it."""

from pathlib import Path

import pytest
import yaml

from pml.lightning_cli import MemorizationCLI, prepare
from pml.modules import Memorization
from pml.sweep import read_grid, resolve

FOLDER = Path(__file__).resolve().parents[1] / "configs"
ALL = sorted(FOLDER.rglob("*.yaml"))
GRIDS = [path for path in ALL if "grid" in yaml.safe_load(path.read_text())]
RUNS = [path for path in ALL if path not in GRIDS]


def name(path: Path) -> str:
    return path.relative_to(FOLDER).as_posix()


def test_there_are_configurations_of_both_kinds() -> None:
    assert len(RUNS) >= 6
    assert len(GRIDS) >= 2


@pytest.mark.parametrize("path", RUNS, ids=name)
def test_a_run_can_be_made(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    prepare()
    cli = MemorizationCLI(["--config", str(path), "--trainer.accelerator=cpu"], run=False)
    assert isinstance(cli.model, Memorization)
    assert cli.datamodule is not None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", GRIDS, ids=name)
def test_every_cell_of_a_grid_parses(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cells = resolve(read_grid(path))
    assert len(cells) >= 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ALL, ids=name)
def test_a_configuration_opens_with_its_purpose_and_the_command_that_runs_it(path: Path) -> None:
    lines = path.read_text().splitlines()
    header = [line for line in lines if line.startswith("#")]
    assert lines[: len(header)] == header
    assert header[0].endswith((".", ",")) or len(header[0]) > 60
    assert any(line.startswith("#   pml ") for line in header)
    assert any(name(path) in line or "pml sweep" in line for line in header)


def test_the_demo_grid_has_at_least_four_ranks_and_four_lengths() -> None:
    grid = read_grid(FOLDER / "demo" / "law.yaml").grid[0]
    assert {key.rsplit(".", 1)[-1]: len(values) >= 4 for key, values in grid.items()} == {"length": True, "rank": True}
