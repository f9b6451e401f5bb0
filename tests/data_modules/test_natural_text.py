"""`NaturalText`: sources, cutting, queries, random replacement, and files in the published format."""

import json
import math
import sys
import tracemalloc
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from data_modules import NaturalText, RandomTokens
from data_modules._replacement import ordinary_ids, replace, replaced_positions
from pml.backbone import Backbone
from pml.corpus import IGNORE_INDEX, Corpus, collate
from pml.encoding import TextEncoder
from pml.errors import InputError
from tests.tokenizer_kinds import make_tokenizer

VOCABULARY = 259  # 256 bytes and 3 special tokens
RATIOS = [0.0, 0.01, 0.1, 0.2, 1 / 3, 0.5, 0.6, 0.8, 0.99, 1.0]


@pytest.fixture(scope="module")
def merging_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with merges, so that tokens at a cut depend on the text beside it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    text = ["the quick brown fox the lazy dog there then them ", "  \n\n  the  \n aaaa aaaaaaa bababa 🇯🇵 éé"] * 9
    trainer = BpeTrainer(vocab_size=400, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=None)


def text_file(tmp_path: Path, text: str, name: str = "text.txt") -> str:
    path = tmp_path / name
    path.write_bytes(text.encode())
    return str(path)


def build(tokenizer: PreTrainedTokenizerBase, vocabulary: int = VOCABULARY, **options: Any) -> Corpus:
    return NaturalText(**{"chat_template": False, **options}).build(tokenizer, max(vocabulary, len(tokenizer)))


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids)))


def targets(tokenizer: PreTrainedTokenizerBase, **options: Any) -> list[str]:
    return [decoded(tokenizer, example.target_ids) for example in build(tokenizer, **options).examples]


def queries(tokenizer: PreTrainedTokenizerBase, **options: Any) -> list[str]:
    return [decoded(tokenizer, example.prompt_ids) for example in build(tokenizer, **options).examples]


# Sources


