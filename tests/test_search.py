"""The search for the best settings of every cell: candidates are halved as budgets grow, and no run is repeated."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from record_factory import make_record

from pml.cli import main
from pml.commands.search import _table
from pml.errors import InputError
from pml.grid import Cell
from pml.records import read_record, read_records
from pml.search import Candidate, CellResult, SearchGrid, budgets, read_search, run_search
from pml.sweep import Outcome
from tests import fits  # sets one thread, so that runs are equal bit for bit

assert fits.torch.get_num_threads() == 1

RATE = "model.init_args.learning_rate"
RANK = "model.init_args.adapter.rank"


@pytest.fixture
def write(tiny_backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes a search of two ranks and three learning rates, of which only 0.05 learns anything."""
    monkeypatch.chdir(tmp_path)
    base = {
        "model": {
            "class_path": "SFT",
            "init_args": {"backbone": str(tiny_backbone_folder), "adapter": {"rank": 2, "block": 1}},
        },
        "data": {"class_path": "RandomTokens", "init_args": {"length": 8}},
        "trainer": {"accelerator": "cpu", "callbacks": [{"class_path": "callbacks.RunRecord"}]},
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))

    def write(**changes: Any) -> Path:
        content = {
            "base": "base.yaml",
            "out": "out",
            "grid": {RANK: [1, 3]},
            "search": {RATE: [1e-9, 0.05, 1e-8]},
            "epochs": [2, 4],
        }
        path = tmp_path / "search.yaml"
        path.write_text(yaml.safe_dump(content | changes, sort_keys=False))
        return path

    return write


@pytest.mark.parametrize(
    ("candidates", "epochs", "expected"),
    [
        (4, [50, 100, 200], [(4, 50), (2, 100), (1, 200)]),
        (8, [1, 2, 4, 8], [(8, 1), (4, 2), (2, 4), (1, 8)]),
        (6, [10, 20, 40], [(6, 10), (3, 20), (1, 40)]),
        (3, [10, 40], [(3, 10), (1, 40)]),
        (1, [10, 40], [(1, 10), (1, 40)]),
    ],
)
def test_all_candidates_run_with_the_first_budget_and_one_with_the_last(
    candidates: int, epochs: list[int], expected: list[tuple[int, int]]
) -> None:
    assert budgets(candidates, epochs) == expected


def test_only_the_candidate_with_the_lowest_loss_runs_with_the_last_budget_and_only_once(
    write: Any, tmp_path: Path
) -> None:
    choices = run_search(read_search(write()))
    assert [choice.cell for choice in choices] == [{RANK: 1}, {RANK: 3}]
    for choice in choices:
        best, *others = choice.candidates
        assert best.settings == {RATE: 0.05}
        assert set(best.final_loss) == {2, 4}
        assert all(set(other.final_loss) == {2} for other in others)
        assert best.final_loss[2] < min(other.final_loss[2] for other in others)
        record = read_record(choice.folder / "record.json")
        assert record.optimizer_steps == 4
        assert record.final_loss == best.final_loss[4]
        assert choice.at_the_edge == [RATE]
    assert len(read_records([tmp_path / "out" / "2-epochs"])) == 6
    assert {r.rank: r.method_settings["learning_rate"] for r in read_records([tmp_path / "out" / "best"]).values()} == {
        1: 0.05,
        3: 0.05,
    }
    content = json.loads((tmp_path / "out" / "search.json").read_text())
    assert [cell["chosen"] for cell in content["cells"]] == [{RATE: 0.05}] * 2
    # The same search again runs nothing and finds the same.
    outcomes: list[Any] = []
    assert run_search(read_search(write()), lambda folder, cells: outcomes.append) == choices
    assert len(outcomes) == 8
    assert all(outcome.skipped for outcome in outcomes)


