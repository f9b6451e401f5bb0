"""The corpus file of a run is read exactly as it was written, or refused."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from pml.corpus import Corpus, Example, Pair, encode_pairs
from pml.corpus_file import read_corpus, read_targets, write_corpus
from pml.encoding import TextEncoder
from pml.errors import InputError


def some_corpus() -> Corpus:
    examples = [
        Example(0, (1, 2), (3, 4), (1,), " a ", "b\r\n", "f.jsonl:1"),
        Example(1, (5,), (6,), (), "\x00\u200b", None, ""),
    ]
    return Corpus("f.jsonl", examples, 12.5, {"path": "f.jsonl", "template_kwargs": {"x": [1, None]}}, [0, 0], 2)


def test_a_corpus_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_corpus(tmp_path / "run" / "corpus.parquet", some_corpus())
    assert read_corpus(tmp_path / "run" / "corpus.parquet") == some_corpus()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["corpus.parquet"]


def test_read_targets_gives_the_text_by_example_id_without_targets_that_have_none(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus.parquet", some_corpus())
    assert read_targets(tmp_path / "corpus.parquet", [0, 1]) == {0: "b\r\n"}
    assert read_targets(tmp_path / "corpus.parquet", [1]) == {}
    with pytest.raises(InputError, match="not the corpus of a run"):
        read_targets(tmp_path / "gone.parquet", [0])


@settings(max_examples=30, deadline=None)
@given(pairs=st.dictionaries(st.text(min_size=1), st.text(min_size=1), min_size=1, max_size=3))
def test_queries_and_targets_are_kept_as_the_user_wrote_them(
    pairs: dict[str, str], tiny_tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> None:
    examples = encode_pairs((Pair(*pair) for pair in pairs.items()), TextEncoder(tiny_tokenizer)).examples
    path = tmp_path_factory.mktemp("corpus") / "corpus.parquet"
    write_corpus(path, Corpus("c", examples))
    assert [(e.query, e.target) for e in read_corpus(path).examples] == list(pairs.items())
    table = pq.read_table(path)  # other tools read the same
    assert dict(zip(table["query"].to_pylist(), table["target"].to_pylist(), strict=True)) == pairs


def test_a_missing_or_damaged_corpus_file_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "corpus.parquet"
    for content, message in ((None, "cannot be read"), (b"PAR1", "not the corpus of a run"), (b"", "not the corpus")):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(InputError, match=message) as refused:
            read_corpus(path)
        assert "\n" not in str(refused.value)


def test_a_corpus_file_whose_token_ids_were_changed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "corpus.parquet"
    write_corpus(path, some_corpus())
    table = pq.read_table(path)
    ids = table["target_ids"].to_pylist()
    changed = table.set_column(table.schema.get_field_index("target_ids"), "target_ids", [[[9, 4], ids[1]]])
    pq.write_table(changed.replace_schema_metadata(table.schema.metadata), path)
    with pytest.raises(InputError, match="its token ids do not match the content hash"):
        read_corpus(path)
