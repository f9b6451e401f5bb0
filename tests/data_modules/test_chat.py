"""Chat rows are read if they hold one question and one answer, and otherwise refused with advice."""

import json
from pathlib import Path
from typing import Any

import pytest
from row_files import WRITERS, file_of, write_jsonl, write_parquet

from data_modules._pairs import read_pairs
from pml.corpus import Pair
from pml.errors import InputError


def messages(*turns: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def conversations(*turns: tuple[str, Any]) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": value} for role, value in turns]}


def text(value: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": value}]


ONE_TURN_EACH = [
    messages(("user", "Who?"), ("assistant", "me")),
    messages(("user", text("Who?")), ("assistant", text("me"))),
    conversations(("human", "Who?"), ("gpt", "me")),
    conversations(("user", "Who?"), ("chatgpt", "me")),
    {"instruction": "Who?", "output": "me"},
    {"instruction": "Who?", "input": "", "output": "me"},
    {"instruction": "", "input": "Who?", "output": "me"},
    {"prompt": "Who?", "completion": "me"},
    {"prompt": "Who?", "completion": "me", "id": 7, "source": "x", "system": "", "tools": None, "history": []},
]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".yaml"])
@pytest.mark.parametrize("row", ONE_TURN_EACH, ids=repr)
def test_a_row_with_one_question_and_one_answer_is_read_as_a_pair(
    tmp_path: Path, suffix: str, row: dict[str, Any]
) -> None:
    WRITERS[suffix](tmp_path / f"f{suffix}", [row, row])
    pairs = list(read_pairs(tmp_path / f"f{suffix}"))
    assert [(pair.query, pair.target) for pair in pairs] == [("Who?", "me")] * 2
    assert pairs[1].source == {".jsonl": "f.jsonl:2", ".parquet": "f.parquet row 2"}.get(suffix, pairs[1].source)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".yaml"])
def test_a_chat_row_may_have_paraphrases_of_its_question(tmp_path: Path, suffix: str) -> None:
    row = {**messages(("user", "Who?"), ("assistant", "me")), "paraphrases": ["Which one?"]}
    WRITERS[suffix](tmp_path / f"f{suffix}", [row])
    (pair,) = read_pairs(tmp_path / f"f{suffix}")
    assert (pair.query, pair.paraphrases) == ("Who?", ("Which one?",))


def test_unnamed_columns_as_left_by_spreadsheets_are_ignored(tmp_path: Path) -> None:
    path = file_of(tmp_path / "f.csv", "query,target,,\na,1,,\n")
    assert [(pair.query, pair.target) for pair in read_pairs(path)] == [("a", "1")]


def test_instruction_and_input_are_joined_by_a_line_feed(tmp_path: Path) -> None:
    path = file_of(tmp_path / "f.csv", 'instruction,input,output\nAdd.,"1, 2",3\nName one.,,Ada\n')
    assert list(read_pairs(path)) == [Pair("Add.\n1, 2", "3", "f.csv:2"), Pair("Name one.", "Ada", "f.csv:3")]


def test_query_and_target_columns_take_precedence_over_chat_columns(tmp_path: Path) -> None:
    row = {"query": "a", "target": "1", **messages(("user", "b"), ("assistant", "2")), "system": "x", "prompt": 7}
    for suffix in (".jsonl", ".parquet", ".yaml"):
        WRITERS[suffix](tmp_path / f"f{suffix}", [row])
        assert [(pair.query, pair.target) for pair in read_pairs(tmp_path / f"f{suffix}")] == [("a", "1")]