@pytest.mark.parametrize(
    ("diverging", "chosen", "ran"),
    [({0.4}, 0.2, [0.4, 0.2]), ({0.4, 0.2}, 0.1, [0.4, 0.2, 0.1]), ({0.4, 0.2, 0.1}, None, [0.4, 0.2, 0.1])],
)
def test_the_next_best_candidate_runs_with_the_last_budget_if_the_best_diverges(
    diverging: set[float], chosen: float | None, ran: list[float], write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the first budget, higher rates end at lower losses and 0.8 diverges; others diverge with the last one."""
    with_last = []

    def run_cells(cells: list[Cell], tell: Callable[[Outcome], None]) -> list[Outcome]:
        outcomes = []
        for cell in cells:
            rate = float(next(value for value in cell.arguments if value.startswith(f"--{RATE}=")).split("=")[1])
            last = "best" in cell.folder.parts
            if last:
                with_last.append(rate)
            lost = rate == 0.8 or (last and rate in diverging)
            fields: dict[str, Any] = {"final_loss": None, "status": "diverged"} if lost else {"final_loss": 1 / rate}
            outcomes.append(Outcome(cell, make_record(**fields)))
        return outcomes

    monkeypatch.setattr("pml.search.run_cells", run_cells)
    (choice,) = run_search(read_search(write(grid={RANK: [1]}, search={RATE: [0.1, 0.2, 0.4, 0.8]}, epochs=[2, 4])))
    assert with_last == ran
    assert choice.chosen == (None if chosen is None else {RATE: chosen})
    assert choice.candidates[0].settings == {RATE: chosen or 0.4}
    assert [tried.final_loss.keys() for tried in choice.candidates if tried.settings == {RATE: 0.8}] == [{2}]


def test_the_table_has_a_gap_for_a_budget_that_the_chosen_candidate_did_not_run() -> None:
    grid = SearchGrid.model_validate(
        {"base": "base.yaml", "out": "out", "grid": {RANK: [1]}, "search": {RATE: [0.1, 0.2]}, "epochs": [2, 4, 8]}
    )
    best = Candidate(settings={RATE: 0.1}, final_loss={2: 3.0, 8: 1.0})
    choice = CellResult(
        cell={RANK: 1}, chosen={RATE: 0.1}, failed=False, at_the_edge=[], folder=Path("out"), candidates=[best]
    )
    assert list(_table(grid, [choice]).rows[0]) == ["1", "0.1", "3.000", "-", "1.000"]


def test_the_command_says_what_it_chose_and_that_a_better_value_may_lie_beyond_those_tried(
    write: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    # YAML reads 5e-2 as text.
    search = str(write(grid={RANK: [3]}, search={RATE: [1e-9, "5e-2"]}))
    assert main(["search", search]) == 0
    captured = capsys.readouterr()
    assert [row.split()[:2] for row in captured.out.splitlines() if "5e-2" in row] == [["3", "5e-2"]]
    assert f"{RATE}: the best value is the smallest or largest tried in 1 of 1 cells" in captured.err
    assert main(["search", search, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["epochs"] == [2, 4]


def test_a_failed_candidate_is_named_and_can_be_run_again(
    write: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(self: Any, trainer: Any, module: Any) -> None:
        if module.learning_rate == 0.05:
            raise RuntimeError("out of memory")

    search = str(write(grid={RANK: [3]}, search={RATE: [1e-9, 0.05]}))
    with monkeypatch.context() as patch:
        patch.setattr("callbacks.RunRecord.on_train_epoch_start", fails)
        assert main(["search", search]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("failed: ")]
    assert "learning_rate=0.05" in line
    assert line.endswith("so its settings count as the worst; --retry_failed runs it again")
    assert main(["search", search]) == 1
    assert main(["search", search, "--retry_failed"]) == 0
    capsys.readouterr()
    assert main(["search", search, "--json"]) == 0
    (cell,) = json.loads(capsys.readouterr().out)["cells"]
    assert cell["chosen"] == {RATE: 0.05}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": [4, 2]}, r"epochs is \[4, 2\]; expected numbers from 1, ascending"),
        ({"epochs": [4]}, "epochs: List should have at least 2 items"),
        ({"search": {}}, "search: Dictionary should have at least 1 item"),
        ({"search": {RATE: []}}, f"search key {RATE} has no values"),
        ({"grid": {RATE: [1]}}, f"{RATE} is in the grid too; the search sets it, so take it out of the grid"),
        ({"grid": {"trainer.max_epochs": [1]}}, "trainer.max_epochs is in the grid too"),
    ],
)
def test_an_invalid_search_is_refused(write: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_search(write(**changes))


def test_an_invalid_candidate_is_refused_before_anything_runs(write: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="learning_rate"):
        run_search(read_search(write(search={RATE: [0.1, "fast"]})))
    assert not (tmp_path / "out").exists()
