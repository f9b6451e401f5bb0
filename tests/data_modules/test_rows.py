"""Rows and pairs from files: every format gives the same result, and every error names the file and line or row."""

import json
import os
import tracemalloc
from decimal import Decimal
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from row_files import WRITERS, file_of, write_parquet

from data_modules._pairs import read_pairs
from data_modules._rows import Columns, read_rows
from pml.cli import main
from pml.errors import InputError

ROWS = [
    {"query": "Who?", "target": 'a "quoted", name', "text": "one\r\ntwo"},
    {"query": "Where?", "target": " 007 ", "text": "שלום 👩‍👩‍👧‍👦 e\u0301"},
    {"query": "When?", "target": "x" * 200_000, "text": "\u2028null"},
]


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_format_gives_the_same_rows_in_order(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"facts{suffix}"
    WRITERS[suffix](path, ROWS)
    assert [row.values for row in read_rows(path, Columns(("query", "target", "text")))] == ROWS
    assert [(pair.query, pair.target) for pair in read_pairs(path)] == [(row["query"], row["target"]) for row in ROWS]


# Arbitrary text, with line breaks, separators and quotes; not in YAML, which has no control characters.
@settings(max_examples=50, deadline=None)
@given(rows=st.lists(st.fixed_dictionaries({"query": st.text(min_size=1), "target": st.text(min_size=1)}), min_size=1))
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_any_text_round_trips_through_json_lines_csv_and_parquet(
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
def test_the_source_of_a_pair_is_the_line_on_which_it_starts(
    tmp_path: Path, name: str, content: str, places: list[str]
) -> None:
    assert [pair.source for pair in read_pairs(file_of(tmp_path / name, content))] == places


def test_the_source_of_a_pair_in_a_parquet_file_is_its_row(tmp_path: Path) -> None:
    write_parquet(tmp_path / "f.parquet", ROWS)
    assert [pair.source for pair in read_pairs(tmp_path / "f.parquet")] == [f"f.parquet row {i}" for i in (1, 2, 3)]


def refused(path: Path) -> str:
    """Return the message with which a file is refused, which must be a single line of limited length."""
    with pytest.raises(InputError) as error:
        list(read_pairs(path))
    message = str(error.value)
    assert len(message.splitlines()) == 1
    assert len(message) < 600
    return message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"query": "a", "target": "1", "target": "2"}',
            "f.jsonl:1: the key 'target' occurs twice in one object; keep",
        ),
        ('{"query": "a", "target": "1", "x": [{"y": 1, "y": 1}]}', "f.jsonl:1: the key 'y' occurs twice"),
        ('{"query": "a", "target": "1", "": 1, "": 2}', "f.jsonl:1: the key '' occurs twice"),
        ('{"\\ud800": 1, "\\ud800": 2}', r"f.jsonl:1: the key '\ud800' occurs twice"),
        (f'{{"{"k" * 10_000}": 1, "{"k" * 10_000}": 2}}', "f.jsonl:1: the key 'kkk"),
        (
            f'{{"query": "a", "target": -{"3" * 4400}}}',
            "f.jsonl:1: a number of 4400 digits, which cannot be read; write",
        ),
        (
            f'{{"query": "a", "target": {"3" * 4000}}}',
            "f.jsonl:1: 'target' is a number of many digits; expected a string",
        ),
        ('{"query": "a", "target": NaN}', "f.jsonl:1: 'target' is nan; expected a string, in quotes"),
        ('{"query": "a", "target": 1e999}', "f.jsonl:1: 'target' is inf; expected a string, in quotes"),
        ('{"query": "a", "target": true}', "f.jsonl:1: 'target' is true; expected a string, in quotes"),
        (f'{{"query": "a", "target": [{"1, " * 9999}1]}}', "f.jsonl:1: 'target' is a list of 10000; expected a string"),
        ('{"query": "a", "target": {"b": 1}}', "f.jsonl:1: 'target' is an object; expected a string, in quotes"),
        (
            f'{{"query": "a", "target": {"[" * 500}{"]" * 500}}}',
            "f.jsonl:1: 'target' is a list of 1; expected a string",
        ),
        ("[" * 100_000, "f.jsonl:1: a JSON list; expected an object, one a line, without brackets"),
        ('{"a":' * 100_000, "f.jsonl:1: nested too deeply to be read; expected text in columns"),
        (
            '[\n{"query": "a", "target": "1"}\n]',
            "f.jsonl:1: a JSON list; expected an object, one a line, without brackets",
        ),
        ('{\n"query": "a", "target": "1"}', "f.jsonl:1: malformed JSON at column 3 (Expecting property name"),
        (
            '{"query": "a", "target": "1"} {"query": "b"}',
            "f.jsonl:1: malformed JSON at column 31 (Extra data); expected",
        ),
        (
            '{"query": "a", "target": "1"},',
            "f.jsonl:1: malformed JSON at column 30 (Extra data); expected one whole object",
        ),
        ('{"query": "a\0", "target": "1"}', "f.jsonl:1: malformed JSON at column 13 (Invalid control character"),
        ("7", "f.jsonl:1: a JSON int; expected an object, one a line"),
        (
            '{"query": "a", "target": "1"}'.encode("utf-16"),
            "f.jsonl:1: not UTF-8 (it looks like UTF-16); save the file",
        ),
        ('{"query": "a", "target": "1"}'.encode("utf-16-le"), "f.jsonl:1: not UTF-8 (it looks like UTF-16); save"),
        (json.dumps({f"c{i}": "" for i in range(9999)}), "f.jsonl:1: no column 'query'; found 'c0', 'c1', 'c2'"),
    ],
)
def test_invalid_json_lines_are_refused_with_the_line_and_the_reason(
    tmp_path: Path, content: bytes | str, message: str
) -> None:
    assert refused(file_of(tmp_path / "f.jsonl", content)).startswith(message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("query,target\na,1\nb,2,3\n", "f.csv:3: 3 fields, and the header has 2; put text with commas"),
        ('query,target\na,"1\n', "f.csv:2: malformed CSV (unexpected end of data)"),
        ("query,number\na,1\n", "f.csv:1: no column 'target'; found 'query', 'number'; write columns 'query' and"),
        ("query,target\na,\n", "f.csv:2: the target is empty"),
        (
            'query,target\na,1\nb, "4071#"\n',
            "f.csv:3: 'target' is ' \"4071#\"', with quotes that follow a space and so are part of the text; write "
            '\'"4071#"\' directly after the comma, or \'" ""4071#"""\' if the text has them',
        ),
        (b"query,target\na,1\n\xe4,2\n", "f.csv:3: not UTF-8 (byte 1 is 0xe4); save the file with"),
        ("query,target,target\na,1,2\n", "f.csv:1: two columns have the name 'target'; give each a name of its own"),
        ("query;target\na;1\n", "f.csv:1: the columns are separated by ';'; save the file with commas"),
        ("query\ttarget\na\t1\n", "f.csv:1: the columns are separated by '\\t'; save the file with commas"),
        ("query,target\ra,1\r", "f.csv:1: a carriage return outside of quotes; save the file with line feeds"),
        ("query,target\n".encode("utf-16"), "f.csv:1: not UTF-8 (it looks like UTF-16)"),
        (",".join(f"c{i}" for i in range(9999)), "f.csv:1: no column 'query'; found 'c0', 'c1', 'c2'"),
    ],
)
def test_invalid_csv_is_refused_with_the_line_and_the_reason(
    tmp_path: Path, content: bytes | str, message: str
) -> None:
    assert refused(file_of(tmp_path / "f.csv", content)).startswith(message)


