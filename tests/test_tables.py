"""The table of runs, with its rows, caption and width, and text tables in a terminal."""

import io
from pathlib import Path

import pytest
from record_factory import make_record
from rich.console import Console

from pml.records import Record
from pml.tables import TextTable, records_table, rich_table, short_names, show_interval, show_loss


def printed(records: dict[Path, Record], width: int = 100) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(rich_table(records_table(records)))
    return console.export_text()


def test_the_current_folder_is_named_by_a_dot() -> None:
    assert short_names([Path("."), Path("a")]) == [".", "a"]


def test_losses_have_at_most_four_digits() -> None:
    assert [show_loss(nats) for nats in (9.9994, 9.9996, 13.5)] == ["9.999", "10.00", "13.50"]


class TestRecordsTable:
    def test_rows_are_sorted_by_corpus_length_rank_and_method(self) -> None:
        records = {
            Path("a"): make_record(rank=8),
            Path("b"): make_record(rank=2),
            Path("c"): make_record(rank=2, method="sft"),
            Path("d"): make_record(rank=16, target_tokens=32),
            Path("e"): make_record(corpus="phonebook"),
        }
        rows = [line[0] for line in printed(records).splitlines() if line[:1] in set("abcde") and line[1:2] == " "]
        assert rows == ["e", "d", "b", "c", "a"]

    def test_a_row_shows_the_values_of_its_record(self) -> None:
        record = make_record(
            rank=8,
            pairs=17,
            method="sft",
            target_tokens=640,
            corpus="phonebook",
            initial_loss=13.6,
            final_loss=0.0421,
            token_accuracy=0.975,
            exact_match=0.5,
            generated_exact_match=0.25,
            sub_threshold_fraction=0.0625,
            optimizer_steps=321,
            steps_to_recall=123,
            wall_seconds=45.6,
        )
        lines = printed({Path("x/one"): record, Path("x/two"): make_record()}).splitlines()
        (row,) = [line.split() for line in lines if line.startswith("one")]
        assert " ".join(row) == "one phonebook 17 640 8 sft 13.60 0.042 97.5 50.0 25.0 6.2 321 123 46"

    def test_settings_shared_by_all_runs_are_stated_in_the_caption(self) -> None:
        text = printed({Path("a"): make_record(rank=1), Path("b"): make_record(rank=2)})
        assert "All runs: corpus random_tokens, pairs 1, target tokens 64, method memft." in " ".join(text.split())
        header = text.splitlines()[1]
        assert "rank" in header
        assert "method" not in header

    def test_results_that_no_run_has_are_listed_in_the_caption(self) -> None:
        text = " ".join(printed({Path("a"): make_record(generated_exact_match=None)}).split())
        assert "None of the runs has: generated, recall after." in text
        assert "Recall after: steps until" not in text

    def test_a_result_that_one_run_lacks_is_shown_as_a_dash(self) -> None:
        text = printed({Path("a"): make_record(steps_to_recall=None), Path("b"): make_record(steps_to_recall=9)})
        (row,) = [line.split() for line in text.splitlines() if line.startswith("a ")]
        assert row[-2] == "-"
        assert "Recall after: steps until every target token was certified." in " ".join(text.split())

    def test_the_caption_says_which_probability_every_token_had_to_exceed(self) -> None:
        margins = {Path(str(margin)): make_record(steps_to_recall=9, recall_margin=margin) for margin in (0.9, 0.5)}
        text = " ".join(printed(margins).split())
        assert "Recall after: steps until every target token was certified (p > 0.5 or 0.9)." in text

    @pytest.mark.parametrize(
        ("share", "shown"), [(1.0, "100.0"), (0.9999, ">99.9"), (0.0, "0.0"), (0.0001, "<0.1"), (0.123, "12.3")]
    )
    def test_only_a_share_of_one_is_shown_as_100_and_only_a_share_of_zero_as_0(self, share: float, shown: str) -> None:
        (row,) = [line.split() for line in printed({Path("a"): make_record(token_accuracy=share)}).splitlines()[3:4]]
        assert row[3] == shown

    def test_numbers_are_right_aligned(self) -> None:
        lines = printed({Path("a"): make_record(optimizer_steps=7), Path("b"): make_record(optimizer_steps=12345)})
        rows = [line for line in lines.splitlines() if line[:2] in ("a ", "b ")]
        assert rows[0].index(" 7 ") + 1 == rows[1].index("12345") + 4

    def test_folders_of_the_same_name_are_shown_with_their_parents(self) -> None:
        text = printed({Path("sft/seed-0"): make_record(), Path("memft/seed-0"): make_record()})
        assert "sft/seed-0" in text
        assert "memft/seed-0" in text

    def test_an_interrupted_run_is_marked(self) -> None:
        assert "a (interrupted)" in printed({Path("a"): make_record(status="interrupted")})

    def test_a_diverged_run_is_marked_and_has_a_dash_as_its_final_loss(self) -> None:
        records = {Path("a"): make_record(final_loss=None), Path("b"): make_record()}
        (row,) = [line.split() for line in printed(records).splitlines() if line.startswith("a ")]
        assert row[:4] == ["a", "(diverged)", "13.60", "-"]

    def test_a_wide_table_fits_100_columns_without_truncating_a_number(self) -> None:
        long = make_record(
            corpus="random_tokens",
            pairs=10000,
            target_tokens=320000,
            rank=1024,
            optimizer_steps=12345,
            steps_to_recall=123456,
            wall_seconds=9876,
        )
        text = printed(
            {Path("phonebook_memft_rank-4_seed-0"): long, Path("b"): make_record(method="sft", corpus="phonebook")}
        )
        assert max(len(line.rstrip()) for line in text.splitlines()) <= 100
        assert "…" not in text
        (row,) = [line.split() for line in text.splitlines() if "320000" in line]
        assert " ".join(row[2:]) == "10000 320000 1024 memft 13.60 3.100 75.0 0.0 0.0 30.0 12345 123456 9876"

    def test_without_records_the_table_is_empty(self) -> None:
        assert records_table({}).rows == []


def test_a_text_table_shows_its_title_values_and_note() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(rich_table(TextTable("Forms", ("form", "R²"), [("power", "0.99"), ("ceiling", "1.00")], note="all")))
    lines = [line.split() for line in console.export_text().splitlines() if line.strip()]
    assert [line for line in lines if len(line) == 2] == [["form", "R²"], ["power", "0.99"], ["ceiling", "1.00"]]
    assert (lines[0], lines[-1]) == (["Forms"], ["all"])


def test_columns_of_dashes_are_dropped_and_text_columns_are_renumbered() -> None:
    table = TextTable("t", ("a", "b", "c"), [("1", "-", "x"), ("-", "-", "y")], words=(1, 2)).without_empty_columns()
    assert (table.columns, table.rows, table.words) == (["a", "c"], [["1", "x"], ["-", "y"]], [1])


def test_an_interval_is_shown_with_three_significant_digits() -> None:
    assert (show_interval((0.12345, 1234.5)), show_interval(None)) == ("0.123 to 1.23e+03", "-")
