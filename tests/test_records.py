"""Records are written whole or not at all, read back unchanged, and refused by name if invalid."""

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any

import pydantic
import pytest
from record_factory import make_record, write_run

from pml.errors import InputError
from pml.records import read_record, read_records, write_json, write_record


class TestWriting:
    def test_a_record_survives_the_round_trip(self, tmp_path: Path) -> None:
        record = make_record(placement=["down_proj", "up_proj"], steps_to_recall=73, corpus="Straße")
        path = write_record(tmp_path / "new" / "run", record)
        assert path == tmp_path / "new" / "run" / "record.json"
        assert read_record(path) == record

    def test_the_file_is_json_with_unescaped_text_and_a_final_newline(self, tmp_path: Path) -> None:
        text = write_record(tmp_path, make_record(corpus="Straße")).read_text(encoding="utf-8")
        assert json.loads(text)["corpus"] == "Straße"
        assert "Straße" in text
        assert text.endswith("}\n")

    def test_writing_leaves_no_temporary_file(self, tmp_path: Path) -> None:
        write_record(tmp_path, make_record())
        assert [path.name for path in tmp_path.iterdir()] == ["record.json"]

    def test_a_write_that_fails_leaves_no_record(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def die(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", die)
        with pytest.raises(OSError, match="No space left"):
            write_record(tmp_path, make_record())
        assert not (tmp_path / "record.json").exists()
        with pytest.raises(InputError, match=r"no record\.json in it"):
            read_records([tmp_path])

    def test_content_that_is_not_valid_json_leaves_the_file_unchanged(self, tmp_path: Path) -> None:
        path = tmp_path / "x.json"
        write_json(path, {"a": 1})
        with pytest.raises(ValueError, match="not JSON compliant"):
            write_json(path, {"a": float("nan")})
        assert json.loads(path.read_text()) == {"a": 1}

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_a_number_that_is_not_finite_is_null_in_the_file(self, tmp_path: Path, value: float) -> None:
        names = ("final_loss", "loss_reduction", "min_target_probability", "memorized_bits", "bits_per_parameter")
        names += ("late_loss_drop", "extraction_probability")
        record = make_record(
            **dict.fromkeys(names, value),
            by_kind={"random": {"target_tokens": 8, "final_loss": value}},
            corpus_figures={"held_out_loss": value, "held_out_pairs": 3},
            retention={"prose": {"loss_before": 3.5, "loss_after": value}},
        )
        content = json.loads(write_record(tmp_path, record).read_text(), parse_constant=pytest.fail)
        assert content["status"] == "diverged"
        assert [content[name] for name in names] == [None] * 7
        assert content["by_kind"] == {"random": {"target_tokens": 8, "final_loss": None}}
        assert content["corpus_figures"] == {"held_out_loss": None, "held_out_pairs": 3}
        assert content["retention"] == {"prose": {"loss_before": 3.5, "loss_after": None}}
        assert read_record(tmp_path / "record.json") == record

    def test_a_run_whose_frozen_loss_is_not_finite_has_a_record(self, tmp_path: Path) -> None:
        record = read_record(write_record(tmp_path, make_record(initial_loss=math.inf)))
        assert (record.status, record.initial_loss, record.loss_reduction) == ("finished", None, None)

    def test_private_names_of_lightning_are_not_among_the_settings_whether_written_now_or_before(
        self, tmp_path: Path
    ) -> None:
        path = tmp_path / "record.json"
        noted = {"alpha": 2, "_class_path": "mine.MyMemFT", "_instantiator": "lightning.pytorch.cli.instantiate_module"}
        write_record(tmp_path, make_record(method_settings=noted))
        content = json.loads(path.read_text())
        assert content["method_settings"] == {"alpha": 2}
        path.write_text(json.dumps({**content, "method_settings": noted}))
        assert read_record(path).method_settings == {"alpha": 2}

    def test_writing_again_replaces_the_record(self, tmp_path: Path) -> None:
        write_record(tmp_path, make_record(rank=1))
        assert read_record(write_record(tmp_path, make_record(rank=2))).rank == 2


class TestSchema:
    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"schema_version": 5}, "schema_version: Input should be 1, 2, 3 or 4"),
            ({"rank": 0}, "rank: Input should be greater than or equal to 1"),
            ({"target_tokens": 0}, "target_tokens: Input should be greater than or equal to 1"),
            ({"status": "failed"}, "status: Input should be 'finished', 'diverged' or 'interrupted'"),
            ({"final_loss": None}, "file: Value error, status is finished and final_loss is None; expected the status"),
            (
                {"status": "diverged"},
                "file: Value error, status is diverged and final_loss is 3.1; expected the status",
            ),
            ({"wall_seconds": None}, "wall_seconds: Input should be a valid number"),
            ({"final_loss": "low"}, "final_loss: Input should be a valid number"),
            ({"surprise": 1}, "surprise: Extra inputs are not permitted"),
        ],
    )
    def test_an_invalid_field_is_named_with_what_is_expected(
        self, tmp_path: Path, change: dict[str, Any], named: str
    ) -> None:
        path = tmp_path / "record.json"
        path.write_text(json.dumps(make_record().model_dump(mode="json") | change))
        with pytest.raises(InputError) as caught:
            read_record(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: not a record of schema version 1 to 4: {named}")
        assert message.endswith("run it again, or leave this path out")

    def test_a_missing_field_is_named(self, tmp_path: Path) -> None:
        content = make_record().model_dump(mode="json")
        del content["wall_seconds"]
        (tmp_path / "record.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match="wall_seconds: Field required"):
            read_record(tmp_path / "record.json")

    @pytest.mark.parametrize("text", ["", "{", "[]", "null"])
    def test_a_file_that_is_not_a_json_object_is_refused(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "record.json").write_text(text)
        with pytest.raises(InputError, match="not a record of schema version 1 to 4: file: "):
            read_record(tmp_path / "record.json")

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"loss_reduction": 10.4}, "loss_reduction is 10.4, and initial_loss - final_loss is 10.5"),
            ({"loss_reduction": None}, "loss_reduction is None, and initial_loss - final_loss is 10.5"),
            ({"token_accuracy": math.nan}, "token_accuracy is nan; expected a share from 0 to 1"),
            ({"exact_match": 1.1}, "exact_match is 1.1; expected a share from 0 to 1"),
            ({"min_target_probability": -0.5}, "min_target_probability is -0.5; expected a share"),
            ({"wall_seconds": math.inf}, "wall_seconds is inf; expected a finite number, at least 0"),
            ({"optimizer_steps": -1}, "optimizer_steps is -1; expected a finite number, at least 0"),
            ({"memorized_bits": -3.0}, "memorized_bits is -3.0; expected at least 0"),
            (
                {"status": "diverged", "final_loss": None},
                "loss_reduction is 10.5 but a loss is missing",
            ),
        ],
    )
    def test_a_record_with_impossible_or_contradictory_numbers_is_refused_as_damaged(
        self, tmp_path: Path, change: dict[str, Any], named: str
    ) -> None:
        path = tmp_path / "record.json"
        path.write_text(json.dumps(make_record().model_dump(mode="json") | change))
        with pytest.raises(InputError) as caught:
            read_record(path)
        assert str(caught.value).startswith(f"{path}: damaged, and so no evidence: {named}")

    def test_the_loss_reduction_may_be_off_by_the_rounding_of_the_larger_loss(self, tmp_path: Path) -> None:
        # A millionth of 4000 nats is 0.004.
        for off, known in ((0.003, True), (0.005, False)):
            write_record(tmp_path, make_record(initial_loss=10.0, final_loss=4000.0, loss_reduction=-3990.0 + off))
            with contextlib.nullcontext() if known else pytest.raises(InputError, match="loss_reduction is"):
                read_record(tmp_path / "record.json")

    def test_a_record_of_an_older_version_is_read_with_defaults_for_later_fields(self, tmp_path: Path) -> None:
        content = make_record().model_dump(mode="json") | {"schema_version": 3}
        del content["training"], content["resumed"]
        (tmp_path / "record.json").write_text(json.dumps(content))
        record = read_record(tmp_path / "record.json")
        assert (record.training, record.resumed) == ({}, 0)

    def test_a_record_cannot_be_changed(self) -> None:
        with pytest.raises(pydantic.ValidationError, match="frozen"):
            make_record().rank = 3


