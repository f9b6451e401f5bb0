"""Phone books: generated ones of any size, the published files, and malformed files."""

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers.normalizers import Lowercase
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from data_modules import PhoneBook
from data_modules._pairs import read_pairs
from pml.backbone import Backbone
from pml.corpus import Pair, encode_pairs
from pml.encoding import TextEncoder
from pml.errors import InputError

VOCABULARY = 259


def entries(tokenizer: PreTrainedTokenizerBase, **options: Any) -> list[tuple[str, str]]:
    """Queries and targets of a book as text."""
    options = {"chat_template": False, "end_of_turn": False, **options}
    corpus = PhoneBook(**options).build(tokenizer, VOCABULARY)
    return [
        (str(tokenizer.decode(list(e.prompt_ids))), str(tokenizer.decode(list(e.target_ids)))) for e in corpus.examples
    ]


def written(tmp_path: Path, *lines: str | bytes) -> Path:
    path = tmp_path / "book.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return path


def row(query: str, target: str) -> str:
    return json.dumps({"query": query, "target": target})


def test_entries_are_distinct_names_with_ten_digit_numbers(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    book = entries(tiny_tokenizer, pairs=2000)
    assert len({query for query, _ in book}) == 2000
    assert all(re.fullmatch(r"\S+ \S+:", query) for query, _ in book)
    assert all(re.fullmatch(r"[1-9]\d{9}", number) for _, number in book)
    assert {number[0] for _, number in book} == set("123456789")


def test_a_book_without_a_size_has_32_pairs(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(entries(tiny_tokenizer)) == 32


@pytest.mark.parametrize("size", [{"pairs": 4}, {"target_tokens": 40}])
def test_each_query_that_the_tokenizer_changes_is_counted_once(
    size: dict[str, int], tiny_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.normalizer = Lowercase()
    book = PhoneBook(chat_template=False, **size).build(tokenizer, VOCABULARY)  # type: ignore[arg-type]
    (line,) = [message for message in caplog.messages if message.startswith("phonebook: ")]
    assert line.startswith(f"phonebook: {len(book)} queries are changed by the tokenizer")


@pytest.mark.parametrize(("target_tokens", "pairs"), [(1000, 100), (1009, 100), (10, 1)])
def test_a_book_sized_by_target_tokens_holds_as_many_numbers_as_fit(
    tiny_tokenizer: PreTrainedTokenizerBase, target_tokens: int, pairs: int
) -> None:
    corpus = PhoneBook(target_tokens=target_tokens, end_of_turn=False).build(tiny_tokenizer, VOCABULARY)
    assert (len(corpus), corpus.target_tokens) == (pairs, pairs * 10)


def test_the_end_of_turn_adds_one_target_token_per_pair_and_does_not_change_the_size(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    corpus = PhoneBook(target_tokens=1000).build(tiny_tokenizer, VOCABULARY)
    assert (len(corpus), corpus.target_tokens) == (100, 1100)


def test_the_entropy_of_a_book_is_that_of_its_numbers(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    corpus = PhoneBook(pairs=7).build(tiny_tokenizer, VOCABULARY)
    assert corpus.entropy_bits == pytest.approx(7 * math.log2(9_000_000_000))


def test_a_larger_book_starts_with_the_smaller_book_of_the_same_seed(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    assert (
        entries(tiny_tokenizer, pairs=50)[:20]
        == entries(tiny_tokenizer, pairs=20)
        == entries(tiny_tokenizer, target_tokens=200)
    )


def test_the_seed_determines_names_and_numbers(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    one, two = entries(tiny_tokenizer, seed=1), entries(tiny_tokenizer, seed=2)
    assert one == entries(tiny_tokenizer, seed=1)
    assert {query for query, _ in one} != {query for query, _ in two}
    assert not {number for _, number in one} & {number for _, number in two}


def test_a_corpus_can_be_rebuilt_from_its_settings(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    corpus = PhoneBook(target_tokens=100, end_of_turn=False, seed=3).build(tiny_tokenizer, VOCABULARY)
    assert PhoneBook(**corpus.settings).build(tiny_tokenizer, VOCABULARY).content_hash == corpus.content_hash
    default = PhoneBook().build(tiny_tokenizer, VOCABULARY)
    assert PhoneBook(**default.settings).build(tiny_tokenizer, VOCABULARY).content_hash == default.content_hash


@pytest.mark.parametrize("name", ["PB1000", "PB2000", "PB4000", "PB8000"])
def test_the_name_of_a_published_book_states_its_number_of_target_tokens(
    tiny_tokenizer: PreTrainedTokenizerBase, shared_folder: Path, name: str
) -> None:
    path = shared_folder / "data" / "phonebook" / "qwen" / f"{name}.jsonl"
    corpus = PhoneBook(path=str(path), end_of_turn=False).build(tiny_tokenizer, VOCABULARY)
    assert corpus.target_tokens == int(name.removeprefix("PB"))
    assert corpus.name == f"{name}.jsonl"
    assert corpus.entropy_bits is None


def test_pairs_are_read_in_file_order_with_their_line_numbers(tmp_path: Path) -> None:
    path = written(
        tmp_path, '{"id": 1, "query": "a:", "target": "1"}', "", '{"target": "ü\u2028", "query": "b:"}\r', ""
    )
    assert list(read_pairs(path)) == [Pair("a:", "1", "book.jsonl:1"), Pair("b:", "ü\u2028", "book.jsonl:3")]


def test_a_byte_order_mark_is_not_part_of_the_first_line(tmp_path: Path) -> None:
    path = written(tmp_path, b"\xef\xbb\xbf" + row("a:", "1").encode())
    assert [pair.query for pair in read_pairs(path)] == ["a:"]


def test_columns_can_have_other_names(tmp_path: Path) -> None:
    path = written(tmp_path, '{"question": "a", "matching": "1"}')
    assert list(read_pairs(path, query="question", target="matching")) == [Pair("a", "1", "book.jsonl:1")]


def test_pairs_before_a_malformed_line_are_read_lazily(tmp_path: Path) -> None:
    pairs = read_pairs(written(tmp_path, row("a:", "1"), "{"))
    assert next(pairs).query == "a:"


@pytest.mark.parametrize(
    ("second_line", "message"),
    [
        ('{"query": "b:", "target": }', r"malformed JSON at column 27"),
        ('["b:", "2"]', "a JSON list; expected an object"),
        ('{"query": "b:", "number": "2"}', "no column 'target'; found 'query', 'number'"),
        ("{}", "no column 'query'; found none"),
        ('{"query": "b:", "target": 9100672710}', "'target' is 9100672710; expected a string"),
        ('{"query": null, "target": "2"}', "'query' is null; expected a string"),
        ('{"query": "b:", "target": ""}', "the target is empty"),
        ('{"query": "", "target": "2"}', "the query is empty"),
        ('{"query": "b:", "target": "\\ud83d"}', "'target' holds half a surrogate pair"),
        (b'{"query": "b\xfc:", "target": "2"}', r"not UTF-8 \(byte 13 is 0xfc\)"),
    ],
)
def test_the_error_for_a_malformed_line_names_file_and_line(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, second_line: str | bytes, message: str
) -> None:
    path = written(tmp_path, row("a:", "1"), second_line)
    with pytest.raises(InputError, match=rf"^book\.jsonl:2: .*{message}"):
        PhoneBook(path=str(path)).build(tiny_tokenizer, VOCABULARY)


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_a_file_without_pairs_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(InputError, match=r"book\.jsonl: the file is empty"):
        list(read_pairs(written(tmp_path, content)))


def test_the_error_for_a_missing_file_names_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.jsonl: cannot be read \(No such file or directory\)"):
        list(read_pairs(tmp_path / "none.jsonl"))


def test_identical_pairs_are_merged_at_the_position_of_the_first(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = written(tmp_path, row("a:", "1"), row("b:", "2"), row("a:", "1"))
    assert entries(tiny_tokenizer, path=str(path)) == [("a:", "1"), ("b:", "2")]


def test_queries_with_conflicting_targets_are_listed_with_their_lines(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = written(tmp_path, row("a:", "1"), row("b:", "2"), row("a:", "3"), row("c:", "4"), row("c:", "5"))
    with pytest.raises(InputError) as error:
        PhoneBook(path=str(path)).build(tiny_tokenizer, VOCABULARY)
    assert "2 queries have different targets" in str(error.value)
    assert "'a:' (book.jsonl:1, book.jsonl:3); 'c:' (book.jsonl:4, book.jsonl:5)" in str(error.value)
    assert "'b:'" not in str(error.value)


def test_a_long_list_of_conflicts_is_truncated_and_the_rest_counted(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    pairs = [Pair(f"q{i}", target) for i in range(12) for target in ("1", "2")]
    with pytest.raises(InputError, match=r"12 queries have .*'q4'.* and 7 more") as error:
        encode_pairs(pairs, TextEncoder(tiny_tokenizer))
    assert "'q5'" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pairs": 3, "target_tokens": 30}, "pairs and target_tokens are given; expected one"),
        ({"pairs": 3, "path": "book.jsonl"}, "pairs and path are given; expected one"),
        ({"pairs": 0}, "pairs is 0; expected at least 1"),
        ({"target_tokens": 0}, "target_tokens is 0; expected at least 1"),
    ],
)
def test_conflicting_or_non_positive_sizes_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PhoneBook(**arguments)


def test_a_token_budget_too_small_for_one_number_is_refused(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InputError, match="target_tokens is 9, and one number has 10"):
        PhoneBook(target_tokens=9).build(tiny_tokenizer, VOCABULARY)


@pytest.mark.backbone
@pytest.mark.parametrize(
    ("book", "target_tokens"),
    [
        ("qwen/PB1000", 1000),
        ("qwen/PB2000", 2000),
        ("qwen/PB4000", 4000),
        ("qwen/PB8000", 8000),
        # These names count up to three digits per token; the default tokenizer encodes each digit separately.
        ("llama/PB1000", 2500),
        ("llama/PB4000", 10000),
    ],
)
def test_published_books_have_the_measured_number_of_tokens_under_the_default_tokenizer(
    default_backbone: Backbone, shared_folder: Path, book: str, target_tokens: int
) -> None:
    path = shared_folder / "data" / "phonebook" / f"{book}.jsonl"
    corpus = PhoneBook(path=str(path), end_of_turn=False).build(default_backbone.tokenizer, 49152)
    assert corpus.target_tokens == target_tokens
