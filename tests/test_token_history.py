"""The looks of a run: collected, written and read back."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pml.errors import InputError
from pml.last_seen import TokenStates
from pml.token_history import HISTORY_NAME, HistoryRecorder, read_history


def standing(*p: float) -> TokenStates:
    probability = np.array(p, dtype=np.float32)
    margin = np.where(probability > 0.5, probability, np.nan).astype(np.float32)
    nobody = np.full(len(p), -1)
    return TokenStates(probability, probability > 0.3, margin, nobody.astype(np.int32), nobody)


def test_a_history_is_read_as_written_with_the_last_look_of_each_step(tmp_path: Path) -> None:
    recorder = HistoryRecorder([[5, 6], [7]])
    recorder.add(0, standing(0.1, 0.2, 0.3))
    recorder.add(4, standing(0.0, 0.0, 0.0))
    recorder.add(4, standing(0.4, 0.6, 0.9))
    recorder.write(tmp_path / HISTORY_NAME)
    history = read_history(tmp_path)
    assert history.step.tolist() == [0, 4]
    assert history.example_id.tolist() == [0, 0, 1]
    assert history.position.tolist() == [0, 1, 0]
    assert history.token_id.tolist() == [5, 6, 7]
    np.testing.assert_allclose(history.probability, [[0.1, 0.2, 0.3], [0.4, 0.6, 0.9]], rtol=1e-6)
    np.testing.assert_allclose(history.margin, [[np.nan] * 3, [np.nan, 0.6, 0.9]], rtol=1e-6)
    assert history.correct.tolist() == [[False, False, False], [True, True, True]]
    assert pq.read_table(tmp_path / HISTORY_NAME)["margin"].null_count == 4
    assert [path.name for path in tmp_path.iterdir()] == [HISTORY_NAME]


def test_whole_examples_of_a_large_corpus_are_kept_and_the_beginning_of_a_long_example() -> None:
    recorder = HistoryRecorder([[1, 2], [3], [4, 5], [6], [7, 8]], limit=6)
    recorder.add(0, standing(*[0.1] * 8))
    assert recorder.history.example_id.tolist() == [0, 0, 2, 2, 4, 4]
    long = HistoryRecorder([[1, 2, 3, 4]], limit=3)
    long.add(0, standing(0.1, 0.2, 0.3, 0.4))
    assert long.history.token_id.tolist() == [1, 2, 3]


def test_a_recorder_with_a_restored_state_continues_its_history() -> None:
    first, second = HistoryRecorder([[1]]), HistoryRecorder([[1]])
    first.add(0, standing(0.1))
    second.load_state_dict(first.state_dict())
    second.add(1, standing(0.2))
    assert second.history.step.tolist() == [0, 1]
    np.testing.assert_allclose(second.history.probability, [[0.1], [0.2]], rtol=1e-6)


def test_a_recorder_without_looks_writes_no_file_and_a_missing_file_is_refused(tmp_path: Path) -> None:
    HistoryRecorder([[1]]).write(tmp_path / HISTORY_NAME)
    with pytest.raises(InputError, match=r"history\.parquet: no such file; a run with TokenThresholds writes it"):
        read_history(tmp_path)


def test_a_file_whose_looks_have_different_tokens_is_refused(tmp_path: Path) -> None:
    recorder = HistoryRecorder([[1, 2]])
    for step in (0, 1):
        recorder.add(step, standing(0.1, 0.2))
    recorder.write(tmp_path / HISTORY_NAME)
    table = pq.read_table(tmp_path / HISTORY_NAME)
    steps = pa.array([0, 1, 1, 1], table["step"].type)
    pq.write_table(table.set_column(table.column_names.index("step"), "step", steps), tmp_path / HISTORY_NAME)
    with pytest.raises(InputError, match="expected the same tokens at every look"):
        read_history(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"junk", "not a Parquet file that can be read"), (None, "expected the columns step, example_id")],
)
def test_a_file_that_is_not_a_history_is_refused(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / HISTORY_NAME
    pq.write_table(pa.table({"a": [1]}), path) if content is None else path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_history(tmp_path)
