"""Search for the best settings of every cell of a grid: many candidates on a small budget, the best on larger ones.

Successive halving (Jamieson and Talwalkar, arXiv 1502.07943): every candidate runs a full schedule with the first
budget, the best run anew with the next, and one runs with the last. If that one diverges, the next best takes its
place. Each run is complete and has its own record, so a search is as seeded, resumable and inspectable as a sweep.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pydantic

from pml.content import Content
from pml.grid import Cell, Grid, expand, read_grid, resolve
from pml.records import write_json
from pml.sweep import Outcome, run_cells

__all__ = ["SEARCH_NAME", "Candidate", "CellResult", "SearchGrid", "budgets", "read_search", "run_search"]

SEARCH_NAME = "search.json"
EPOCHS = "trainer.max_epochs"

Setting = dict[str, Any]


class SearchGrid(Grid):
    """Content of a search file: a grid, and the settings to try for each of its cells.

    Attributes:
        search: Maps keys of `pml fit` to lists of values to try; every combination is a candidate.
        epochs: Budgets in epochs, ascending; the last is the one meant for the final runs of the grid.
    """

    search: dict[str, list[Any]] = pydantic.Field(min_length=1)
    epochs: list[int] = pydantic.Field(min_length=2)

    @pydantic.model_validator(mode="after")
    def _fits_together(self) -> "SearchGrid":
        if sorted(set(self.epochs)) != self.epochs or self.epochs[0] < 1:
            raise ValueError(f"epochs is {self.epochs}; expected numbers from 1, ascending")
        if empty := [key for key, values in self.search.items() if not values]:
            raise ValueError(f"search key {empty[0]} has no values")
        if twice := [key for key in (*self.search, EPOCHS) if any(key in part for part in self.grid)]:
            raise ValueError(f"{twice[0]} is in the grid too; the search sets it, so take it out of the grid")
        return self


class Candidate(Content):
    """One candidate of one cell: its settings, and its final loss in nats by budget in epochs, for those it has run.

    A loss is None if the run failed or diverged.
    """

    settings: Setting
    final_loss: dict[int, float | None]

    def order(self, epochs: int) -> float:
        """Sort key: the final loss with this budget, infinite if that run failed, diverged or does not exist."""
        loss = self.final_loss.get(epochs)
        return math.inf if loss is None else loss


class CellResult(Content):
    """Result of a search for one cell.

    Attributes:
        cell: Settings of the cell.
        chosen: The best settings; None if their run with the last budget failed or diverged.
        failed: Whether that run failed.
        at_the_edge: Keys whose chosen value is the smallest or largest number tried: a better one may lie beyond.
        folder: Folder of that run.
        candidates: All candidates, best first.
    """

    cell: Setting
    chosen: Setting | None
    failed: bool
    at_the_edge: list[str]
    folder: Path
    candidates: list[Candidate]


class SearchResult(Content):
    """The content of `search.json`."""

    schema_version: Literal[1] = 1
    epochs: list[int]
    search: dict[str, list[Any]]
    cells: list[CellResult]


def read_search(path: Path) -> SearchGrid:
    """Read and check a search file.

    Raises:
        InputError: See `pml.grid.read_grid`.
    """
    return read_grid(path, SearchGrid)


def budgets(candidates: int, epochs: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs of the number of candidates and their budget: from all to one, falling by a constant factor.

    Example:
        >>> budgets(4, [50, 100, 200])
        [(4, 50), (2, 100), (1, 200)]
    """
    last = len(epochs) - 1
    # `round` takes off float error before `ceil`: 8 ** (1 - 1 / 3) is 4.000000000000001.
    return [(math.ceil(round(candidates ** (1 - k / last), 9)), budget) for k, budget in enumerate(epochs)]


