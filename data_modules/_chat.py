"""Rows in chat formats that hold one question and one answer."""

from typing import Any, NamedTuple

from data_modules._rows import Columns, Row, checked_text, text_in
from data_modules._wording import listed, quoted, shown
from pml.errors import InputError

__all__ = ["ADVICE", "CHAT_COLUMNS", "read_chat"]

ADVICE = "write columns 'query' and 'target', or name yours by query_column and target_column"
SYSTEM_ADVICE = "leave it out of the rows; `pml fit` takes its text once, by --data.system"
EXPECTED = f"expected one user turn and one answer, in text; {ADVICE}"

MEDIA = ("image", "images", "video", "videos", "audio", "audios")
NOT_READ = (*MEDIA, "history", "tools", "functions", "weight", "label", "kto_tag")
"""Columns that change what the model is shown, or whether it should learn the answer: refused unless empty."""

OPTIONAL = ("system", *NOT_READ)

MESSAGES = Columns(("messages",), OPTIONAL)
CONVERSATIONS = Columns(("conversations",), OPTIONAL)
ALPACA = Columns(("instruction", "output"), ("input", *OPTIONAL))
COMPLETION = Columns(("prompt", "completion"), OPTIONAL)

CHAT_COLUMNS = (MESSAGES, CONVERSATIONS, ALPACA, COMPLETION)
"""Columns of each format; the required ones identify it."""

TURN_KEYS = (("role", "content"), ("from", "value"))
"""Keys of a turn for the speaker and the content: OpenAI's and ShareGPT's."""

IGNORED_TURN_KEYS = ("id", "index", "timestamp")
"""Other keys may change what is trained on, as "weight" does, or what the template writes."""

ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "chatgpt", "bing", "bard", "bot"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}

LISTED_TURNS = 4
"""Most turns of a chat, or parts of a turn, that an error lists."""


class _Turn(NamedTuple):
    role: str
    content: Any
    others: list[str]


def read_chat(row: Row, columns: Columns) -> tuple[str, str]:
    """Query and target of a row in a chat format.

    - OpenAI: "messages", a list of {"role", "content"}.
    - ShareGPT: "conversations", a list of {"from", "value"}.
    - Alpaca: "instruction", "input" and "output". The query is the instruction, a line feed and the input, as
      LLaMA-Factory joins them; the input may be missing or empty.
    - TRL: "prompt" and "completion", both strings.

    Content is a string, or a list of one part, a text.

    Args:
        row: The row.
        columns: Its format: the required columns are those of an entry of `CHAT_COLUMNS`.

    Raises:
        InputError: With file and line: if it has anything but one user turn and one answer, in text.
    """
    if _says_something(row.values.get("system")):
        raise InputError(f"{row.where}: 'system' is {shown(row.values['system'])}; {SYSTEM_ADVICE}")
    for name in NOT_READ:
        if _says_something(row.values.get(name)):
            raise InputError(f"{row.where}: {name!r} is {shown(row.values[name])}; {EXPECTED}")
    if columns.required == ALPACA.required:
        return _instruction(row), text_in(row, "output", "target")
    if columns.required == COMPLETION.required:
        return _plain(row, "prompt", "query"), _plain(row, "completion", "target")
    (column,) = columns.required
    return _turns(row, column)


def _says_something(value: object) -> bool:
    return value is not None and value not in ("", [], {})


def _instruction(row: Row) -> str:
    parts = [name for name in ("instruction", "input") if _says_something(row.values.get(name))]
    return "\n".join(text_in(row, name) for name in parts) or text_in(row, "instruction", "query")


def _plain(row: Row, column: str, name: str) -> str:
    if isinstance(row.values[column], list):
        raise InputError(f"{row.where}: {column!r} is {shown(row.values[column])}; {EXPECTED}")
    return text_in(row, column, name)


def _turns(row: Row, column: str) -> tuple[str, str]:
    value = row.values[column]
    if not isinstance(value, list):
        raise InputError(f"{row.where}: {column!r} is {shown(value)}; expected a list of turns; {ADVICE}")
    turns = [_turn(turn, f"{row.where}: {column!r} turn {i}") for i, turn in enumerate(value[:LISTED_TURNS], start=1)]
    roles = [turn.role for turn in turns]
    if "system" in roles:
        raise InputError(f"{row.where}: {column!r} has a system turn; {SYSTEM_ADVICE}")
    if roles != ["user", "assistant"]:
        more = ", ..." if len(value) > LISTED_TURNS else ""
        raise InputError(
            f"{row.where}: {column!r} has {len(value)} turn{'s' * (len(value) != 1)} "
            f"({', '.join(roles) or 'none'}{more}); {EXPECTED}"
        )
    for i, turn in enumerate(turns, start=1):
        if turn.others:
            raise InputError(f"{row.where}: {column!r} turn {i} has {listed(turn.others)} too; {EXPECTED}")
    query, target = (
        checked_text(_text(turn.content, f"{row.where}: {column!r} turn {i}"), row.where, f"{column!r} turn {i}", name)
        for i, (turn, name) in enumerate(zip(turns, ("query", "target"), strict=True), start=1)
    )
    return query, target


def _turn(turn: object, place: str) -> _Turn:
    """Role and content of a turn, and its other keys.

    Args:
        turn: An entry of the list of turns.
        place: File, line and number of the turn, for messages.
    """
    if not isinstance(turn, dict):
        raise InputError(f"{place} is {shown(turn)}; expected an object with 'role' and 'content'; {ADVICE}")
    for role_key, content_key in TURN_KEYS:
        if role_key in turn:
            role = turn[role_key]
            if not isinstance(role, str):
                raise InputError(f"{place} has the {role_key} {shown(role)}; expected 'user' or 'assistant'; {ADVICE}")
            known = (role_key, content_key, *IGNORED_TURN_KEYS)
            others = [key for key, value in turn.items() if key not in known and _says_something(value)]
            return _Turn(ROLES.get(role, quoted(role)), turn.get(content_key), others)
    raise InputError(f"{place} has the keys {listed(turn)}; expected 'role' and 'content'; {ADVICE}")


def _text(content: object, place: str) -> object:
    """Text of a turn, or of its one part.

    Args:
        content: Content of the turn.
        place: File, line and number of the turn, for messages.
    """
    if not isinstance(content, list):
        return content
    if len(content) == 1 and isinstance(part := content[0], dict):
        others = [key for key, value in part.items() if key not in ("type", "text") and _says_something(value)]
        if part.get("type") == "text" and not others:
            return part.get("text")
    kinds = [part.get("type") if isinstance(part, dict) else part for part in content[:LISTED_TURNS]]
    more = ", ..." if len(content) > LISTED_TURNS else ""
    raise InputError(
        f"{place} has {len(content)} part{'s' * (len(content) != 1)} ({', '.join(map(shown, kinds)) or 'none'}{more}); "
        f"{EXPECTED}"
    )
