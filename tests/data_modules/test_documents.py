"""Documents from files, folders, datasets and the standard library: exact text, and errors with their place."""

import os
import sys
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from row_files import WRITERS, file_of, write_jsonl, write_parquet

from data_modules._documents import Document, read_documents
from data_modules._hub import dataset_documents
from data_modules._standard_library import documentation_strings
from pml.errors import InputError


def whole(documents: Iterable[Document]) -> list[tuple[str, str]]:
    return [(document.title, "".join(document.blocks)) for document in documents]


def test_a_plain_text_file_is_one_document_with_its_exact_text(tmp_path: Path) -> None:
    text = "\tWindows\r\nUnix\nend\u2028 " + "é" * 70_000  # long enough for a block to end inside a character
    path = file_of(tmp_path / "a.txt", b"\xef\xbb\xbf" + text.encode())
    assert whole(read_documents([path])) == [("a.txt", text)]


def test_html_is_read_without_markup_scripts_and_styles_but_with_its_paragraphs(tmp_path: Path) -> None:
    html = (
        "<html><head><title>T</title><style>p {color: red}</style></head><body><script>run()</script>"
        "<p>One <b>bold</b> &amp; whole.</p><p>Two</p></body></html>"
    )
    ((title, text),) = whole(read_documents([file_of(tmp_path / "a.html", html)]))
    assert (title, text.split("\n")[0], text.split("\n")[-1]) == ("a.html", "One bold & whole.", "Two")
    assert not any(code in text for code in ("<", "color", "run"))


@pytest.mark.skipif(sys.platform == "darwin", reason="file names have to be UTF-8 there")
def test_the_name_of_a_file_that_is_not_utf8_becomes_text(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path)
    for name, content in ((b"caf\xe9.txt", b"one"), (b"caf\xe9.jsonl", b'{"text": "two"}')):
        with open(os.path.join(folder, name), "wb") as file:
            file.write(content)
    found = whole(read_documents([tmp_path]))
    assert found == [("caf\ufffd.jsonl:1", "two"), ("caf\ufffd.txt", "one")]


def test_documents_behind_a_link_to_a_folder_are_read(tmp_path: Path) -> None:
    file_of(tmp_path / "elsewhere" / "b.txt", "two")
    file_of(tmp_path / "notes" / "a.txt", "one")
    (tmp_path / "notes" / "more").symlink_to(tmp_path / "elsewhere")
    assert whole(read_documents([tmp_path / "notes"])) == [("a.txt", "one"), ("more/b.txt", "two")]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_each_row_is_a_document_named_after_its_title_or_else_its_place_in_the_file(
    tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"a{suffix}"
    WRITERS[suffix](path, [{"title": "First", "text": "one"}, {"title": "", "text": "two"}])
    (first, second) = whole(read_documents([path]))
    assert first == ("First", "one")
    assert second[0].startswith(f"a{suffix}")
    assert second[1] == "two"


def test_the_text_can_come_from_another_column(tmp_path: Path) -> None:
    path = file_of(tmp_path / "a.jsonl", '{"body": "one", "text": "two"}')
    assert [text for _, text in whole(read_documents([path], "body"))] == ["one"]


def test_a_folder_is_read_sorted_by_path_without_hidden_empty_or_non_text_files(tmp_path: Path) -> None:
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
        ("a.txt", "text".encode("utf-16"), r"^a\.txt:1: not UTF-8 \(it looks like UTF-16\); save the file"),
        ("a.jsonl", b'{"text": "x", "text": "y"}', r"^a\.jsonl:1: the key 'text' occurs twice in one object; keep"),
        ("a.jsonl", b'{"text": "x", "title": "\\ud800"}', r"^a\.jsonl:1: 'title' holds half a surrogate pair"),
        ("a.csv", b"text,text\nx,y\n", r"^a\.csv:1: two columns have the name 'text'; give each a name of its own"),
        (
            "a.jsonl",
            b'{"body": "x"}',
            r"^a\.jsonl:1: no column 'text'; found 'body'; name the column with the text by data\.column",
        ),
        ("a.pdf", b"x", r"a\.pdf: a \.pdf file cannot be read as text; expected one of \.txt, \.md"),
    ],
)
def test_an_invalid_file_is_refused_with_its_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        whole(read_documents([file_of(tmp_path / name, content)]))


@settings(max_examples=100, deadline=None)
@given(
    content=st.binary(),
    tags=st.lists(st.sampled_from(["<p>", "</p>", "<table>", "<td colspan=x>", "<!--", "<pre>", "&#0;"])),
)
@pytest.mark.parametrize("suffix", [".txt", ".html", ".jsonl", ".csv", ".parquet"])
def test_arbitrary_bytes_are_read_or_refused_with_a_one_line_error(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, content: bytes, tags: list[str]
) -> None:
    path = file_of(tmp_path_factory.getbasetemp() / f"any{suffix}", content + "".join(tags).encode())
    try:
        whole(read_documents([path]))
    except InputError as error:
        assert len(str(error).splitlines()) == 1, str(error)


