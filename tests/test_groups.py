"""Which runs belong to one law, and in which settings the runs of one group still differ."""

from pathlib import Path
from typing import Any

import pytest
from record_factory import make_record

from pml.errors import InputError
from pml.groups import (
    differing,
    group_runs,
    method_name,
    method_names,
    setting_of,
    settings_of,
    short_method_names,
    varying,
)

ONLY_THRESHOLD = {"class_path": "pml.weighting.OnlyThreshold", "init_args": {}}


@pytest.mark.parametrize(
    ("method", "settings", "name"),
    [
        ("sft", {"weighting": {"class_path": "pml.weighting.Uniform", "init_args": {}}}, "SFT"),
        ("memft", {"weighting": ONLY_THRESHOLD, "curriculum": None}, "MemFT OnlyThreshold"),
        (
            "memft",
            {"weighting": ONLY_THRESHOLD, "curriculum": {"class_path": "pml.curriculum.PrefixRatio"}},
            "MemFT OnlyThreshold + PrefixRatio",
        ),
        ("sft", {}, "SFT"),
        ("other", {"weighting": 3, "curriculum": [1]}, "other"),
    ],
)
def test_the_name_of_a_method_includes_its_weighting_and_curriculum(
    method: str, settings: dict[str, Any], name: str
) -> None:
    assert method_name(make_record(method=method, method_settings=settings)) == name


def test_runs_of_one_weighting_are_named_by_the_arguments_in_which_they_differ() -> None:
    def run(**arguments: Any) -> Any:
        weighting = {"class_path": "pml.weighting.WholeTargets", "init_args": arguments}
        return make_record(method="memft", method_settings={"weighting": weighting, "curriculum": None})

    sft = make_record(method="sft", method_settings={})
    # The last record is older than the argument, so it has the default.
    records = [sft, run(start=0.8, last_share=0.1), run(start=0.8, last_share=0.0), run(start=0.8)]
    named = method_names({Path(str(i)): record for i, record in enumerate(records)})
    assert list(named.values()) == [
        "SFT",
        "MemFT WholeTargets (last_share 0.1)",
        "MemFT WholeTargets (last_share 0.0)",
        "MemFT WholeTargets (last_share 0.0)",
    ]
    assert set(method_names({Path("a"): records[2], Path("b"): records[3]}).values()) == {"MemFT WholeTargets"}


def test_a_missing_argument_of_a_class_from_elsewhere_is_none() -> None:
    def run(**arguments: Any) -> Any:
        return make_record(
            method="memft", method_settings={"weighting": {"class_path": "my.W", "init_args": arguments}}
        )

    named = method_names({Path("a"): run(), Path("b"): run(power=2)})
    assert list(named.values()) == ["MemFT W (power None)", "MemFT W (power 2)"]


def test_names_are_told_apart_within_a_setting_only() -> None:
    def run(corpus: str, threshold: float) -> Any:
        weighting = {"class_path": "pml.weighting.OnlyThreshold", "init_args": {"threshold": threshold}}
        return make_record(method="memft", corpus=corpus, method_settings={"weighting": weighting})

    groups = group_runs({Path("a"): run("phonebook", 0.5), Path("b"): run("random_tokens", 0.7)})
    assert [group.method for group in groups] == ["MemFT OnlyThreshold", "MemFT OnlyThreshold"]


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["SFT", "MemFT SlidingWindow"], ["SFT", "MemFT"]),
        (["SFT", "MemFT A", "MemFT B (t 1)"], ["SFT", "A", "B (t 1)"]),
        (["SFT", "SFT PrefixRatio", "MemFT A"], ["SFT", "SFT PrefixRatio", "A"]),
        (["SFT PrefixRatio", "MemFT A + PrefixRatio", "MemFT A"], ["SFT PrefixRatio", "A + PrefixRatio", "A"]),
        (["SFT A", "SFT B", "MemFT A", "MemFT B"], ["SFT A", "SFT B", "A", "B"]),
    ],
)
def test_short_names_tell_methods_apart(names: list[str], short: list[str]) -> None:
    assert short_method_names(names) == dict(zip(names, short, strict=True))


