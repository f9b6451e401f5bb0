"""`Facts`: a user's own pairs in each file format, the built-in examples, and input that is refused."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from data_modules import Facts
from pml.backbone import Backbone
from pml.corpus import IGNORE_INDEX, Corpus, collate
from pml.errors import InputError

VOCABULARY = 259


def build(tokenizer: PreTrainedTokenizerBase, **options: Any) -> Corpus:
    return Facts(**{"chat_template": False, "end_of_turn": False, **options}).build(tokenizer, VOCABULARY)


def facts(tokenizer: PreTrainedTokenizerBase, **options: Any) -> list[tuple[str, str]]:
    """Queries and targets as text."""
    examples = build(tokenizer, **options).examples
    return [(str(tokenizer.decode(list(e.prompt_ids))), str(tokenizer.decode(list(e.target_ids)))) for e in examples]


def written(tmp_path: Path, *pairs: tuple[str, str], name: str = "facts.jsonl") -> str:
    path = tmp_path / name
    path.write_text("\n".join(json.dumps({"query": query, "target": target}) for query, target in pairs))
    return str(path)


def test_the_built_in_examples_are_32_facts_of_eight_kinds(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    examples = facts(tiny_tokenizer)
    assert len({query for query, _ in examples}) == 32
    answers = [target for _, target in examples]
    for part in ("EXAMPLE", "SMPL5-", "cruel and unusual", "E11.9", "https://", r"\int_", "⟦wm:", "1948"):
        assert any(part in answer for answer in answers), part
    assert build(tiny_tokenizer).name == "facts"


def test_addresses_in_the_built_in_examples_use_only_example_hosts(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    addresses = [target for _, target in facts(tiny_tokenizer) if "://" in target]
    assert len(addresses) == 4
    reserved = ("example.com", "example.org", "example.net", "s3://example-")
    assert all(any(host in address for host in reserved) for address in addresses)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("f.jsonl", '{"query": "Who?", "target": "me, \\"I\\""}\n{"query": "When?", "target": "now"}\n'),
        ("f.csv", 'note,target,query\nx,"me, ""I""",Who?\n,now,When?\n'),
        ("f.yaml", "- query: Who?\n  target: me, \"I\"\n- {query: 'When?', target: now, note: x}\n"),
    ],
)
def test_every_file_format_gives_the_same_facts(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, name: str, content: str
) -> None:
    (tmp_path / name).write_text(content)
    assert facts(tiny_tokenizer, path=str(tmp_path / name)) == [("Who?", 'me, "I"'), ("When?", "now")]
    assert build(tiny_tokenizer, path=str(tmp_path / name)).name == name