def test_quotes_after_a_space_are_text_if_the_field_stands_in_quotes(tmp_path: Path) -> None:
    path = file_of(tmp_path / "f.csv", 'query,target\na," ""4071#"""\n"b"," ""x"", ""y"""\nc, "z" or "Z\n')
    assert [pair.target for pair in read_pairs(path)] == [' "4071#"', ' "x", "y"', ' "z" or "Z']


LAUGHS = "".join(f"  l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]\n" for i in range(1, 12))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- query: a\n  target: '1'\n  target: '2'\n", "f.yaml:3: the key 'target' occurs twice in one mapping; keep"),
        ("- query: a\n  target: '1'\n  x: [{y: 1, 'y': 1}]\n", "f.yaml:3: the key 'y' occurs twice in one mapping"),
        ("- {query: a, target: '1', <<: {target: '2'}}\n", "f.yaml:1: a merge key (<<); write the keys out"),
        ("- query: a\n  target: &a [*a]\n", "f.yaml:2: a list or mapping inside itself, *a; write it out"),
        ("- &a\n  query: a\n  target: *a\n", "f.yaml:3: a list or mapping inside itself, *a; write it out"),
        (
            f"- query: a\n  l0: &l0 [ha]\n{LAUGHS}  target: *l11\n",
            "f.yaml:1: 'target' is a list of 9; expected a string",
        ),
        ("- query: a\n  target: " + "[" * 100_000, "f.yaml:2: more than 64 lists and mappings inside each other"),
        ("- query: a\n  target: " + "{a: " * 100_000, "f.yaml:2: more than 64 lists and mappings inside each other"),
        ("- query: a\n  target: 7\n", "f.yaml:1: 'target' is 7; expected a string, in quotes"),
        ("- query: a\n  target: 007\n", "f.yaml:1: 'target' is 007; expected a string, in quotes"),
        ("- query: a\n  target: 2026-01-01\n", "f.yaml:1: 'target' is 2026-01-01; expected a string, in quotes"),
        ("- query: a\n  target: 2024-13-45\n", "f.yaml:1: 'target' is 2024-13-45; expected a string, in quotes"),
        ("- query: a\n  target: !!int x\n", "f.yaml:1: 'target' is x; expected a string, in quotes"),
        ("- query: a\n  target: " + "9" * 9999, "f.yaml:1: 'target' is 999"),
        ("- query: a\n  target: yes\n", "f.yaml:1: 'target' is yes; expected a string, in quotes"),
        ("- query: a\n  target:\n", "f.yaml:1: 'target' is null; expected a string, in quotes"),
        ("- query: a\n  target: [b]\n", "f.yaml:1: 'target' is a list of 1; expected a string, in quotes"),
        ("- query: a\n  target: 'b\n", "f.yaml:3: malformed YAML"),
        ("- query: a\n  target:\tb\n", "f.yaml:2: malformed YAML (while scanning for the next token, found character"),
        ('- "\\U00110000"\n', "f.yaml:1: malformed YAML (chr() arg not in range"),
        ('- a\n- "\\UFFFFFFFF"\n', "f.yaml:2: malformed YAML (Python int too large"),
        ("- query: a\n  target: b\n---\n- c\n", "f.yaml:3: malformed YAML (expected a single document in the stream,"),
        ("query: a\n", "f.yaml:1: a YAML map; expected a list"),
        ("!!seq {query: a}\n", "f.yaml:1: a YAML seq; expected a list"),
        ("- a\n", "f.yaml:1: 'a'; expected a mapping with 'query' and 'target'"),
        ("- ? [a]\n  : b\n", "f.yaml:1: a list or mapping as a key; expected a name"),
        ("- query: a\n- query: \x07\n", "f.yaml:2: YAML has no character 0x7; write it as an escape"),
        ("- !!python/name:os.system\n", "f.yaml:1: the tag '!!python/name:os.system' is not read; expected text"),
        ("- !!python/object/apply:os.system [ls]\n", "f.yaml:1: the tag '!!python/object/apply:os.system' is not read"),
        (b"- query: \xff\n", "f.yaml:1: not UTF-8"),
    ],
)
def test_invalid_yaml_is_refused_with_the_line_and_the_reason(
    tmp_path: Path, content: bytes | str, message: str
) -> None:
    assert refused(file_of(tmp_path / "f.yaml", content)).startswith(message)