def test_runs_of_two_thresholds_are_two_groups() -> None:
    def run(threshold: float) -> Any:
        weighting = {"class_path": "pml.weighting.OnlyThreshold", "init_args": {"threshold": threshold}}
        return make_record(method="memft", method_settings={"weighting": weighting})

    groups = group_runs({Path("a"): run(0.5), Path("b"): run(0.7), Path("c"): run(0.5)})
    assert {group.method: len(group.records) for group in groups} == {
        "MemFT OnlyThreshold (threshold 0.5)": 2,
        "MemFT OnlyThreshold (threshold 0.7)": 1,
    }


@pytest.mark.parametrize(
    "fields",
    [
        {"backbone_hash": "other"},
        {"block": [1]},
        {"placement": ["down_proj"]},
        {"init": "peft"},
        {"corpus": "phonebook"},
        {"method": "sft"},
    ],
)
def test_runs_with_different_settings_form_different_groups(fields: dict[str, Any]) -> None:
    groups = group_runs({Path("a"): make_record(), Path("b"): make_record(**fields), Path("c"): make_record()})
    assert [list(group.records) for group in groups] == [[Path("a"), Path("c")], [Path("b")]]


def test_runs_that_differ_only_in_rank_length_and_seed_form_one_group() -> None:
    runs = [make_record(rank=rank, target_tokens=length, seed=rank) for rank in (1, 2) for length in (8, 16)]
    assert len(group_runs({Path(str(i)): run for i, run in enumerate(runs)})) == 1


def test_grouping_by_folder_separates_sweeps() -> None:
    runs = {Path(f"runs/{sweep}/rank={rank}"): make_record(rank=rank) for sweep in ("old", "new") for rank in (1, 2)}
    groups = group_runs(runs, ["folder"])
    assert [group.setting["folder"] for group in groups] == ["old", "new"]
    assert [len(group.records) for group in groups] == [2, 2]
    assert differing(groups) == ["folder"]


def test_folders_of_the_same_name_are_distinguished_by_their_parent_folders() -> None:
    runs = {Path(f"{search}/best/rank={rank}"): make_record(rank=rank) for search in ("a", "b") for rank in (1, 2)}
    assert [group.setting["folder"] for group in group_runs(runs, ["folder"])] == ["a/best", "b/best"]


def test_differing_lists_only_settings_that_vary_between_groups() -> None:
    groups = group_runs({Path("a"): make_record(), Path("b"): make_record(block=[10]), Path("c"): make_record()})
    assert differing(groups) == ["block"]
    assert differing(groups[:1]) == []


def test_by_splits_groups_and_join_corpora_merges_them() -> None:
    runs = {
        Path("a"): make_record(corpus="a.jsonl", method_settings={"learning_rate": 0.1}),
        Path("b"): make_record(corpus="b.jsonl", method_settings={"learning_rate": 0.2}),
    }
    assert len(group_runs(runs)) == 2
    assert len(group_runs(runs, join_corpora=True)) == 1
    groups = group_runs(runs, ["method_settings.learning_rate"], join_corpora=True)
    assert [group.setting["method_settings.learning_rate"] for group in groups] == [0.1, 0.2]


def test_a_field_that_no_run_has_is_refused() -> None:
    with pytest.raises(InputError, match=r"no run has a value for 'method_settings\.colour'"):
        group_runs({Path("a"): make_record()}, ["method_settings.colour"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rank", 4),
        ("corpus_settings.length", 64),
        ("corpus_settings.length.x", None),
        ("colour", None),
        ("block", [20]),
    ],
)
def test_a_dotted_name_looks_up_a_nested_setting(name: str, value: object) -> None:
    assert setting_of(make_record(), name) == value