def test_a_corpus_is_named_after_its_folder_or_file_however_that_is_given(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "notes"
    folder.mkdir()
    text_file(folder, "a text of twenty tokens", "data.txt")
    (folder / "link.txt").symlink_to("data.txt")
    monkeypatch.chdir(folder)
    for path, name in ((".", "notes"), ("../notes/", "notes"), ("data.txt", "data.txt"), ("link.txt", "link.txt")):
        assert build(tiny_tokenizer, path=path, length=4).name == name


# Cutting


def test_the_default_source_is_the_documentation_of_the_standard_library(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    corpus = build(tiny_tokenizer, length=36)
    assert decoded(tiny_tokenizer, corpus.examples[0].target_ids) == "Abstract Base Classes (ABCs) accordi"
    assert (corpus.name, corpus.target_tokens) == ("natural_text", 36)
    version = "{}.{}.{}".format(*sys.version_info)
    assert corpus.settings["source"] == f"documentation strings of Python {version}"


def test_length_and_skip_are_in_tokens_and_targets_are_consecutive(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = text_file(tmp_path, "abcdefghijklmnopqrstuvwxyz")
    assert targets(tiny_tokenizer, path=path, length=4) == ["abcd"]
    assert targets(tiny_tokenizer, path=path, length=4, skip_tokens=3) == ["defg"]
    assert targets(tiny_tokenizer, path=path, length=4, count=3, skip_tokens=3) == ["defg", "hijk", "lmno"]
    assert targets(tiny_tokenizer, path=path, length=None, skip_tokens=20) == ["uvwxyz"]
    assert targets(tiny_tokenizer, path=path, length=26) == ["abcdefghijklmnopqrstuvwxyz"]


def test_documents_are_separated_by_a_blank_line(tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    paths = [text_file(tmp_path, "one", "1.txt"), text_file(tmp_path, "two", "2.md")]
    corpus = build(tiny_tokenizer, path=paths, length=None)
    assert decoded(tiny_tokenizer, corpus.examples[0].target_ids) == "one\n\ntwo"
    assert corpus.name == "1.txt, 2.md"


def test_a_cut_inside_a_character_moves_back_to_its_start(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = text_file(tmp_path, "ab👩éz")  # 2, 4, 2 and 1 bytes
    assert targets(tiny_tokenizer, path=path, length=5) == ["ab"]
    assert targets(tiny_tokenizer, path=path, length=6) == ["ab👩"]


@settings(max_examples=150, deadline=None)
@given(
    text=st.one_of(
        st.text(min_size=12, max_size=80),
        st.text(alphabet=" \n\taebth🇯🇵é", min_size=12, max_size=80),
    ),
    length=st.integers(1, 12),
)
@example("the then  \n\n  \n them aaaaaaaaaa", 7)
def test_targets_are_consecutive_text_that_encodes_to_the_same_tokens_again(
    merging_tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory, text: str, length: int
) -> None:
    path = text_file(tmp_path_factory.mktemp("text"), text)
    try:
        corpus = build(merging_tokenizer, 400, path=path, length=length, count=2)
    except InputError as error:
        # The text is too short for two targets, or the length is below the tokens of one character.
        assert "more: lower length" in str(error) or "no cut within" in str(error)
        return
    parts = [decoded(merging_tokenizer, example.target_ids) for example in corpus.examples]
    assert text.startswith("".join(parts))
    for example_, part in zip(corpus.examples, parts, strict=True):
        assert merging_tokenizer(part, add_special_tokens=False)["input_ids"] == list(example_.target_ids)
        assert 1 <= len(example_.target_ids) <= length


def test_a_longer_target_starts_with_the_shorter_one(
    merging_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = text_file(tmp_path, "the quick brown fox 🇯🇵 then  \n\n  the lazy dog aaaaaaa bababa " * 20)
    by_length = [build(merging_tokenizer, 400, path=path, length=n).examples[0].target_ids for n in range(4, 200)]
    for shorter, longer in pairwise(by_length):
        assert longer[: len(shorter)] == shorter
    assert len({len(ids) for ids in by_length}) > 150


def test_target_tokens_equal_those_of_the_whole_text_even_if_tokens_are_long(tmp_path: Path) -> None:
    # Tokens have 16 characters, so the text, first read at 8 characters per token, ends inside one.
    word = "abcdefghijklmnop"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([word] * 9, BpeTrainer(show_progress=False, initial_alphabet=alphabet))
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=None)
    text = "z" + word * 100
    whole = made(text, add_special_tokens=False)["input_ids"]
    assert len(whole) == 101
    path = text_file(tmp_path, text)
    for length in range(1, 60):
        assert build(made, 400, path=path, length=length).examples[0].target_ids == tuple(whole[:length])


@settings(max_examples=100, deadline=None)
@given(text=st.text(min_size=1, max_size=60), ratio=st.sampled_from([0.0, 0.4]))
@example("👩‍👩‍👧‍👦 🇯🇵", 0.0)
@example("שלום עולם", 0.0)
@example("e\u0301 \x00\x07\x1b\x7f", 0.0)
@example(" ", 0.0)
@example("x" * 100_000, 0.0)
def test_any_text_is_unchanged_after_encoding_and_collating_except_at_replaced_tokens(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory, text: str, ratio: float
) -> None:
    if text.startswith("\ufeff"):  # a byte-order mark is not part of the text of a file
        return
    path = text_file(tmp_path_factory.mktemp("text"), text)
    corpus = build(tiny_tokenizer, path=path, length=None, random_ratio=ratio, end_of_turn=True)
    (example_,) = corpus.examples
    batch = collate(corpus.examples)
    supervised = batch["labels"][0] != IGNORE_INDEX
    assert supervised.nonzero().flatten().tolist() == list(range(len(example_.prompt_ids), len(example_)))
    ids = batch["labels"][0][supervised].tolist()
    assert ids[-1] == tiny_tokenizer.convert_tokens_to_ids("<|im_end|>")
    original = text.encode()
    assert len(ids) - 1 == len(original)
    if not ratio:
        assert decoded(tiny_tokenizer, ids[:-1]) == text
    encoded = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert all(ids[i] == encoded[i] for i in set(range(len(encoded))) - set(example_.replaced))


def test_a_file_is_read_only_as_far_as_the_targets_need(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    # The bytes after the first megabyte are not UTF-8, so reading them is an error.
    path = tmp_path / "large.txt"
    path.write_bytes(b"all work and no play " * 50_000 + b"\xff" * 20_000_000)
    tracemalloc.start()
    try:
        corpus = build(tiny_tokenizer, path=str(path), length=1000, count=5, skip_tokens=1000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert corpus.target_tokens == 5000
    assert peak < 5_000_000  # of a file of 21 MB
    with pytest.raises(InputError, match="not UTF-8"):
        build(tiny_tokenizer, path=str(path), length=2_000_000)


# Queries


def test_the_default_query_is_the_published_prompt_and_several_queries_are_numbered(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    published = "Please output the content of the vector memory injected into the activations."
    assert queries(tiny_tokenizer) == [published]
    assert queries(tiny_tokenizer, prompt="Which?", count=3) == ["Which? 1", "Which? 2", "Which? 3"]


def test_a_title_query_names_the_document_where_the_target_begins_and_a_part_number(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [{"title": "A", "text": "a" * 10}, {"title": "B", "text": "b" * 3}, {"text": "c" * 20}]
    path = text_file(tmp_path, "\n".join(map(json.dumps, rows)), "rows.jsonl")
    options: dict[str, Any] = {"path": path, "length": 6, "count": 4, "query": "title"}
    assert targets(tiny_tokenizer, **options) == ["aaaaaa", "aaaa\n\n", "bbb\n\nc", "cccccc"]
    assert queries(tiny_tokenizer, **options) == ["A, part 1", "A, part 2", "B, part 1", "rows.jsonl:3, part 1"]


def test_an_opening_query_is_the_text_just_before_its_target(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = text_file(tmp_path, "abcdefghijklmnopqrstuvwxyz")
    options: dict[str, Any] = {"path": path, "length": 5, "count": 3, "query": "opening", "opening_tokens": 2}
    assert queries(tiny_tokenizer, **options) == ["ab", "hi", "op"]
    assert targets(tiny_tokenizer, **options) == ["cdefg", "jklmn", "qrstu"]


def test_targets_with_the_same_opening_are_refused(tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = text_file(tmp_path, "ab one ab two ")
    with pytest.raises(InputError, match=r"targets 1 and 2 would be asked for in the same words; raise opening_tokens"):
        build(tiny_tokenizer, path=path, length=5, count=2, query="opening", opening_tokens=2)


# Random replacement


def test_replaced_positions_follow_the_published_rule() -> None:
    assert replaced_positions(20, 0.2) == (2, 7, 12, 17)
    assert replaced_positions(10, 0.8) == (0, 1, 3, 4, 5, 6, 8, 9)
    assert replaced_positions(7, 0.0) == ()
    assert replaced_positions(7, 1.0) == (0, 1, 2, 3, 4, 5, 6)
    assert replaced_positions(3, 0.5) == (0, 2)  # 1.5 is rounded up


@pytest.mark.parametrize("ratio", [20, 80])
def test_replaced_positions_equal_those_in_the_published_files(shared_folder: Path, ratio: int) -> None:
    path = shared_folder / "data" / "long_context" / f"sample_0_tok29709_noise_{ratio}.jsonl"
    published = json.loads(path.read_text(encoding="utf-8"))
    positions = replaced_positions(published["original_token_count"], published["noise_ratio"])
    assert list(positions) == published["noise_positions"]
    for prefix in published["prefix_ratio_stats"]:
        assert sum(position < prefix["prefix_tokens"] for position in positions) == prefix["random_count"]


def assert_evenly_spaced(length: int, ratio: float) -> None:
    positions = replaced_positions(length, ratio)
    assert list(positions) == sorted(set(positions))
    assert all(0 <= position < length for position in positions)
    replaced = 0
    for prefix in range(length + 1):
        assert abs(replaced - ratio * prefix) <= 1 + 1e-9
        replaced += prefix in positions
    gaps = {after - before for before, after in pairwise(positions)}
    assert max(gaps, default=0) - min(gaps, default=0) <= 1


@pytest.mark.parametrize("ratio", RATIOS)
def test_replaced_positions_are_evenly_spaced_for_every_length(ratio: float) -> None:
    for length in range(1, 130):
        assert_evenly_spaced(length, ratio)


@settings(deadline=None)
@given(length=st.integers(1, 400), ratio=st.floats(0, 1))
def test_replaced_positions_are_evenly_spaced_for_every_ratio(length: int, ratio: float) -> None:
    assert_evenly_spaced(length, ratio)


@pytest.mark.parametrize("ratio", RATIOS)
def test_replaced_positions_are_listed_and_all_other_tokens_are_those_of_the_text(
    tiny_tokenizer: PreTrainedTokenizerBase, ratio: float
) -> None:
    (plain,) = build(tiny_tokenizer, length=200).examples
    (mixed,) = build(tiny_tokenizer, length=200, random_ratio=ratio).examples
    assert mixed.replaced == replaced_positions(200, ratio)
    kept = set(range(200)) - set(mixed.replaced)
    assert all(mixed.target_ids[i] == plain.target_ids[i] for i in kept)
    assert mixed.prompt_ids == plain.prompt_ids
    if ratio == 1:
        assert mixed.target_ids != plain.target_ids


def test_replacements_are_uniform_over_ordinary_tokens_and_never_special(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    candidates = ordinary_ids(tiny_tokenizer, VOCABULARY)
    ids, _ = replace([0] * (256 * 200), 1.0, candidates, torch.Generator().manual_seed(1))
    counts = [ids.count(i) for i in candidates]
    assert sum(counts) == len(ids)
    # 200 are expected of each, with a standard deviation of 14; no count of 256 is six of these away.
    assert all(abs(count - 200) < 6 * 14 for count in counts)
    assert not set(candidates) & set(tiny_tokenizer.get_added_vocab().values())


def test_a_replacement_depends_on_its_position_and_the_seed_but_not_on_length_or_ratio(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    def replacements(**options: Any) -> dict[int, int]:
        (example_,) = build(tiny_tokenizer, **options).examples
        return {position: example_.target_ids[position] for position in example_.replaced}

    every = replacements(length=100, random_ratio=1.0)
    for length, ratio in [(100, 0.2), (50, 1.0), (50, 0.6)]:
        some = replacements(length=length, random_ratio=ratio)
        assert some == {position: every[position] for position in some}
    assert replacements(length=100, random_ratio=1.0, seed=1) != every


def test_the_entropy_is_known_only_if_every_token_is_random(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    corpus = build(tiny_tokenizer, length=50, count=2, random_ratio=1.0, end_of_turn=True)
    assert corpus.entropy_bits == 100 * math.log2(256)
    assert corpus.target_tokens == 102
    assert corpus.entropy_bits == RandomTokens(length=50, count=2).build(tiny_tokenizer, VOCABULARY).entropy_bits
    for ratio in (0.0, 0.2, 0.8):
        assert build(tiny_tokenizer, length=50, random_ratio=ratio).entropy_bits is None


def test_the_settings_rebuild_the_same_corpus(tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    data = NaturalText(
        path=text_file(tmp_path, "abcdefgh" * 9), length=9, count=3, skip_tokens=2, random_ratio=0.3, query="opening"
    )
    corpus = data.build(tiny_tokenizer, VOCABULARY)
    assert NaturalText(**data.settings).build(tiny_tokenizer, VOCABULARY).content_hash == corpus.content_hash
    assert data.settings.items() <= corpus.settings.items()


# Published files


def published_file(tmp_path: Path, **more: Any) -> str:
    row = {"question": "Which text?", "matching": "abcdéfgh", "not_matching": "", **more}
    return text_file(tmp_path, json.dumps(row), "sample.jsonl")


def test_a_published_file_is_recognised_and_cut_at_exactly_the_length(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = published_file(tmp_path)
    corpus = build(tiny_tokenizer, path=path, length=5)  # é has two bytes, and the cut falls between them
    assert corpus.examples[0].target_ids == tuple(tiny_tokenizer("abcdé")["input_ids"][:5])
    assert (corpus.name, corpus.target_tokens) == ("sample.jsonl", 5)
    assert queries(tiny_tokenizer, path=path, length=5) == ["Which text?"]
    assert queries(tiny_tokenizer, path=path, length=5, prompt="What?") == ["What?"]
    assert targets(tiny_tokenizer, path=path, length=2, count=2, skip_tokens=2) == ["cd", "é"]
    assert targets(tiny_tokenizer, path=path, length=None) == ["abcdéfgh"]
    with pytest.raises(InputError, match="of which 0 are left after 9; expected at least 1 more"):
        build(tiny_tokenizer, path=path, length=None, skip_tokens=9)


def test_a_published_file_that_has_the_requested_column_is_read_as_rows(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    assert targets(tiny_tokenizer, path=published_file(tmp_path), column="question", length=5) == ["Which"]


def test_published_random_positions_are_used_only_if_the_number_of_tokens_matches(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    noise = {"original_token_count": 9, "noise_ratio": 0.4, "noise_positions": [1, 3, 6, 8]}
    corpus = build(tiny_tokenizer, path=published_file(tmp_path, **noise), length=4, count=2)
    assert [example_.replaced for example_ in corpus.examples] == [(1, 3), (2,)]
    assert corpus.settings["random_positions_known"] is True
    assert corpus.entropy_bits is None
    path = published_file(tmp_path, **{**noise, "original_token_count": 10})
    other = build(tiny_tokenizer, path=path, length=4, count=2)
    assert [example_.replaced for example_ in other.examples] == [(), ()]
    assert other.settings["random_positions_known"] is False


def test_published_random_positions_are_unknown_if_a_target_encodes_to_other_tokens(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("unigram")
    text = "call the number of Anna at the phone office and answer to Bo on North road line code key " * 2
    ids = TextEncoder(tokenizer).document(text)
    noise = {"original_token_count": len(ids), "noise_positions": list(range(1, len(ids), 3))}
    path = published_file(tmp_path, **{**noise, "matching": text})
    corpus = build(tokenizer, path=path, length=7, count=4, skip_tokens=1)
    # As it follows its prompt, a piece is encoded without the mark that this tokenizer puts at the start of a text.
    assert corpus.examples[1].target_ids != tuple(ids[8:15])
    assert {example_.replaced for example_ in corpus.examples} == {()}
    assert corpus.settings["random_positions_known"] is False


def test_random_ratio_is_refused_for_a_file_that_already_has_random_tokens(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = published_file(tmp_path, original_token_count=9, noise_positions=[1])
    with pytest.raises(InputError, match=r"random_ratio is 0\.5, and sample\.jsonl has random tokens already"):
        build(tiny_tokenizer, path=path, length=4, random_ratio=0.5)


def test_a_published_file_with_a_second_row_is_refused(tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    row = json.dumps({"question": "Which text?", "matching": "abcd"})
    path = text_file(tmp_path, f"{row}\n{row}\n", "two.jsonl")
    with pytest.raises(InputError, match=r"^two\.jsonl:2: a second row in a file of one long target; give each a file"):
        build(tiny_tokenizer, path=path, length=2)


def test_published_positions_that_are_not_whole_numbers_are_refused(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"^sample\.jsonl:1: 'noise_positions' is \['1'\]; expected a list of whole"):
        build(tiny_tokenizer, path=published_file(tmp_path, noise_positions=["1"]), length=4)


@pytest.mark.backbone
@pytest.mark.parametrize(
    ("name", "tokens", "random_positions_known"),
    [("noise_0", 31180, None), ("noise_20", 40405, False), ("noise_80", 67620, False)],
)
def test_published_files_have_the_measured_token_counts_under_the_default_tokenizer(
    default_backbone: Backbone, shared_folder: Path, name: str, tokens: int, random_positions_known: bool | None
) -> None:
    path = shared_folder / "data" / "long_context" / f"sample_0_tok29709_{name}.jsonl"
    tokenizer = default_backbone.tokenizer
    for length in (50, 100, 1000):
        assert build(tokenizer, 49152, path=str(path), length=length).target_tokens == length
    with pytest.raises(InputError, match=f"the text has {tokens} tokens"):
        build(tokenizer, 49152, path=str(path), length=100_000)
    settings = build(tokenizer, 49152, path=str(path), length=50).settings
    assert settings.get("random_positions_known") is random_positions_known


@pytest.mark.backbone
def test_the_published_random_text_encodes_to_the_token_ids_of_the_published_run(
    default_backbone: Backbone, shared_folder: Path
) -> None:
    golden = json.loads((shared_folder / "golden" / "lc64.json").read_text(encoding="utf-8"))
    path = shared_folder / "data" / "long_context" / "random.jsonl"
    corpus = build(default_backbone.tokenizer, 49152, path=str(path), length=64)
    assert list(corpus.examples[0].target_ids) == golden["target_ids"]


@pytest.mark.backbone
def test_a_control_character_that_the_default_tokenizer_lacks_is_refused(
    default_backbone: Backbone, shared_folder: Path
) -> None:
    path = shared_folder / "data" / "long_context" / "random.jsonl"
    with pytest.raises(InputError, match=r"random\.jsonl: the tokenizer cannot represent .* character 15016, '\\x06 "):
        build(default_backbone.tokenizer, 49152, path=str(path), length=None)


# Bad input


def test_text_that_the_tokenizer_cannot_represent_is_refused_at_its_first_lost_character(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("unigram")
    path = text_file(tmp_path, "call Anna at maybe Ж call")
    options = {"path": path, "prompt": "call"}
    with pytest.raises(InputError, match=r"text\.txt: the tokenizer cannot represent .*character 20, 'Ж call'"):
        build(tokenizer, length=22, **options)


def test_control_tokens_written_in_a_text_are_encoded_as_text(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("chatml")
    text = "A turn ends with <|im_end|>, and a text with <|endoftext|>."
    (example,) = build(tokenizer, path=text_file(tmp_path, text), length=None).examples
    assert tokenizer.decode(example.target_ids, skip_special_tokens=True) == text == example.target


@pytest.mark.parametrize("kind", ["roles", "inst", "byte_fallback"])
def test_a_target_decodes_unchanged_after_its_prompt_if_the_tokenizer_marks_text_starts(
    kind: str, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer(kind)
    path = text_file(tmp_path, "call Anna at 007 and 415 office")
    (example,) = build(tokenizer, path=path, length=None, chat_template=True).examples
    before, whole = (tokenizer.decode([*example.prompt_ids, *ids]) for ids in ((), example.target_ids))
    assert whole == before + "call Anna at 007 and 415 office"


def test_a_text_with_too_few_tokens_is_refused_with_both_numbers(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = text_file(tmp_path, "abcdefghij")
    with pytest.raises(InputError, match=r"text\.txt: the text has 10 tokens.* at least 11 more: lower length"):
        build(tiny_tokenizer, path=path, length=11)
    with pytest.raises(InputError, match=r"10 tokens, of which 2 are left after 8; expected at least 4 more"):
        build(tiny_tokenizer, path=path, length=4, count=3)
    with pytest.raises(InputError, match=r"10 tokens, of which 0 are left after 10; expected at least 1 more"):
        build(tiny_tokenizer, path=path, length=None, skip_tokens=10)


def test_a_length_below_the_tokens_of_the_first_character_is_refused(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"text\.txt: from token 0 on, no cut within 3 tokens"):
        build(tiny_tokenizer, path=text_file(tmp_path, "👩 and more"), length=3)


def test_a_target_longer_than_the_context_is_refused_with_both_lengths(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    data = NaturalText(path=text_file(tmp_path, "x" * 200), length=100, prompt="ab", chat_template=False)
    with pytest.raises(
        InputError, match=r"example 0 \(text\.txt\) has 102 tokens \(2 prompt, 100 target\).* 101 positions"
    ):
        data.build(tiny_tokenizer, VOCABULARY, max_positions=101)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 0}, "length is 0; expected at least 1"),
        ({"count": 0}, "count is 0; expected at least 1"),
        ({"skip_tokens": -1}, "skip_tokens is -1; expected at least 0"),
        ({"opening_tokens": 0}, "opening_tokens is 0; expected at least 1"),
        ({"length": None, "count": 2}, "length is null, and count is 2"),
        ({"random_ratio": -0.1}, r"random_ratio is -0\.1; expected a share of the target tokens, 0 to 1"),
        ({"random_ratio": 20}, "random_ratio is 20; expected a share"),
        ({"random_ratio": math.nan}, "random_ratio is nan; expected a share"),
        ({"path": "a.txt", "dataset": "b"}, "path and dataset are both given; expected one of them"),
        ({"path": []}, "path is an empty list"),
        ({"query": "name"}, "query is 'name'; expected 'prompt', 'title' or 'opening'"),
    ],
)
def test_invalid_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        NaturalText(**arguments)


@pytest.mark.parametrize(
    ("noise", "said"),
    [
        ({"original_token_count": "9"}, "'original_token_count' is '9'; expected a whole number above 0"),
        ({"original_token_count": 9, "noise_positions": [9]}, "'noise_positions' has a position twice or outside"),
        ({"original_token_count": 9, "noise_positions": [1, 1]}, "'noise_positions' has a position twice or outside"),
        ({"noise_positions": [-1]}, "'noise_positions' has a position twice or outside"),
    ],
)
def test_positions_that_no_published_text_can_have_are_refused(
    noise: dict[str, Any], said: str, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=said):
        build(tiny_tokenizer, path=published_file(tmp_path, **noise), length=4)