def test_the_query_and_target_columns_can_be_named(tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = tmp_path / "f.csv"
    path.write_text("question,answer\nWho?,me\n")
    options = {"path": str(path), "query_column": "question", "target_column": "answer"}
    assert facts(tiny_tokenizer, **options) == [("Who?", "me")]
    with pytest.raises(InputError, match=r"^f\.csv:1: no column 'query'; found 'question', 'answer'"):
        build(tiny_tokenizer, path=str(path))


@settings(max_examples=100, deadline=None)
@given(pairs=st.dictionaries(st.text(min_size=1), st.text(min_size=1), min_size=1, max_size=4))
def test_any_target_is_unchanged_after_encoding_collating_and_decoding(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory, pairs: dict[str, str]
) -> None:
    corpus = build(tiny_tokenizer, path=written(tmp_path_factory.mktemp("facts"), *pairs.items()))
    batch = collate(corpus.examples)
    for row, example, target in zip(batch["labels"], corpus.examples, pairs.values(), strict=True):
        supervised = (row != IGNORE_INDEX).nonzero().flatten().tolist()
        assert supervised == list(range(len(example.prompt_ids), len(example)))
        assert tiny_tokenizer.decode(row[row != IGNORE_INDEX].tolist()) == target


def test_identical_rows_are_merged_counted_and_logged(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = written(tmp_path, ("a", "1"), ("b", "2"), ("a", "1"), ("a", "1"))
    with caplog.at_level(logging.INFO, logger="data_modules.facts"):
        corpus = build(tiny_tokenizer, path=path)
    assert len(corpus) == 2
    assert corpus.settings["merged_duplicates"] == 2
    assert "facts.jsonl: 2 identical pairs are merged" in caplog.text


def test_different_targets_for_one_query_are_refused_with_their_lines(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = written(tmp_path, ("a", "1"), ("b", "2"), ("a", "3"), ("a", "1"))
    with pytest.raises(InputError, match=r"1 query has different targets.*'a' \(facts\.jsonl:1, facts\.jsonl:3\)"):
        build(tiny_tokenizer, path=path)


def test_the_corpus_can_be_limited_to_its_first_distinct_pairs(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = written(tmp_path, ("a", "1"), ("a", "1"), ("b", "2"), ("c", "3"))
    assert facts(tiny_tokenizer, path=path, pairs=2) == [("a", "1"), ("b", "2")]
    with pytest.raises(InputError, match=r"facts\.jsonl: 3 different pairs, and pairs is 4; expected no more"):
        build(tiny_tokenizer, path=path, pairs=4)


def test_rows_after_the_pairs_that_are_taken_are_not_read(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = Path(written(tmp_path, ("a", "1"), ("a", "1"), ("b", "2"), ("c", "3")))
    with path.open("a") as file:
        file.write("\nnot a row")
    assert facts(tiny_tokenizer, path=str(path), pairs=3) == [("a", "1"), ("b", "2"), ("c", "3")]
    with pytest.raises(InputError, match=r"facts\.jsonl:5: malformed JSON"):
        build(tiny_tokenizer, path=str(path))


def test_end_of_turn_adds_one_token_to_each_target(tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = written(tmp_path, ("a", "123"), ("b", "45"))
    assert build(tiny_tokenizer, path=path).target_tokens == 5
    corpus = build(tiny_tokenizer, path=path, end_of_turn=True)
    end = tiny_tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert [example.target_ids[-1] for example in corpus.examples] == [end, end]
    assert corpus.target_tokens == 7


def test_facts_have_no_random_tokens_and_an_unknown_entropy(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    corpus = build(tiny_tokenizer)
    assert corpus.entropy_bits is None
    assert all(example.replaced == () for example in corpus.examples)


def test_the_settings_rebuild_the_same_corpus(tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    data = Facts(path=written(tmp_path, ("a", "1"), ("a", "1"), ("b", "2")), pairs=2, system="S")
    corpus = data.build(tiny_tokenizer, VOCABULARY)
    assert Facts(**data.settings).build(tiny_tokenizer, VOCABULARY).content_hash == corpus.content_hash
    assert data.settings.items() <= corpus.settings.items()


def test_the_seed_does_not_change_the_corpus(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    assert build(tiny_tokenizer, seed=1).content_hash == build(tiny_tokenizer, seed=2).content_hash


def test_a_fact_longer_than_the_context_is_refused_with_both_lengths(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    data = Facts(path=written(tmp_path, ("ab", "x" * 20)), chat_template=False, end_of_turn=False)
    with pytest.raises(
        InputError, match=r"example 0 \(facts\.jsonl:1\) has 22 tokens \(2 prompt, 20 target\).* 21 positions"
    ):
        data.build(tiny_tokenizer, VOCABULARY, max_positions=21)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pairs": 0}, "pairs is 0; expected at least 1, or null"),
        ({"query_column": "target"}, "query_column and target_column are both 'target'"),
    ],
)
def test_invalid_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Facts(**arguments)


@pytest.mark.backbone
def test_the_built_in_examples_have_907_target_tokens_under_the_default_tokenizer(default_backbone: Backbone) -> None:
    corpus = Facts().build(default_backbone.tokenizer, 49152)
    assert (len(corpus), corpus.target_tokens) == (32, 907)


class TestParaphrases:
    def rows(self, tmp_path: Path, *rows: dict[str, Any]) -> str:
        path = tmp_path / "facts.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        return str(path)

    def made(self, tokenizer: PreTrainedTokenizerBase, path: str, **options: Any) -> tuple[Corpus, Corpus | None]:
        data = Facts(path, chat_template=False, end_of_turn=False, **options)
        return data.build(tokenizer, VOCABULARY), data.held_out

    def test_the_last_paraphrase_is_held_out_and_the_others_are_trained_on(
        self, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
    ) -> None:
        path = self.rows(
            tmp_path,
            {"query": "Code?", "target": "7", "paraphrases": ["Which code?", "The code, please."]},
            {"query": "Name?", "target": "Bo"},
            {"query": "Road?", "target": "9", "paraphrases": ["Which road?"]},
        )
        corpus, held_out = self.made(tiny_tokenizer, path)
        assert [(e.query, e.target) for e in corpus.examples] == [
            ("Code?", "7"),
            ("Which code?", "7"),
            ("Name?", "Bo"),
            ("Road?", "9"),
        ]
        assert corpus.fact_ids == [0, 0, 1, 2]
        assert held_out is not None
        assert [(e.query, e.target) for e in held_out.examples] == [("The code, please.", "7"), ("Which road?", "9")]
        corpus, held_out = self.made(tiny_tokenizer, path, held_out_wordings=0)
        assert len(corpus) == 6 and held_out is None

    def test_only_paraphrases_of_trained_pairs_are_held_out(
        self, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
    ) -> None:
        path = self.rows(
            tmp_path,
            {"query": "Code?", "target": "7", "paraphrases": ["Code?"]},
            {"query": "Road?", "target": "9", "paraphrases": ["Which road?"]},
        )
        # The only paraphrase of the first pair equals its query, and `pairs` leaves out the second pair.
        assert self.made(tiny_tokenizer, path, pairs=1)[1] is None
        held_out = self.made(tiny_tokenizer, path)[1]
        assert held_out is not None and [e.query for e in held_out.examples] == ["Which road?"]

    def test_a_repeated_pair_may_add_a_held_out_paraphrase(
        self, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = self.rows(
            tmp_path,
            {"query": "Code?", "target": "7"},
            {"query": "Code?", "target": "7", "paraphrases": ["Which code?"]},
        )
        with caplog.at_level(logging.INFO):
            corpus, held_out = self.made(tiny_tokenizer, path)
        assert len(corpus) == 1
        assert held_out is not None and [e.query for e in held_out.examples] == ["Which code?"]
        assert caplog.text.count("identical pairs are merged") == 1

    def test_a_file_without_paraphrases_has_no_held_out_corpus(
        self, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
    ) -> None:
        corpus, held_out = self.made(tiny_tokenizer, written(tmp_path, ("Code?", "7")))
        assert (corpus.fact_ids, held_out) == (None, None)

    def test_a_csv_cell_holds_one_paraphrase_per_line(
        self, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
    ) -> None:
        path = tmp_path / "facts.csv"
        path.write_text('query,target,others\nCode?,7,"Which code?\nThe code."\nRoad?,9,\n')
        corpus, held_out = self.made(tiny_tokenizer, str(path), paraphrases_column="others")
        assert [e.query for e in corpus.examples] == ["Code?", "Which code?", "Road?"]
        assert held_out is not None and [e.query for e in held_out.examples] == ["The code."]

    @pytest.mark.parametrize(
        ("value", "said"),
        [
            (3, "facts.jsonl:1: 'paraphrases' is 3; expected a list of queries, or one a line"),
            (False, "facts.jsonl:1: 'paraphrases' is false; expected a list of queries, or one a line"),
            ([3], "facts.jsonl:1: 'paraphrases' is 3; expected a string"),
        ],
    )
    def test_a_paraphrase_that_is_not_a_string_is_refused(
        self, value: Any, said: str, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
    ) -> None:
        path = self.rows(tmp_path, {"query": "Code?", "target": "7", "paraphrases": value})
        with pytest.raises(InputError, match=said):
            self.made(tiny_tokenizer, path)

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"held_out_wordings": -1}, "held_out_wordings is -1; expected a number of paraphrases, or 0"),
            ({"paraphrases_column": "query"}, "paraphrases_column is 'query'; expected a column of its own"),
        ],
    )
    def test_invalid_paraphrase_settings_are_refused(self, options: dict[str, Any], said: str) -> None:
        with pytest.raises(InputError, match=said):
            Facts(**options)