@pytest.mark.parametrize("suffix", [".txt", ".html"])
def test_a_pipe_or_a_broken_link_is_refused_without_waiting(tmp_path: Path, suffix: str) -> None:
    os.mkfifo(tmp_path / f"pipe{suffix}")
    (tmp_path / f"broken{suffix}").symlink_to("elsewhere")
    for name, reason in {"pipe": "it is a pipe", "broken": "a link to elsewhere, which is not there"}.items():
        with pytest.raises(InputError, match=rf"cannot be read \({reason}\); expected a file"):
            whole(read_documents([tmp_path / f"{name}{suffix}"]))


def test_a_file_name_that_is_too_long_is_refused() -> None:
    with pytest.raises(InputError, match=r"cannot be read \(File name too long\); expected a file"):
        whole(read_documents(["a" * 999 + ".txt"]))


def test_the_error_for_a_file_without_read_permission_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opening(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = file_of(tmp_path / "a.txt", "text")
    monkeypatch.setattr(Path, "open", opening)
    with pytest.raises(InputError, match=r"a\.txt: cannot be read \(Permission denied\); expected a file"):
        whole(read_documents([path]))


def test_the_error_for_a_missing_file_names_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.txt: cannot be read \(No such file or directory\)"):
        whole(read_documents([tmp_path / "none.txt"]))


def test_a_folder_without_text_is_refused_with_the_expected_suffixes(tmp_path: Path) -> None:
    file_of(tmp_path / "picture.png", "x")
    with pytest.raises(InputError, match=r"no text in this folder; expected files of \.txt, "):
        whole(read_documents([tmp_path]))


def test_docstrings_of_the_standard_library_come_in_order_of_module_name_and_source() -> None:
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


def test_modules_of_the_standard_library_are_parsed_and_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_rows_of_a_dataset_without_text_are_skipped_unless_all_are(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="the package datasets is not installed")
    rows = [{"text": "", "other": ""}, {"text": "one", "other": None}, {"text": None, "other": ""}]
    write_parquet(tmp_path / "train.parquet", rows)
    assert whole(dataset_documents(str(tmp_path), None, "train", "text")) == [(f"{tmp_path} row 2", "one")]
    with pytest.raises(InputError, match=r"no row of 'train' has text in the column 'other'; name another"):
        whole(dataset_documents(str(tmp_path), None, "train", "other"))


@pytest.mark.parametrize(
    ("split", "column", "message"),
    [
        ("test", "text", r"dataset '.*' cannot be read: .*test"),
        ("train", "body", r"row 1: no column 'body'; found 'text'"),
    ],
)
def test_a_dataset_without_the_requested_split_or_column_is_refused(
    tmp_path: Path, split: str, column: str, message: str
) -> None:
    pytest.importorskip("datasets", reason="the package datasets is not installed")
    write_parquet(tmp_path / "train.parquet", [{"text": "one"}])
    with pytest.raises(InputError, match=message) as error:
        whole(dataset_documents(str(tmp_path), None, split, column))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.csv", b"text,text\na,b\n", r"two columns have the name 'text', or one has 'text\.1'; rename one"),
        ("train.jsonl", b'{"text": "a", "text": "b"}\n', r"cannot be read: .*Column\(/text\) was specified twice"),
        ("train.jsonl", b'{"text": 7}\n', r"row 1: 'text' is 7; expected a string, in quotes"),
        ("train.jsonl", b'{"text": ' + b"[" * 100_000, r"cannot be read: JSON parse error"),
        ("train.parquet", b"PAR1", r"cannot be read: Parquet file size is 4 bytes"),
    ],
)
def test_a_malformed_or_ambiguous_dataset_is_refused_with_a_one_line_error(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    pytest.importorskip("datasets", reason="the package datasets is not installed")
    file_of(tmp_path / name, content)
    with pytest.raises(InputError, match=message) as error:
        whole(dataset_documents(str(tmp_path), None, "train", "text"))
    assert len(str(error.value).splitlines()) == 1


def test_a_parquet_dataset_with_duplicate_columns_or_out_of_range_dates_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="the package datasets is not installed")
    days = pa.array([2**62], pa.timestamp("us"))  # beyond 9999, the last year of datetime
    for i, (table, message) in enumerate(
        [
            (pa.table([["a"], ["b"]], names=["text", "text"]), r"cannot be read: Multiple matches"),
            (pa.table({"text": days}), r"cannot be read: date value out of range"),
        ]
    ):
        (tmp_path / f"{i}").mkdir()
        pq.write_table(table, tmp_path / f"{i}" / "train.parquet")
        with pytest.raises(InputError, match=message) as error:
            whole(dataset_documents(str(tmp_path / f"{i}"), None, "train", "text"))
        assert len(str(error.value).splitlines()) == 1


def test_a_dataset_that_is_not_text_is_refused_with_its_kind(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="the package datasets is not installed")
    file_of(tmp_path / "train" / "a.png", "x")
    with pytest.raises(InputError, match=r"is of the kind 'image_?folder'; expected one of arrow, csv"):
        whole(dataset_documents(str(tmp_path), None, "train", "text"))


def test_a_missing_datasets_package_is_reported_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'pml\[hub\]'"):
        whole(dataset_documents("any", None, "train", "text"))
