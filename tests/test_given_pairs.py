"""Pairs given in Python become a file of the run, which is not left behind if they are refused."""

import json
from pathlib import Path

import pytest

import pml
from pml.errors import InputError
from pml.given_pairs import checked_pairs, file_with

PAIRS = [("Code?", "№ 7\n"), ("Road?", "9")]


def test_a_path_is_used_as_it_is(tmp_path: Path) -> None:
    with file_with(checked_pairs("facts.csv"), tmp_path / "out") as path:
        assert path == Path("facts.csv")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("pairs", [dict(PAIRS), PAIRS, iter(PAIRS)])
def test_pairs_are_written_as_json_lines_in_their_order(pairs: object, tmp_path: Path) -> None:
    with file_with(checked_pairs(pairs), tmp_path / "out") as path:
        pass
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    assert [(row["query"], row["target"]) for row in rows] == PAIRS


@pytest.mark.parametrize("existing", [False, True])
def test_refused_pairs_leave_neither_their_file_nor_a_new_folder(existing: bool, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    if existing:
        folder.mkdir()
    with pytest.raises(InputError), file_with(checked_pairs(PAIRS), folder):
        raise InputError("too long")
    assert folder.exists() == existing
    assert not any(tmp_path.rglob("*.jsonl"))


def test_refused_pairs_leave_the_pairs_of_an_earlier_run_as_they_were(tmp_path: Path) -> None:
    with file_with(checked_pairs(PAIRS), tmp_path) as path:
        before = path.read_bytes()
    with pytest.raises(InputError), file_with(checked_pairs({"Code?": "8"}), tmp_path):
        assert path.read_bytes() != before
        raise InputError("too long")
    assert path.read_bytes() == before


def test_contradicting_pairs_are_refused_without_a_trace(tiny_backbone_folder: Path, tmp_path: Path) -> None:
    pairs = [("Code?", "7"), ("Code?", "8")]
    with pytest.raises(InputError, match="different targets"):
        pml.memorize(pairs, tmp_path / "out", backbone=str(tiny_backbone_folder))
    assert not (tmp_path / "out").exists()