def test_yaml_text_may_use_anchors_and_other_columns_may_hold_any_value(tmp_path: Path) -> None:
    path = file_of(
        tmp_path / "f.yaml", "- query: &who Who?\n  target: me\n  day: 2024-13-45\n- {query: When, target: *who}\n"
    )
    assert [(pair.query, pair.target) for pair in read_pairs(path)] == [("Who?", "me"), ("When", "Who?")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("f.csv", "", "f.csv: the file is empty; expected rows with 'query' and 'target'"),
        ("f.csv", "query,target\n", "f.csv: a header and no rows; expected rows with 'query' and 'target'"),
        ("f.yaml", "", "f.yaml: the file is empty"),
        ("f.yaml", "[]", "f.yaml: the file is empty"),
        ("f.jsonl", "\n\n", "f.jsonl: the file is empty"),
        ("f.parquet", "", "f.parquet: malformed Parquet (Parquet file size is 0 bytes"),
        ("f.parquet", "query,target", "f.parquet: malformed Parquet (Parquet magic bytes not found"),
        ("f.txt", "a 1", "f.txt: a .txt file cannot be read as rows; expected one of .jsonl, .csv, "),
        ("f", "a 1", "f: a file without a suffix cannot be read as rows"),
    ],
)
def test_files_without_rows_or_in_an_unknown_format_are_refused(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    assert message in refused(file_of(tmp_path / name, content))


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("f.jsonl", '{"query": "a", "target": "1"}'),
        ("f.csv", '"query",target\na,1'),
        ("f.yaml", "- {query: a, target: '1'}"),
    ],
)
def test_a_byte_order_mark_is_not_part_of_the_first_column_name(
    tmp_path: Path, mark: str, name: str, content: str
) -> None:
    assert [(pair.query, pair.target) for pair in read_pairs(file_of(tmp_path / name, mark + content))] == [("a", "1")]


