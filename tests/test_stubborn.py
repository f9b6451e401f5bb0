"""The table of the most stubborn tokens, with any text."""

import numpy as np
import pytest

from pml.last_seen import TokenStates
from pml.stubborn import stubborn_table, visible_text
from pml.tables import markdown_table, markdown_text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("a|b", "a&#124;b"),
        ("`x`", "&#96;x&#96;"),
        ("**<b>", "&#42;&#42;&#60;b&#62;"),
        (" the", "␣the"),
        ("\n", "&#92;n"),
        ("\x1b[0m", "&#92;x1b&#91;0m"),
        ("\u202eevil", "&#92;u202eevil"),
        ("über 日本", "über 日本"),
    ],
)
def test_the_text_of_a_token_is_escaped_for_markdown(text: str, shown: str) -> None:
    assert markdown_text(visible_text(text)) == shown


def test_the_weakest_tokens_come_first_with_their_neighbours_and_best_rival() -> None:
    standing = TokenStates(
        probability=np.array([0.9, 0.1, np.nan, 0.4], dtype=np.float32),
        correct=np.array([True, False, False, True]),
        margin=np.array([3.0, -1.5, np.nan, np.nan], dtype=np.float32),
        rival=np.array([0, 5, -1, -1], dtype=np.int32),
        first_right=np.array([-1, 12]),
    )
    table = stubborn_table(standing, [[1, 2], [3, 4]], lambda ids: "".join("abc|ef"[i] for i in ids), most=2)
    assert table.rows == [
        ("0", "b [c]", "2 of 2", "0.1", "-1.50", "f", "never"),
        ("1", "| [e]", "2 of 2", "0.4", "-", "-", "12"),
    ]
    header, line, *_ = markdown_table(table).splitlines()
    assert header.startswith("| pair | token in its target | position | p | margin (logits) | wins instead |")
    assert line == "| ---: | :--- | ---: | ---: | ---: | :--- | ---: |"
