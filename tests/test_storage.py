"""Planning the rank that pairs need: the surprisal, the rank and the `plan` command."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pml.adapter import AdapterConfig, attach_adapter
from pml.backbone import Backbone
from pml.cli import main
from pml.corpus import Corpus, Example
from pml.errors import InputError
from pml.guard import GuardConfig
from pml.storage import FILL, plan_rank, size_of_rank
from pml.storage_constants import Constant, constant_for, read_constants
from pml.surprisal import surprisal_bits

TWO = [Example(0, (3, 4), (5, 6)), Example(1, (7,), (8, 9, 10))]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PML_CACHE", str(tmp_path / "cache"))


def constant(placement: Any = "mlp_block", bits: float = 0.5, **more: Any) -> Constant:
    fields: dict[str, Any] = {"low": bits / 2, "high": 2 * bits, "interval": "range", "backbone": "tiny-llama"}
    return Constant(placement=placement, bits_per_parameter=bits, source="a test", **{**fields, **more})


def by_hand(backbone: Backbone, ids: list[int], targets: int) -> float:
    """Surprisal in bits of the last tokens, each from its own forward pass over the tokens before it."""
    bits = 0.0
    for t in range(len(ids) - targets, len(ids)):
        with torch.no_grad():
            logits = backbone.model(input_ids=torch.tensor([ids[:t]])).logits[0, -1].double()
        bits -= math.log2(float(logits.softmax(-1)[ids[t]]))
    return bits


def test_surprisal_is_that_of_the_frozen_model_without_or_after_other_pairs(tiny_backbone: Backbone) -> None:
    alone = by_hand(tiny_backbone, [3, 4, 5, 6], 2) + by_hand(tiny_backbone, [7, 8, 9, 10], 3)
    assert surprisal_bits(tiny_backbone, TWO) == pytest.approx(alone, rel=1e-5)
    after = by_hand(tiny_backbone, [7, 8, 9, 10, 3, 4, 5, 6], 2) + by_hand(tiny_backbone, [3, 4, 5, 6, 7, 8, 9, 10], 3)
    assert surprisal_bits(tiny_backbone, TWO, others=1) == pytest.approx(after, rel=1e-5)
    # There is only one other pair.
    assert surprisal_bits(tiny_backbone, TWO, others=6) == pytest.approx(after, rel=1e-5)


def test_other_pairs_that_do_not_fit_into_the_context_window_are_left_out(tiny_backbone: Backbone) -> None:
    tiny_backbone.config.max_position_embeddings = 7
    assert surprisal_bits(tiny_backbone, TWO, others=1) == pytest.approx(surprisal_bits(tiny_backbone, TWO))


def test_the_surprisal_of_many_pairs_is_extrapolated_from_a_sample(tiny_backbone: Backbone) -> None:
    four = [*TWO, Example(2, (3, 4), (5,)), Example(3, (9,), (1, 1))]
    # The sample is the first and the third pair, with three of the eight target tokens.
    some = by_hand(tiny_backbone, [3, 4, 5, 6], 2) + by_hand(tiny_backbone, [3, 4, 5], 1)
    assert surprisal_bits(tiny_backbone, four, sample=2) == pytest.approx(some * 8 / 3, rel=1e-5)


def test_the_parameters_per_rank_are_counted_on_a_real_adapter(tiny_backbone: Backbone) -> None:
    # Hidden size 32, MLP size 64.
    size = size_of_rank(tiny_backbone, AdapterConfig(block=1))
    assert (size.trainable, size.saved, size.largest_rank) == (64, 64, 32)
    size = size_of_rank(tiny_backbone, AdapterConfig(block=[1, 2], placement=["down_proj"]))
    # A matrix of the MLP, 64 by 32, has no rank above 32.
    assert (size.trainable, size.saved, size.largest_rank) == (2 * (64 + 32), 2 * (64 + 32), 32)
    guard = GuardConfig(directions=50)
    size = size_of_rank(tiny_backbone, AdapterConfig(block=1, placement=["down_proj"], guard=guard))
    assert (size.trainable, size.saved, size.largest_rank) == (14 + 32, 64 + 32, 14)
    attach_adapter(tiny_backbone, AdapterConfig(block=1))  # refused if an adapter were left


def test_the_planned_rank_is_the_smallest_that_holds_the_bits(tiny_backbone: Backbone) -> None:
    plan = plan_rank(tiny_backbone, Corpus("two", TWO), AdapterConfig(block=1), [constant(bits=0.5)])
    bits = min(surprisal_bits(tiny_backbone, TWO), surprisal_bits(tiny_backbone, TWO, others=6))
    assert plan.bits_to_store == pytest.approx(bits)
    # Each rank has 64 parameters.
    assert plan.rank == math.ceil(bits / (FILL * 0.5 * 64))
    assert FILL * 0.5 * 64 * (plan.rank - 1) < bits <= FILL * 0.5 * 64 * plan.rank
    assert plan.rank_interval == (math.ceil(bits / (FILL * 1.0 * 64)), math.ceil(bits / (FILL * 0.25 * 64)))
    assert (plan.pairs, plan.target_tokens, plan.parameters) == (2, 5, 64 * plan.rank)
    assert plan.megabytes == pytest.approx(64 * plan.rank * 4 / 1e6)
    first, second, third = plan.lines()
    assert first.startswith("2 pairs, 5 target tokens: ")
    assert second.startswith(f"rank {plan.rank} ({plan.rank_interval[0]} to {plan.rank_interval[1]}) in mlp_block: ")
    assert third == "based on 0.5 bits per parameter (0.25 to 1, range; a test), filled to 50%"


def test_a_guarded_adapter_saves_more_numbers_than_it_trains(tiny_backbone: Backbone) -> None:
    adapter = AdapterConfig(block=1, guard=GuardConfig(directions=12))
    plan = plan_rank(tiny_backbone, Corpus("two", TWO), adapter, [constant(guarded=True)])
    # Twenty of 32 directions are free; A and B are saved whole, with four bytes per number.
    assert plan.parameters == (20 + 32) * plan.rank
    assert plan.megabytes == pytest.approx((32 + 32) * plan.rank * 4 / 1e6)


def test_a_plan_warns_if_the_rank_interval_does_not_fit_or_only_a_sample_was_measured(
    tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    bits = min(surprisal_bits(tiny_backbone, TWO), surprisal_bits(tiny_backbone, TWO, others=6))
    # The bits need between 31 and 32 ranks of 64 parameters.
    needed = [constant(bits=bits / (FILL * 64 * 31.5))]
    monkeypatch.setattr("pml.storage.SAMPLE", 2)
    plan = plan_rank(tiny_backbone, Corpus("two", TWO), AdapterConfig(block=1), needed)
    # The lower end of the interval is half the constant, so it needs twice the rank.
    too_large = "the interval ends at rank 63, and no more than 32 fits"
    assert (plan.rank, plan.warnings) == (32, [too_large])
    monkeypatch.setattr("pml.storage.SAMPLE", 1)
    assert plan_rank(tiny_backbone, Corpus("two", TWO), AdapterConfig(block=1), needed).warnings == [
        "surprisal was measured on 1 of the pairs, evenly spaced",
        too_large,
    ]


def test_a_fact_with_several_prompts_is_counted_once(tiny_backbone: Backbone) -> None:
    first, second = TWO
    worded = [first, replace(first, prompt_ids=(9, 9), example_id=1), replace(second, example_id=2)]
    plans = [
        plan_rank(tiny_backbone, corpus, AdapterConfig(block=1), [constant(bits=0.5)])
        for corpus in (Corpus("two", TWO), Corpus("worded", worded, fact_ids=[0, 0, 1]))
    ]
    assert plans[0].bits_to_store == plans[1].bits_to_store
    assert [plan.pairs for plan in plans] == [2, 3]


def test_bits_that_need_more_than_the_largest_rank_are_refused(tiny_backbone: Backbone) -> None:
    with pytest.raises(InputError, match=r"bits need rank \d+ in mlp_block, and no more than 32 fits"):
        plan_rank(tiny_backbone, Corpus("two", TWO), AdapterConfig(block=1), [constant(bits=0.001)])


def test_a_constant_of_another_placement_or_without_the_guard_comes_with_a_warning() -> None:
    known = [constant(bits=0.8), constant(["q_proj", "v_proj"], bits=0.4), constant(bits=0.6, guarded=True)]
    assert constant_for("mlp_block", False, "tiny-llama", known) == (known[0], [])
    assert constant_for("mlp_block", True, "tiny-llama", known) == (known[2], [])
    found, (warning,) = constant_for(["v_proj", "q_proj"], True, "tiny-llama", known)
    assert (found, warning) == (known[1], "bits per parameter were measured without the guard")
    assert constant_for(["o_proj"], True, "tiny-llama", known)[0] == known[2]
    found, (warning,) = constant_for(["o_proj"], False, "tiny-llama", known)
    assert found == known[1]
    assert warning == (
        "nothing was measured at this placement; the plan assumes what q_proj, v_proj stores, the least of all"
    )


def test_a_constant_of_another_backbone_comes_with_a_warning_and_only_without_one_of_this_backbone() -> None:
    other, own = constant(bits=0.8, backbone="gpt2"), constant(bits=0.6)
    assert constant_for("mlp_block", False, "tiny-llama", [other, own]) == (own, [])
    found, warnings = constant_for("mlp_block", False, "tiny-llama", [other])
    assert found == other
    assert warnings == [
        "bits per parameter were measured on gpt2; `pml calibrate --backbone tiny-llama` measures this one's"
    ]


def test_constants_are_packaged_for_common_placements() -> None:
    shipped = read_constants()
    assert {"mlp_block", "down_proj", "q_proj v_proj"} <= {
        known.placement if isinstance(known.placement, str) else " ".join(known.placement) for known in shipped
    }
    # The placement that `pml memorize` plans for.
    every_linear_layer = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert constant_for(every_linear_layer, True, "smollm2-135m", shipped)[1] == []
    assert all(known.low < known.bits_per_parameter < known.high and known.source for known in shipped)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "file: invalid json"),
        ("{}", "version: field required"),
        ('{"version": 2, "constants": [{"bits": 1}]}', "version: input should be 1"),
        ('{"version": 1, "constants": [{"placement": "mlp_block"}]}', "constants.0.bits_per_parameter: field required"),
        ('{"version": 1, "constants": 3}', "constants: input should be a valid array"),
    ],
)
def test_a_file_that_is_not_a_constants_file_of_version_1_is_refused(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "constants.json"
    path.write_text(content)
    with pytest.raises(InputError, match=rf"constants\.json: not a file of constants of version 1 \({said}"):
        read_constants(path)


class TestCommand:
    @pytest.fixture
    def facts(self, tmp_path: Path) -> Path:
        path = tmp_path / "facts.csv"
        path.write_text("query,target\nfirst?,007\nsecond?,415\n")
        return path

    def test_the_rank_of_a_file_of_pairs_is_planned_as_json_and_as_text(
        self, facts: Path, tiny_backbone_folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        asked = ["plan", str(facts), f"--backbone={tiny_backbone_folder}", "--placement=mlp_block", "--guard=false"]
        assert main([*asked, "--json"]) == 0
        plan = json.loads(capsys.readouterr().out)
        # Each target is three digits and the end-of-turn token.
        assert (plan["pairs"], plan["target_tokens"]) == (2, 8)
        assert plan["rests_on"]["bits_per_parameter"] == 0.85
        assert main(asked) == 0
        assert f"rank {plan['rank']} (" in capsys.readouterr().out

    def test_the_columns_of_the_pairs_can_be_named(
        self, tiny_backbone_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "own.csv").write_text("question,answer\nfirst?,007\n")
        asked = ["plan", str(tmp_path / "own.csv"), f"--backbone={tiny_backbone_folder}", "--placement=mlp_block"]
        assert main([*asked, "--guard=false", "--query_column=question", "--target_column=answer", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["target_tokens"] == 4
        assert main([*asked, "--guard=false"]) == 2
        assert "or name yours by query_column and target_column" in capsys.readouterr().err

    def test_constants_from_the_users_file_replace_the_packaged_ones(
        self, facts: Path, tiny_backbone_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        own = tmp_path / "own.json"
        own.write_text(json.dumps({"version": 1, "constants": [constant(bits=0.33).model_dump()]}))
        asked = ["plan", str(facts), f"--backbone={tiny_backbone_folder}", "--placement=mlp_block", "--guard=false"]
        assert main([*asked, f"--constants={own}", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["rests_on"]["bits_per_parameter"] == 0.33

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            (["facts.csv", "--length=3"], "--length is only for a fitted law, which facts.csv is not; leave it out"),
            (["law.json", "--guard=true"], "--guard is only for a file of pairs, which law.json is not; leave it out"),
            (["law.json", "--query_column=q"], "--query-column is only for a file of pairs, which law.json is not"),
            (["law.json"], "--length is missing; expected the target tokens of the corpus, such as --length 512"),
        ],
    )
    def test_options_that_do_not_match_the_kind_of_input_are_refused(
        self, given: list[str], said: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["plan", *given]) == 2
        assert said in capsys.readouterr().err