def test_explicit_column_names_are_used_instead_of_guessing_the_format(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    write_jsonl(path, [{"prompt": "a", "completion": "1"}])
    assert [pair.target for pair in read_pairs(path, "completion", "prompt")] == ["a"]
    with pytest.raises(InputError, match=r"^f\.jsonl:1: no column 'response'; found 'prompt', 'completion'"):
        list(read_pairs(path, "prompt", "response"))


def test_empty_keys_and_identifying_keys_of_a_turn_are_ignored(tmp_path: Path) -> None:
    row = messages(("user", "a"), ("assistant", "1"))
    row["messages"][0] |= {"id": 7, "timestamp": "now"}
    row["messages"][1] |= {"tool_calls": None, "refusal": None, "images": []}
    write_jsonl(tmp_path / "f.jsonl", [row])
    assert [pair.target for pair in read_pairs(tmp_path / "f.jsonl")] == ["1"]


USER, ANSWER = ("user", "a"), ("assistant", "1")
CALL = {"role": "assistant", "content": "1", "tool_calls": [{"function": "f"}]}
IMAGE = {"type": "image_url", "image_url": {"url": "x"}}
TO_WRITE = "write columns 'query' and 'target', or name yours by query_column and target_column"
ONE_EACH = f"expected one user turn and one answer, in text; {TO_WRITE}"
SYSTEM = "leave it out of the rows; `pml fit` takes its text once, by --data.system"


@pytest.mark.parametrize(
    ("row", "found", "to_do"),
    [
        (messages(("system", "s"), USER, ANSWER), "'messages' has a system turn", SYSTEM),
        (messages(("developer", "s"), USER, ANSWER), "'messages' has a system turn", SYSTEM),
        (conversations(("system", "s"), USER, ("gpt", "1")), "'conversations' has a system turn", SYSTEM),
        ({"instruction": "a", "output": "1", "system": "s"}, "'system' is 's'", SYSTEM),
        (messages(USER), "'messages' has 1 turn (user)", ONE_EACH),
        (messages(), "'messages' has 0 turns (none)", ONE_EACH),
        (messages(ANSWER, USER), "'messages' has 2 turns (assistant, user)", ONE_EACH),
        (messages(USER, ANSWER, USER, ANSWER), "has 4 turns (user, assistant, user, assistant)", ONE_EACH),
        (messages(*[USER, ANSWER] * 999), "has 1998 turns (user, assistant, user, assistant, ...)", ONE_EACH),
        (messages(USER, ("tool", "1")), "'messages' has 2 turns (user, 'tool')", ONE_EACH),
        ({"messages": [*messages(USER)["messages"], CALL]}, "'messages' turn 2 has 'tool_calls' too", ONE_EACH),
        (
            {"messages": [*messages(USER)["messages"], {"role": "assistant", "content": "1", "weight": 0}]},
            "'messages' turn 2 has 'weight' too",
            ONE_EACH,
        ),
        (messages(("user", [*text("a"), IMAGE]), ANSWER), "turn 1 has 2 parts ('text', 'image_url')", ONE_EACH),
        (messages(("user", [IMAGE]), ANSWER), "'messages' turn 1 has 1 part ('image_url')", ONE_EACH),
        (messages(("user", []), ANSWER), "'messages' turn 1 has 0 parts (none)", ONE_EACH),
        (messages(("user", "a"), ("assistant", None)), "'messages' turn 2 is null", "expected a string, in quotes"),
        (messages(("user", "a"), ("assistant", 7)), "'messages' turn 2 is 7", "expected a string, in quotes"),
        (messages(("user", "a"), ("assistant", "")), "the target is empty", "expected text"),
        (
            messages(("user", "\ud800"), ANSWER),
            "'messages' turn 1 holds half a surrogate pair, which is not a character",
            "write the whole",
        ),
        (messages((["user"], "a"), ANSWER), "'messages' turn 1 has the role a list of 1", TO_WRITE),  # type: ignore[list-item]
        ({"messages": ["a", "1"]}, "'messages' turn 1 is 'a'", TO_WRITE),
        ({"messages": [{"content": "a"}]}, "'messages' turn 1 has the keys 'content'", TO_WRITE),
        ({"messages": "a"}, "'messages' is 'a'; expected a list of turns", TO_WRITE),
        ({"messages": None}, "'messages' is null; expected a list of turns", TO_WRITE),
        ({**messages(USER, ANSWER), "tools": [{"name": "f"}]}, "'tools' is a list of 1", ONE_EACH),
        ({**conversations(USER, ANSWER), "images": ["a.png"]}, "'images' is a list of 1", ONE_EACH),
        ({"instruction": "a", "output": "1", "history": [["b", "2"]]}, "'history' is a list of 1", ONE_EACH),
        ({"prompt": "a", "completion": "1", "label": False}, "'label' is false", ONE_EACH),
        ({"instruction": "a", "input": 7, "output": "1"}, "'input' is 7", "expected a string, in quotes"),
        ({"instruction": "", "input": "", "output": "1"}, "the query is empty", "expected text"),
        ({"prompt": messages(USER)["messages"], "completion": "1"}, "'prompt' is a list of 1", ONE_EACH),
        ({"prompt": "a", "completion": None}, "'completion' is null", "expected a string, in quotes"),
        ({"instruction": "a", "response": "1"}, "no column 'query'; found 'instruction', 'response'", TO_WRITE),
        (
            {**messages(USER, ANSWER), "prompt": "a", "completion": "1"},
            "has 'messages', and also 'prompt' with 'completion'",
            TO_WRITE,
        ),
    ],
)
def test_an_unsupported_row_is_refused_with_advice(tmp_path: Path, row: dict[str, Any], found: str, to_do: str) -> None:
    path = file_of(tmp_path / "f.jsonl", json.dumps(row))
    with pytest.raises(InputError) as error:
        list(read_pairs(path))
    message = str(error.value)
    assert message.startswith("f.jsonl:1: ")
    assert f"{found}; " in message
    assert to_do in message
    assert len(message.splitlines()) == 1


def test_a_file_that_mixes_row_formats_is_refused_with_both_lines(tmp_path: Path) -> None:
    rows = [{"query": "a", "target": "1"}, {"query": "b", "target": "2"}, messages(USER, ANSWER)]
    write_jsonl(tmp_path / "f.jsonl", rows)
    with pytest.raises(InputError) as error:
        list(read_pairs(tmp_path / "f.jsonl"))
    assert str(error.value) == (
        "f.jsonl:3: has 'messages', and f.jsonl:1 has 'query' with 'target'; expected rows of one kind"
    )
    write_jsonl(tmp_path / "f.jsonl", rows[::-1])
    with pytest.raises(InputError, match=r"^f\.jsonl:2: has 'query' with 'target', and f\.jsonl:1 has 'messages'; "):
        list(read_pairs(tmp_path / "f.jsonl"))


def test_a_parquet_row_with_a_system_turn_is_refused_with_its_row_number(tmp_path: Path) -> None:
    rows = [messages(USER, ANSWER), messages(("system", "s"), USER, ANSWER)]
    write_parquet(tmp_path / "f.parquet", rows)
    with pytest.raises(InputError, match=r"^f\.parquet row 2: 'messages' has a system turn; leave it out"):
        list(read_pairs(tmp_path / "f.parquet"))