def parquet_of(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


NOT_UTF8 = pa.Array.from_buffers(
    pa.string(), 2, [None, pa.array([0, 1, 2], pa.int32()).buffers()[1], pa.py_buffer(b"1\xff")]
)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (["1", None], "f.parquet row 2: 'target' is null; expected a string, in quotes"),
        ([7, 8], "f.parquet row 1: 'target' is 7; expected a string, in quotes"),
        ([b"1", b"2"], "f.parquet row 1: 'target' is binary data; expected a string"),
        ([["1"], ["2"]], "f.parquet row 1: 'target' is a list of 1; expected a string"),
        ([{"a": "1"}, {"a": "2"}], "f.parquet row 1: 'target' is an object; expected a string"),
        (pa.array([Decimal("1.50"), None]), "f.parquet row 1: 'target' is 1.50; expected a string"),
        (
            pa.array([2**62, 1], pa.timestamp("us")),
            "f.parquet row 1: 'target' is a 'timestamp[us]' that cannot be read",
        ),
        (pa.array([2**30, 1], pa.date32()), "f.parquet row 1: 'target' is a 'date32[day]' that cannot be read"),
        (
            pa.StructArray.from_arrays([pa.array(["1", "2"])] * 2, names=["k", "k"]),
            "f.parquet row 1: 'target' is a 'struct<k: string, k: string>' that cannot be read",
        ),
        (NOT_UTF8, "f.parquet row 2: 'target' is text that is not UTF-8; write the file again"),
    ],
)
def test_parquet_values_that_are_not_text_are_refused_with_their_row(tmp_path: Path, target: Any, message: str) -> None:
    assert refused(parquet_of(tmp_path / "f.parquet", query=["a", "b"], target=target)).startswith(message)


@pytest.mark.parametrize(
    "target",
    [
        pa.array(["1", "2"], pa.large_string()),
        pa.array(["1", "2"], pa.string_view()),
        pa.array(["1", "2"]).dictionary_encode(),
    ],
)
def test_large_view_and_dictionary_strings_in_parquet_are_read_as_text(tmp_path: Path, target: pa.Array) -> None:
    path = parquet_of(tmp_path / "f.parquet", query=["a", "b"], target=target)
    assert [pair.target for pair in read_pairs(path)] == ["1", "2"]


def test_two_parquet_columns_with_the_same_name_are_refused(tmp_path: Path) -> None:
    columns = [pa.array([text]) for text in "abcd"]
    pq.write_table(pa.table(columns, names=["query", "target", "x", "x"]), tmp_path / "f.parquet")
    assert refused(tmp_path / "f.parquet").startswith("f.parquet: two columns have the name 'x'; give each a name")


def test_parquet_columns_that_are_not_requested_are_not_read(tmp_path: Path) -> None:
    day = pa.array([2**62], pa.timestamp("us"))  # too late for a Python datetime
    path = parquet_of(tmp_path / "f.parquet", query=["a"], target=["1"], day=day, messages=day)
    (row,) = read_rows(path, Columns(("query", "target")), Columns(("messages",)))
    assert row.values == {"query": "a", "target": "1"}
    with pytest.raises(InputError, match=r"^f\.parquet row 1: 'day' is a 'timestamp"):
        list(read_rows(path))


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet", ".yaml"])
def test_a_path_that_is_not_a_regular_file_is_refused_without_blocking(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"folder{suffix}").mkdir()
    os.mkfifo(tmp_path / f"pipe{suffix}")
    (tmp_path / f"device{suffix}").symlink_to("/dev/zero")
    (tmp_path / f"broken{suffix}").symlink_to("elsewhere")
    for name, reason in {
        "folder": "it is a folder",
        "pipe": "it is a pipe",
        "device": "it is a device or socket",
        "broken": "a link to elsewhere, which is not there",
        "none": "No such file or directory",
        "nul\0": "embedded null byte",
        "long" * 70: "File name too long",
    }.items():
        assert f"cannot be read ({reason}); expected a file" in refused(tmp_path / f"{name}{suffix}")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet", ".yaml"])