def test_a_record_with_a_repeated_key_is_refused_as_damaged(tmp_path: Path) -> None:
    path = write_run(tmp_path) / "record.json"
    path.write_text(path.read_text().replace('"rank": ', '"rank": 3, "rank": '))
    with pytest.raises(InputError, match="damaged, and so no evidence: rank is in it twice"):
        read_record(path)


class TestFinding:
    def test_runs_are_found_at_any_depth_sorted_and_named_by_their_folder(self, tmp_path: Path) -> None:
        for name, rank in (("b", 2), ("deep/er/a", 1), ("a", 3)):
            write_run(tmp_path / name, rank=rank)
        found = read_records([tmp_path])
        assert [(path.relative_to(tmp_path).as_posix(), record.rank) for path, record in found.items()] == [
            ("a", 3),
            ("b", 2),
            ("deep/er/a", 1),
        ]

    def test_runs_behind_links_are_found_once_even_if_links_form_a_loop(self, tmp_path: Path) -> None:
        moved = write_run(tmp_path / "disk" / "moved")
        run = write_run(tmp_path / "runs" / "here")
        (tmp_path / "runs" / "linked").symlink_to(moved)
        (tmp_path / "runs" / "here" / "loop").symlink_to(tmp_path / "runs")
        # A folder that is there itself has its own name, whatever links to it.
        (tmp_path / "runs" / "a_link").symlink_to(run)
        assert list(read_records(tmp_path / "runs")) == [run, tmp_path / "runs" / "linked"]

    def test_a_run_given_by_its_file_its_folder_or_as_a_string_is_found_once(self, tmp_path: Path) -> None:
        run = write_run(tmp_path / "run")
        assert list(read_records([run, run / "record.json", str(run), tmp_path])) == [run]
        assert list(read_records(run)) == list(read_records(str(run))) == [run]

    def test_a_path_that_does_not_exist_is_named(self, tmp_path: Path) -> None:
        write_run(tmp_path / "run")
        with pytest.raises(InputError, match="missing: no such file or folder; expected a run's folder"):
            read_records([tmp_path / "run", tmp_path / "missing"])

    def test_a_folder_without_records_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        write_run(tmp_path / "run")
        with pytest.raises(InputError, match=r"empty: no record\.json in it or below it"):
            read_records([tmp_path / "run", tmp_path / "empty"])

    def test_two_records_in_one_folder_are_refused_by_name(self, tmp_path: Path) -> None:
        first = write_run(tmp_path) / "record.json"
        second = first.rename(tmp_path / "second.json")
        write_run(tmp_path)
        with pytest.raises(InputError, match=r"second\.json: a second record in one folder.*; give each run a folder"):
            read_records([first, second])

    def test_runs_that_a_sweep_has_set_aside_are_read_only_if_given_explicitly(self, tmp_path: Path) -> None:
        run, aside = write_run(tmp_path / "run"), write_run(tmp_path / "run.unfinished-12" / "deep")
        damaged = write_run(tmp_path / "run.unfinished-1") / "record.json"
        damaged.write_text("{}")
        assert list(read_records(tmp_path)) == [run]
        assert list(read_records([tmp_path, aside.parent])) == [run, aside]
        with pytest.raises(InputError, match=r"unfinished-1/record\.json: not a record"):
            read_records(damaged.parent)

    def test_an_invalid_record_among_valid_ones_is_named(self, tmp_path: Path) -> None:
        write_run(tmp_path / "good")
        (write_run(tmp_path / "bad") / "record.json").write_text("{}")
        with pytest.raises(InputError, match=r"bad/record\.json: not a record"):
            read_records([tmp_path])

    def test_a_file_that_cannot_be_read_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "record.json").mkdir()
        with pytest.raises(InputError, match=r"record\.json: cannot be read \(Is a directory\)"):
            read_record(tmp_path / "record.json")