def run_search(
    grid: SearchGrid, start: Callable[[str, list[Cell]], Callable[[Outcome], None]] = lambda *_: lambda _: None
) -> list[CellResult]:
    """Run what has no record yet, choose the best settings for each cell, and write them to `search.json` in `out`.

    If the best candidate diverges with the last budget, the next best runs with it. Runs with the last budget are in
    `out/best`, ready for `pml law`: one per cell, plus those that diverged. The others are in `out/N-epochs`.

    Args:
        grid: The search.
        start: Called before each budget's runs with their folder and cells; returns a callback for each outcome.

    Raises:
        InputError: Before anything runs, if `pml fit` would refuse a cell or a candidate.
    """
    cells, tried = expand(grid.grid), expand([grid.search])
    standing = [[Candidate(settings=settings, final_loss={}) for settings in tried] for _ in cells]
    last = grid.epochs[-1]

    def run(chosen: list[tuple[int, Candidate]], epochs: int) -> list[Outcome]:
        """Run candidates with one budget and record their final losses."""
        folder = grid.out / ("best" if epochs == last else f"{epochs}-epochs")
        runs = resolve(
            _grid_of_budget(grid, [cells[i] | candidate.settings for i, candidate in chosen], epochs, folder)
        )
        outcomes = run_cells(runs, start(str(folder), runs))
        for (_, candidate), outcome in zip(chosen, outcomes, strict=True):
            candidate.final_loss[epochs] = outcome.record.final_loss if outcome.record is not None else None
        return outcomes

    outcomes: list[Outcome] = []
    for count, epochs in budgets(len(tried), grid.epochs):
        outcomes = run([(i, candidate) for i, found in enumerate(standing) for candidate in found[:count]], epochs)
        for found in standing:
            # Only candidates that ran with this budget are compared; the others keep their order behind them.
            found[:count] = sorted(found[:count], key=lambda candidate: candidate.order(epochs))
    # A candidate that did well on smaller budgets may diverge with the last one; the next best may not.
    while behind := [
        (i, other)
        for i, (found, outcome) in enumerate(zip(standing, outcomes, strict=True))
        if outcome.diverged and (other := _next_best(found, last)) is not None
    ]:
        for (i, other), outcome in zip(behind, run(behind, last), strict=True):
            if not outcome.diverged:
                outcomes[i] = outcome
                standing[i].remove(other)
                standing[i].insert(0, other)
    choices = []
    for cell, candidates, outcome in zip(cells, standing, outcomes, strict=True):
        chosen = candidates[0].settings if outcome.record is not None and not outcome.diverged else None
        choices.append(
            CellResult(
                cell=cell,
                chosen=chosen,
                failed=outcome.record is None,
                at_the_edge=_at_the_edge(grid.search, chosen) if chosen is not None else [],
                folder=outcome.cell.folder,
                candidates=candidates,
            )
        )
    content = SearchResult(epochs=grid.epochs, search=grid.search, cells=choices)
    write_json(grid.out / SEARCH_NAME, content.model_dump(mode="json"))
    return choices


def _grid_of_budget(grid: SearchGrid, settings: list[Setting], epochs: int, out: Path) -> Grid:
    one_value = [{key: [value] for key, value in (setting | {EPOCHS: epochs}).items()} for setting in settings]
    return Grid(base=grid.base, out=out, grid=one_value)


def _next_best(found: Sequence[Candidate], last: int) -> Candidate | None:
    """The best candidate that has not run with the last budget and never failed or diverged; None if there is none."""
    return next((c for c in found if last not in c.final_loss and None not in c.final_loss.values()), None)


def _at_the_edge(search: dict[str, list[Any]], chosen: Setting) -> list[str]:
    """Keys whose chosen number is the smallest or the largest of those tried."""
    found = []
    for key, values in search.items():
        try:
            # YAML reads 1e-3 as text.
            numbers = [float(value) for value in values if not isinstance(value, bool)]
        except (TypeError, ValueError):
            continue
        if len(numbers) == len(values) > 1 and float(chosen[key]) in (min(numbers), max(numbers)):
            found.append(key)
    return found