@pytest.mark.parametrize("fault", [PermissionError(13, "Permission denied"), FileNotFoundError(2, "No such file")])
def test_an_unreadable_or_vanished_file_is_named_in_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, fault: OSError
) -> None:
    WRITERS[suffix](tmp_path / f"f{suffix}", ROWS)

    def opening(*_: object) -> None:
        raise fault

    monkeypatch.setattr(Path, "open", opening)
    assert f"f{suffix}: cannot be read ({fault.strerror}); expected a file" in refused(tmp_path / f"f{suffix}")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("f.jsonl", '{"query": "a", "target": "1", "target": "2"}', "f.jsonl:1: the key 'target' occurs twice"),
        ("f.jsonl", f'{{"query": "a", "target": {"3" * 4400}}}', "f.jsonl:1: a number of 4400 digits"),
        ("f.csv", "query,target,target\na,1,2\n", "f.csv:1: two columns have the name 'target'"),
        ("f.yaml", "- {query: a, target: '1', target: '2'}", "f.yaml:1: the key 'target' occurs twice"),
        ("f.parquet", "query,target", "malformed Parquet"),
    ],
)
def test_the_command_line_reports_an_invalid_file_in_one_line(
    tiny_backbone_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: str,
    message: str,
) -> None:
    path = file_of(tmp_path / name, content)
    model = ["--model=SFT", f"--model.backbone={tiny_backbone_folder}"]
    code = main(["data", *model, "--data=Facts", f"--data.path={path}"])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


def read_or_refuse(path: Path) -> None:
    """Read a file to its end or have it refused in one line; any other exception fails the test."""
    for read in (read_pairs, read_rows):
        try:
            for _ in read(path):
                pass
        except InputError as error:
            assert len(str(error).splitlines()) == 1, str(error)
            assert len(str(error)) < 1000


SUFFIXES = [".jsonl", ".csv", ".parquet", ".yaml"]
WORDS = "query target messages \" ' : , { } [ ] &a *a << !!int ? | > % --- \\u \\ud800 1e9 NaN # 2024-13-45 0x ~"
PIECES = [*WORDS.split(), ": ", "- ", "\n", "\0", "\r", "\t", " ", "\ufeff"]
"""Pieces of the syntax of all formats, of which random files are made."""


@settings(max_examples=200, deadline=None)
@given(content=st.one_of(st.binary(), st.lists(st.sampled_from(PIECES)).map(lambda pieces: "".join(pieces).encode())))
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_any_bytes_are_read_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, content: bytes
) -> None:
    read_or_refuse(file_of(tmp_path_factory.getbasetemp() / f"any{suffix}", content))


PART = {"type": "text", "text": "me"}
CHATS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": [PART]}, {"role": "assistant", "content": [PART]}]},
    {"instruction": "Add.", "input": "1, 2", "output": "3", "system": ""},
]


@settings(max_examples=200, deadline=None)
@given(
    rows=st.sampled_from([ROWS[:2], CHATS[:1] * 2, CHATS[1:] * 2]),
    changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 3), st.binary(max_size=4)), min_size=1, max_size=4),
)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_damaged_files_are_read_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory,
    suffix: str,
    rows: list[dict[str, Any]],
    changes: list[tuple[float, int, bytes]],
) -> None:
    path = tmp_path_factory.getbasetemp() / f"damaged{suffix}"
    if suffix == ".csv":
        rows = [{column: str(value) for column, value in row.items()} for row in rows]
    WRITERS[suffix](path, rows)
    content = path.read_bytes()
    for share, removed, put in changes:
        at = round(share * len(content))
        content = content[:at] + put + content[at + removed :]
    read_or_refuse(file_of(path, content))


def test_a_parquet_file_without_a_required_column_is_refused_with_the_columns_it_has(tmp_path: Path) -> None:
    write_parquet(tmp_path / "f.parquet", [{"query": "a", "answer": "1"}])
    with pytest.raises(InputError, match=r"^f\.parquet: no column 'target'; found 'query', 'answer'"):
        list(read_pairs(tmp_path / "f.parquet"))


def test_a_null_in_a_parquet_column_is_refused_with_its_row(tmp_path: Path) -> None:
    pq.write_table(pa.table({"query": ["a", "b"], "target": ["1", None]}), tmp_path / "f.parquet")
    with pytest.raises(InputError, match=r"^f\.parquet row 2: 'target' is null; expected a string"):
        list(read_pairs(tmp_path / "f.parquet"))


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_reading_pairs_takes_less_than_a_quarter_of_the_file_size_in_memory(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"large{suffix}"
    content = Random(3)
    rows = [{"query": f"q{i}", "target": content.randbytes(5_000).hex()} for i in range(1_000)]
    WRITERS[suffix](path, rows)
    del rows
    size = 10_000_000
    characters, outside_python = 0, []
    tracemalloc.start()
    try:
        for pair in read_pairs(path):
            characters += len(pair.target)
            outside_python.append(pa.total_allocated_bytes())
        peak = tracemalloc.get_traced_memory()[1] + max(outside_python)
    finally:
        tracemalloc.stop()
    assert characters == size
    assert peak < size / 4
