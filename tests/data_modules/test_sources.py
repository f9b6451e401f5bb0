"""Rows, pairs and documents from files: every format gives the same, and every fault is named with its place."""

import json
import sys
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from data_modules._hub import dataset_documents
from data_modules._pairs import DistinctPairs, read_pairs
from data_modules._sources import Document, read_documents, read_rows
from data_modules._standard_library import documentation_strings
from pml.corpus import Pair
from pml.errors import InputError

ROWS = [
    {"query": "Who?", "target": 'a "quoted", name', "text": "one\r\ntwo"},
    {"query": "Where?", "target": " 007 ", "text": "שלום 👩‍👩‍👧‍👦 e\u0301"},
    {"query": "When?", "target": "x" * 200_000, "text": "\u2028null"},
]


def quoted(value: str) -> str:
    return '"' + value.replace('"', '""') + '"'


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_bytes(b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows))


def write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    lines = [
        ",".join(map(quoted, fields)) for fields in ([*rows[0]], *([row[name] for name in rows[0]] for row in rows))
    ]
    path.write_bytes("\n".join(lines).encode())


def write_parquet(path: Path, rows: list[dict[str, str]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=50)


def write_yaml(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text(yaml.safe_dump(rows, allow_unicode=True), encoding="utf-8")


WRITERS: dict[str, Callable[[Path, list[dict[str, str]]], None]] = {
    ".jsonl": write_jsonl,
    ".csv": write_csv,
    ".parquet": write_parquet,
    ".yaml": write_yaml,
    ".yml": write_yaml,
}


def file_of(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def whole(documents: Iterable[Document]) -> list[tuple[str, str]]:
    return [(document.title, "".join(document.blocks)) for document in documents]


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_format_gives_the_same_rows_in_order(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"facts{suffix}"
    WRITERS[suffix](path, ROWS)
    assert [row.values for row in read_rows(path, ("query", "target", "text"))] == ROWS
    assert [(pair.query, pair.target) for pair in read_pairs(path)] == [(row["query"], row["target"]) for row in ROWS]


# Line ends inside of quotes, separators, quotes: whatever text there is. YAML has no control characters.
@settings(max_examples=50, deadline=None)
@given(rows=st.lists(st.fixed_dictionaries({"query": st.text(min_size=1), "target": st.text(min_size=1)}), min_size=1))
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_any_text_comes_back_from_every_format(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, rows: list[dict[str, str]]
) -> None:
    path = tmp_path_factory.mktemp("rows") / f"facts{suffix}"
    WRITERS[suffix](path, rows)
    assert [{"query": pair.query, "target": pair.target} for pair in read_pairs(path)] == rows


@pytest.mark.parametrize(
    ("name", "content", "places"),
    [
        ("f.jsonl", '{"query": "a", "target": "1"}\n\n{"query": "b", "target": "2"}', ["f.jsonl:1", "f.jsonl:3"]),
        ("f.csv", 'query,target\n"a\nstill a",1\n\nb,2\n', ["f.csv:2", "f.csv:5"]),
        ("f.yaml", "# facts\n- query: a\n  target: '1'\n- {query: b, target: '2'}\n", ["f.yaml:2", "f.yaml:4"]),
    ],
)
def test_a_pair_knows_the_line_it_starts_at(tmp_path: Path, name: str, content: str, places: list[str]) -> None:
    assert [pair.source for pair in read_pairs(file_of(tmp_path / name, content))] == places


def test_a_pair_of_a_parquet_file_knows_its_row(tmp_path: Path) -> None:
    write_parquet(tmp_path / "f.parquet", ROWS)
    assert [pair.source for pair in read_pairs(tmp_path / "f.parquet")] == [f"f.parquet row {i}" for i in (1, 2, 3)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("f.csv", "query,target\na,1\nb,2,3\n", r"^f\.csv:3: 3 fields, and the header has 2; put text with commas"),
        ("f.csv", 'query,target\na,"1\n', r"^f\.csv:2: malformed CSV \(unexpected end of data\)"),
        ("f.csv", "query,number\na,1\n", r"^f\.csv:1: no column 'target'; found 'query', 'number'"),
        ("f.csv", "query,target\na,\n", r"^f\.csv:2: the target is empty"),
        ("f.csv", b"query,target\na,1\n\xe4,2\n", r"^f\.csv:3: not UTF-8 \(byte 1 is 0xe4\); save the file with"),
        ("f.csv", "query,target\n", r"f\.csv: the file is empty; expected rows with 'query' and 'target'"),
        ("f.csv", "", r"f\.csv: the file is empty"),
        ("f.yaml", "", r"f\.yaml: the file is empty"),
        ("f.yaml", "- query: a\n  target: 7\n", r"^f\.yaml:1: 'target' is 7; expected a string, in quotes"),
        ("f.yaml", "- query: a\n  target: 2026-01-01\n", r"^f\.yaml:1: 'target' is \"2026-01-01\"; expected a string"),
        ("f.yaml", "- query: a\n  target: 'b\n", r"^f\.yaml:3: malformed YAML"),
        ("f.yaml", "query: a\n", r"^f\.yaml: a YAML map; expected a list"),
        ("f.yaml", "- a\n", r"^f\.yaml:1: a YAML str; expected a mapping with query, target"),
        ("f.yaml", "- query: a\n- query: \x07\n", r"^f\.yaml:2: YAML has no character 0x7; write it as an escape"),
        ("f.yaml", "- !!python/name:os.system\n", r"^f\.yaml:1: malformed YAML \(could not determine a constructor"),
        ("f.yaml", b"- query: \xff\n", r"^f\.yaml:1: not UTF-8"),
        ("f.parquet", "PAR?", r"f\.parquet: malformed Parquet"),
        ("f.txt", "a 1", r"f\.txt: a \.txt file cannot be read as rows; expected one of \.jsonl, \.csv, "),
        ("f", "a 1", r"f: a file without a suffix cannot be read as rows"),
    ],
)
def test_bad_rows_are_refused_with_their_place(tmp_path: Path, name: str, content: bytes | str, message: str) -> None:
    path = file_of(tmp_path / name, content)
    with pytest.raises(InputError, match=message) as error:
        list(read_pairs(path))
    assert "\n" not in str(error.value)


def test_a_parquet_file_without_the_column_is_refused_with_what_it_has(tmp_path: Path) -> None:
    write_parquet(tmp_path / "f.parquet", [{"query": "a", "answer": "1"}])
    with pytest.raises(InputError, match=r"^f\.parquet: no column 'target'; found 'query', 'answer'"):
        list(read_pairs(tmp_path / "f.parquet"))


def test_a_parquet_value_that_is_no_text_is_refused_with_its_row(tmp_path: Path) -> None:
    pq.write_table(pa.table({"query": ["a", "b"], "target": ["1", None]}), tmp_path / "f.parquet")
    with pytest.raises(InputError, match=r"^f\.parquet row 2: 'target' is null; expected a string"):
        list(read_pairs(tmp_path / "f.parquet"))


def test_a_folder_is_no_file_of_rows(tmp_path: Path) -> None:
    (tmp_path / "f.csv").mkdir()
    with pytest.raises(InputError, match=r"f\.csv: cannot be read \(Is a directory\)"):
        list(read_pairs(tmp_path / "f.csv"))


def test_distinct_pairs_count_what_they_leave_out() -> None:
    pairs = DistinctPairs(Pair(query, "1") for query in "abacab")
    assert [pair.query for pair in pairs] == ["a", "b", "c"]
    assert pairs.duplicates == 3


def test_a_limit_counts_different_pairs_and_reads_no_further() -> None:
    read: list[str] = []

    def reading() -> Iterable[Pair]:
        for query in "aabcd":
            read.append(query)
            yield Pair(query, "1")

    assert [pair.query for pair in DistinctPairs(reading(), limit=2)] == ["a", "b"]
    assert read == ["a", "a", "b"]


def test_a_conflict_before_the_limit_is_not_overlooked() -> None:
    pairs = DistinctPairs([Pair("a", "1", "f:1"), Pair("a", "2", "f:2"), Pair("b", "3", "f:3")], limit=2)
    with pytest.raises(InputError, match=r"1 query has different targets.*'a' \(f:1, f:2\)"):
        list(pairs)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_reading_pairs_takes_a_fraction_of_the_size_of_their_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"large{suffix}"
    content = Random(3)
    rows = [{"query": f"q{i}", "target": content.randbytes(5_000).hex()} for i in range(1_000)]
    WRITERS[suffix](path, rows)
    del rows
    size = 10_000_000
    characters, outside_python = 0, []
    tracemalloc.start()
    try:
        for pair in DistinctPairs(read_pairs(path)):
            characters += len(pair.target)
            outside_python.append(pa.total_allocated_bytes())
        peak = tracemalloc.get_traced_memory()[1] + max(outside_python)
    finally:
        tracemalloc.stop()
    assert characters == size
    assert peak < size / 4


def test_plain_text_is_a_document_as_it_is(tmp_path: Path) -> None:
    text = "\tWindows\r\nUnix\nend\u2028 " + "é" * 70_000  # a character lies across the blocks that are read
    path = file_of(tmp_path / "a.txt", b"\xef\xbb\xbf" + text.encode())
    assert whole(read_documents([path])) == [("a.txt", text)]


def test_html_loses_its_markup_scripts_and_styles_and_keeps_its_paragraphs(tmp_path: Path) -> None:
    html = (
        "<html><head><title>T</title><style>p {color: red}</style></head><body><script>run()</script>"
        "<p>One <b>bold</b> &amp; whole.</p><p>Two</p></body></html>"
    )
    ((title, text),) = whole(read_documents([file_of(tmp_path / "a.html", html)]))
    assert (title, text.split("\n")[0], text.split("\n")[-1]) == ("a.html", "One bold & whole.", "Two")
    assert not any(code in text for code in ("<", "color", "run"))


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_each_row_is_a_document_named_by_its_title_or_its_place(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    WRITERS[suffix](path, [{"title": "First", "text": "one"}, {"title": "", "text": "two"}])
    (first, second) = whole(read_documents([path]))
    assert first == ("First", "one")
    assert second[0].startswith(f"a{suffix}")
    assert second[1] == "two"


def test_another_column_can_have_the_text(tmp_path: Path) -> None:
    path = file_of(tmp_path / "a.jsonl", '{"body": "one", "text": "two"}')
    assert [text for _, text in whole(read_documents([path], "body"))] == ["one"]


def test_a_folder_is_read_in_the_order_of_names_without_what_is_hidden_or_no_text(tmp_path: Path) -> None:
    for name in ("b.md", "a/z.rst", "a/y.txt", "c.PNG", ".git/d.txt", ".e.txt"):
        file_of(tmp_path / "notes" / name, f"in {name}")
    file_of(tmp_path / "notes" / "empty.txt", "")
    file_of(tmp_path / "first.txt", "before")
    assert whole(read_documents([tmp_path / "first.txt", tmp_path / "notes"])) == [
        ("first.txt", "before"),
        ("a/y.txt", "in a/y.txt"),
        ("a/z.rst", "in a/z.rst"),
        ("b.md", "in b.md"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"one\ntwo\nthr\xe9e", r"^a\.txt:3: not UTF-8 \(0xe9\); save the file with UTF-8 encoding"),
        ("a.txt", b"\n" * 70_000 + b"\xe2\x82", r"^a\.txt:70001: not UTF-8 \(0xe2\)"),
        ("a.txt", b"", r"a\.txt: the file is empty; expected text"),
        ("a.txt", b"\xef\xbb\xbf", r"a\.txt: the file is empty"),
        ("a.html", b"<p> </p>", r"a\.html: no text is left without the markup"),
        ("a.jsonl", b'{"body": "x"}', r"^a\.jsonl:1: no column 'text'; found 'body'"),
        ("a.pdf", b"x", r"a\.pdf: a \.pdf file cannot be read as text; expected one of \.txt, \.md"),
    ],
)
def test_bad_text_is_refused_with_its_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        whole(read_documents([file_of(tmp_path / name, content)]))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.txt: cannot be read \(No such file or directory\)"):
        whole(read_documents([tmp_path / "none.txt"]))


def test_a_folder_without_text_is_refused_with_what_was_expected(tmp_path: Path) -> None:
    file_of(tmp_path / "picture.png", "x")
    with pytest.raises(InputError, match=r"no text in this folder; expected files of \.txt, "):
        whole(read_documents([tmp_path]))


def test_the_standard_library_has_its_documentation_strings_in_the_order_of_names_and_source() -> None:
    documents = documentation_strings()
    titles = []
    for document in documents:
        titles.append(document.title)
        if document.title == "argparse.ArgumentParser":
            break
    assert "".join(document.blocks).startswith("Object for parsing command line strings into Python objects.")
    assert titles[0] == "abc"
    assert titles.index("abc.abstractmethod") < titles.index("abc.ABC") < titles.index("argparse")
    assert not any(title.startswith(("_", "antigravity")) for title in titles)


def test_documents_of_the_standard_library_are_parsed_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "aifc", raising=False)
    monkeypatch.delitem(sys.modules, "antigravity", raising=False)
    first = [next(documents).title for documents in [documentation_strings()] for _ in range(300)]
    assert len(set(first)) > 200
    assert not {"aifc", "antigravity"} & sys.modules.keys()


@pytest.mark.parametrize("folder", ["parquet", "json", "saved"])
def test_a_dataset_in_a_folder_is_read_row_by_row(tmp_path: Path, folder: str) -> None:
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    rows = [{"title": "A", "text": "one"}, {"title": "B", "text": "two"}]
    path = tmp_path / folder
    path.mkdir()
    if folder == "parquet":
        write_parquet(path / "train.parquet", rows)
    elif folder == "json":
        write_jsonl(path / "train.jsonl", rows)
    else:
        datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(path)
    assert whole(dataset_documents(str(path), None, "train", "text")) == [("A", "one"), ("B", "two")]


@pytest.mark.parametrize(
    ("split", "column", "message"),
    [
        ("test", "text", r"dataset '.*' cannot be read: .*test"),
        ("train", "body", r"row 1: no column 'body'; found 'text'"),
    ],
)
def test_a_dataset_without_the_split_or_column_is_refused(
    tmp_path: Path, split: str, column: str, message: str
) -> None:
    pytest.importorskip("datasets", reason="the package datasets is not installed")
    write_parquet(tmp_path / "train.parquet", [{"text": "one"}])
    with pytest.raises(InputError, match=message) as error:
        whole(dataset_documents(str(tmp_path), None, split, column))
    assert "\n" not in str(error.value)


def test_a_dataset_that_is_no_text_is_refused_by_its_kind(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="the package datasets is not installed")
    file_of(tmp_path / "train" / "a.png", "x")
    with pytest.raises(InputError, match=r"is of the kind 'image_?folder'; expected one of arrow, csv"):
        whole(dataset_documents(str(tmp_path), None, "train", "text"))


def test_a_dataset_without_the_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'pml\[hub\]'"):
        whole(dataset_documents("any", None, "train", "text"))