def test_nested_settings_are_flattened_to_dotted_names() -> None:
    found = settings_of(make_record(method_settings={"weighting": ONLY_THRESHOLD, "learning_rate": 0.1}))
    assert found["method_settings.weighting.class_path"] == "pml.weighting.OnlyThreshold"
    # A class without arguments is described by its path alone.
    assert not [name for name in found if "init_args" in name]
    assert found["corpus_settings.length"] == 64


def test_varying_settings_exclude_rank_length_and_seed() -> None:
    runs = [
        make_record(rank=1, seed=1, corpus_settings={"length": 8, "seed": 1}, method_settings={"learning_rate": 0.2}),
        make_record(rank=2, seed=2, corpus_settings={"length": 9, "seed": 2}, method_settings={"learning_rate": 0.1}),
        make_record(rank=2, seed=2, corpus_settings={"length": 9, "seed": 2}, method_settings={"learning_rate": 0.1}),
    ]
    assert varying(runs) == {"method_settings.learning_rate": [0.1, 0.2]}


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ({"precision": "32-true"}, {"precision": "bf16-mixed"}, {"training.precision": ["32-true", "bf16-mixed"]}),
        ({"global_batch_size": 2}, {"global_batch_size": 4}, {"training.global_batch_size": [2, 4]}),
        # A batch of the whole corpus has the size of the corpus.
        ({"global_batch_size": 10}, {"global_batch_size": 12}, {}),
        ({"global_batch_size": 10}, {"global_batch_size": 5}, {}),
        # A record of an earlier version lacks training settings.
        ({"precision": "32-true", "gradient_clip_val": 1.0}, {}, {}),
        ({"max_epochs": 3}, {"max_epochs": 4}, {}),
    ],
)
def test_varying_settings_include_training_settings_that_change_the_result(
    first: dict[str, Any], second: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert varying([make_record(pairs=10, training=first), make_record(pairs=12, training=second)]) == expected


@pytest.mark.parametrize(
    ("fields", "steps"),
    [
        ({}, {"optimizer_steps": [50, 200]}),
        # A run that recalled everything may have stopped early, and runs of another size may need other steps.
        ({"steps_to_recall": 50}, {}),
        ({"status": "interrupted"}, {}),
        ({"target_tokens": 96}, {}),
        ({"target_tokens": 96, "optimizer_steps": 7777}, {}),
    ],
)
def test_optimiser_steps_are_compared_only_between_unrecalled_finished_runs_of_one_size(
    fields: dict[str, Any], steps: dict[str, list[int]]
) -> None:
    runs = [
        make_record(optimizer_steps=200, steps_to_recall=None),
        make_record(**{"optimizer_steps": 50, "steps_to_recall": None} | fields),
    ]
    assert varying(runs) == steps


@pytest.mark.parametrize(("sizes", "expected"), [((8, 4), [4, 8]), ((9, 8), []), ((8, 4, 2), [2, 4, 8])])
def test_a_batch_of_the_whole_corpus_differs_from_a_smaller_one_on_the_same_pairs(
    sizes: tuple[int, ...], expected: list[int]
) -> None:
    records = [make_record(pairs=8, training={"global_batch_size": size}) for size in sizes]
    assert varying(records).get("training.global_batch_size", []) == expected


def test_varying_numbers_are_sorted_by_value() -> None:
    records = [make_record(pairs=100, training={"global_batch_size": size}) for size in (16, 2, 4)]
    assert varying(records)["training.global_batch_size"] == [2, 4, 16]


def test_a_batch_size_that_one_record_lacks_is_listed_beside_the_others() -> None:
    records = [make_record(pairs=100, training={"global_batch_size": size}) for size in (None, 16, 4)]
    assert varying(records)["training.global_batch_size"] == [4, 16, None]


def test_steps_that_differ_are_listed_for_the_sizes_that_differ_in_them() -> None:
    of_two_sizes = [(64, 50), (64, 200), (96, 7777)]
    runs = [
        make_record(target_tokens=tokens, optimizer_steps=steps, steps_to_recall=None) for tokens, steps in of_two_sizes
    ]
    assert varying(runs) == {"optimizer_steps": [50, 200]}
