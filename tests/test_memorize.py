"""`pml memorize`: transformers and PEFT alone recall every target, or the pair is listed as failed."""

import json
import math
import os
import signal
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from peft import PeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

import pml
from pml import memorizing, served
from pml.adapter import AdapterConfig, attach_adapter, detach_adapter
from pml.backbone import Backbone
from pml.certificate import Rounding
from pml.cli import main
from pml.errors import InputError
from pml.growing import grow, weights_of
from pml.guard import GuardConfig
from pml.memorizing import Memorized, epoch_limit
from pml.records import read_record
from tests.fits import save_sharpened

FACTS = {f"code {i}?": code for i, code in enumerate(("007", "415", "9-2", "№ 8"))}
ALL = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
EASY: dict[str, Any] = {"block": 2, "placement": ALL, "learning_rate": 0.02, "guard": GuardConfig(directions=8)}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PML_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def sharp(tiny_backbone_folder: Path, tmp_path: Path) -> str:
    return str(save_sharpened(tiny_backbone_folder, tmp_path / "sharp"))


@pytest.fixture
def _served_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers from this process; that a process without pml gives the same is tested once here, and in `serving`."""
    monkeypatch.setattr("pml.memorizing.serve", lambda *asked: served._answers(served._job(*asked)))


@pytest.fixture
def _brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts of one epoch."""
    monkeypatch.setattr("pml.memorizing.EPOCHS", 1)
    monkeypatch.setattr("pml.memorizing.MIN_STEPS", {"plain": 1, "falling": 1})


@pytest.fixture(scope="module")
def memorized(tiny_backbone_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Memorized, list[Any]]:
    """The backbone, the result of memorising the facts on it, and the progress reported meanwhile."""
    folder, told = tmp_path_factory.mktemp("memorized"), []
    sharp = str(save_sharpened(tiny_backbone_folder, folder / "sharp"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PML_CACHE", str(folder / "cache"))
        made = pml.memorize(FACTS, folder / "out", backbone=sharp, rank=16, on_progress=told.append, **EASY)
    return sharp, made, told


def test_facts_are_recalled_by_transformers_and_peft_alone(
    memorized: tuple[str, Memorized, list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    sharp, made, told = memorized
    assert made.failed == []
    assert list(made.served or ()) == list(FACTS.values())
    assert (made.plan is not None, made.rank) == (True, 16)
    assert min(float(known.probability) for known in made.certificates) > 0.6
    assert told[-1].certain == 1 and told[-1].step == made.steps <= told[-1].steps
    record = read_record(made.adapter.parent / "record.json")
    assert (record.steps_to_recall, record.method_settings["guard"]["directions"]) == (made.steps, 8)
    harm = record.harm["mean"]
    assert made.harm == harm["loss_after"] - harm["loss_before"]  # type: ignore[operator]
    # Recalled by a short script that uses nothing of pml.
    script = f"""
from peft import PeftModel; from transformers import AutoModelForCausalLM, AutoTokenizer
t = AutoTokenizer.from_pretrained({sharp!r})
m = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({sharp!r}), {str(made.adapter)!r})
x = t.apply_chat_template([dict(role="user", content="code 3?")], add_generation_prompt=True, return_tensors="pt",
                          return_dict=True)
y = m.generate(**x, do_sample=False, max_new_tokens=20, eos_token_id=t.eos_token_id)
print(t.decode(y[0, x["input_ids"].shape[1]:], skip_special_tokens=True))
"""
    capsys.readouterr()
    exec(script, {})
    assert capsys.readouterr().out == "№ 8\n"


def test_the_model_card_states_queries_recall_and_harm_but_no_targets(
    memorized: tuple[str, Memorized, list[Any]],
) -> None:
    _, made, _ = memorized
    card = (made.adapter / "README.md").read_text()
    assert all(f"- `{query}`" in card for query in FACTS)
    assert not any(f"`{target}`" in card for target in FACTS.values())
    assert "it returned 4 of 4 targets byte for byte" in card
    before, after = made.record.harm["code"]["loss_before"], made.record.harm["code"]["loss_after"]
    assert f"| code | {before:.3f} | {after:.3f} |" in card
    assert "The adapter was guarded" in card


@pytest.mark.usefixtures("_served_here")
def test_the_command_exits_with_0_and_leaves_a_run_that_certify_accepts(
    sharp: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.dumps({"query": query, "target": target}) for query, target in FACTS.items()]
    (tmp_path / "facts.jsonl").write_text("\n".join(rows))
    arguments = ["memorize", "facts.jsonl", "--out=out", f"--backbone={sharp}", "--block=2", "--rank=16"]
    arguments += [f"--placement=[{','.join(ALL)}]", "--learning_rate=0.02", "--guard=false"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert said.startswith("4 pairs, ")
    assert "training begins at rank 16\n" in said
    assert "4 of 4 pairs are certain at rank 16 after" in said
    assert "4 of 4 came back byte for byte from transformers and PEFT alone" in said
    assert main(["certify", "out", "--dtypes=float32"]) == 0
    assert "4 are certain" in capsys.readouterr().out
    # Nothing is overwritten unless requested.
    assert main(arguments) == 2
    assert "out is not an empty folder; choose another one, or pass overwrite" in capsys.readouterr().err


@pytest.mark.usefixtures("_served_here", "_brief")
def test_failed_pairs_are_listed_and_the_exit_code_is_1(
    tiny_backbone_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "facts.csv").write_text("query,target\na?,1\nb?,2\n")
    arguments = ["memorize", "facts.csv", "--out=out", f"--backbone={tiny_backbone_folder}", "--guard=false"]
    assert main([*arguments, "--rank=1", "--block=1", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    # The rank has doubled three times.
    assert (told["rank"], told["failed"]) == (8, ["a?", "b?"])
    assert told["pairs"][0]["verdict"] == "failing" and told["pairs"][0]["served"] is False
    # One step at each of four ranks; the record covers all of them.
    record = read_record(tmp_path / "out/record.json")
    assert (told["steps"], record.optimizer_steps, record.grown_from) == (4, 4, [1, 2, 4])
    assert record.target_tokens_trained == 4 * record.target_tokens
    assert "for 4 steps" in (tmp_path / "out/adapter/README.md").read_text()


@pytest.mark.usefixtures("_served_here", "_brief")
def test_the_plain_loss_replaces_the_falling_threshold_from_2_5_times_the_planned_rank(
    tiny_backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pml.memorizing.DOUBLINGS", 0)
    settings: dict[str, Any] = {"backbone": str(tiny_backbone_folder), "block": 1, "placement": ALL, "guard": None}
    first = pml.memorize(FACTS, tmp_path / "first", rank=1, margin=0.9, **settings)
    assert first.plan is not None
    # The threshold does not fall below the margin at which training stops.
    threshold = {"start": 0.999, "end": 0.9, "when_memorized": "skip"}
    weighting = {"class_path": "pml.weighting.FallingThreshold", "init_args": threshold}
    assert (first.record.method, first.record.method_settings["weighting"]) == ("memft", weighting)
    enough = math.ceil(2.5 * first.plan.rank)
    for rank, method in ((enough - 1, "memft"), (enough, "sft")):
        made = pml.memorize(FACTS, tmp_path / str(rank), rank=rank, **settings)
        assert (made.rank, made.record.method) == (rank, method)


@pytest.mark.usefixtures("_served_here", "_brief")
@pytest.mark.parametrize("guarded", [27, 28])
def test_the_rank_does_not_grow_beyond_the_directions_that_the_guard_leaves_free(
    guarded: int, tiny_backbone_folder: Path, tmp_path: Path
) -> None:
    guard = GuardConfig(directions=guarded)  # of 32, so five or four are free
    made = pml.memorize(
        FACTS, tmp_path / "out", backbone=str(tiny_backbone_folder), rank=2, block=1, placement=["q_proj"], guard=guard
    )
    assert (made.rank, len(made.failed)) == (4, 4)


def test_in_bfloat16_logit_margins_exceed_the_measured_rounding(sharp: str, tmp_path: Path) -> None:
    made = pml.memorize(FACTS, tmp_path / "out", backbone=sharp, rank=16, dtype="bfloat16", **EASY)
    assert made.failed == []
    assert (made.record.dtype, list(made.served or ())) == ("bfloat16", list(FACTS.values()))
    assert made.record.rounding_logits is not None
    assert min(float(known.margins.min()) for known in made.certificates) > made.record.rounding_logits > 0


@pytest.mark.usefixtures("_served_here")
def test_in_16_bits_training_goes_on_until_the_certificates_hold(
    sharp: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # More than what ends training by the scores of batches.
    monkeypatch.setattr("pml.certified_stop.measure_rounding", lambda *_: Rounding(2.0, 9))
    fast: dict[str, Any] = {**EASY, "guard": None, "kl_penalty": None}
    made = pml.memorize(FACTS, tmp_path / "out", backbone=sharp, rank=16, dtype="bfloat16", **fast)
    assert (made.failed, made.rank, made.record.steps_to_recall) == ([], 16, made.steps)
    assert made.record.rounding_logits is not None and made.record.rounding_logits < 2
    assert min(float(known.margins.min()) for known in made.certificates) > 2
    card = (made.adapter / "README.md").read_text()
    assert "Greedy decoding is certain to give every target back" in card


@pytest.mark.usefixtures("_brief")
@pytest.mark.parametrize("raised", [KeyboardInterrupt, SIGTERMException])
def test_ctrl_c_raises_and_works_again_afterwards_and_sigterm_exits(
    raised: type[BaseException], tiny_backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise raised

    monkeypatch.setattr("callbacks.StopWhenRecalled.on_train_batch_end", stop)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(raised):
        pml.memorize(FACTS, tmp_path / "out", backbone=str(tiny_backbone_folder), rank=2, block=1, guard=None)
    assert signal.getsignal(signal.SIGINT) is before
    if raised is KeyboardInterrupt:
        assert read_record(tmp_path / "out/record.json").status == "interrupted"


def test_a_backbone_that_overflows_in_float16_is_refused_before_training(
    tiny_backbone_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "large"
    model = AutoModelForCausalLM.from_pretrained(tiny_backbone_folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_backbone_folder).save_pretrained(folder)
    for rank in (None, 2):
        with pytest.raises(InputError, match="gives logits that are not finite in float16; take bfloat16 or float32"):
            pml.memorize(FACTS, tmp_path / "out", backbone=str(folder), dtype="float16", rank=rank, guard=None)


@pytest.mark.usefixtures("_served_here", "_brief")
def test_batches_are_padded_with_the_end_of_turn_since_a_padding_token_may_lie_outside_the_embeddings(
    tiny_backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_sharpened(tiny_backbone_folder, tmp_path / "sharp")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = tokenizer.eos_token_id
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    assert (
        AutoTokenizer.from_pretrained(folder).pad_token_id
        >= json.loads((folder / "config.json").read_text())["vocab_size"]
    )
    used: list[int] = []
    generate = PeftModelForCausalLM.generate

    def noting(self: Any, **given: Any) -> Any:
        used.append(given["pad_token_id"])
        return generate(self, **given)

    monkeypatch.setattr(PeftModelForCausalLM, "generate", noting)
    monkeypatch.setattr("pml.memorizing.DOUBLINGS", 0)
    pml.memorize(FACTS, tmp_path / "out", backbone=str(folder), rank=2, block=1, placement=ALL, guard=None)
    assert used == [end]


@pytest.mark.usefixtures("_served_here", "_brief")
def test_without_an_end_of_turn_an_answer_is_as_long_as_its_target(tiny_backbone_folder: Path, tmp_path: Path) -> None:
    folder = save_sharpened(tiny_backbone_folder, tmp_path / "sharp")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    facts = {"code?": "4071", "side?": "L"}
    made = pml.memorize(facts, tmp_path / "out", backbone=str(folder), rank=2, block=1, placement=ALL)
    assert made.served is not None and [len(answer) for answer in made.served] == [4, 1]


def test_serving_needs_no_pad_or_end_token_and_no_more_positions_than_the_longest_pair(
    tiny_backbone_folder: Path, tmp_path: Path
) -> None:
    folder = save_sharpened(tiny_backbone_folder, tmp_path / "sharp")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # Each pair fits, but the long prompt and the long target would not fit together in one batch.
    facts = {"why? " * 4: "7", "x": "0123456789" * 2}
    (folder / "chat_template.jinja").unlink()
    longest = max(len(tokenizer(q).input_ids) + len(tokenizer(t).input_ids) for q, t in facts.items())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": longest}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    kept = {k: v for k, v in settings.items() if k not in ("pad_token", "eos_token", "bos_token", "chat_template")}
    (folder / "tokenizer_config.json").write_text(json.dumps(kept))
    assert AutoTokenizer.from_pretrained(folder).pad_token_id is None
    made = pml.memorize(facts, tmp_path / "out", backbone=str(folder), rank=2, block=1, placement=ALL, guard=None)
    assert made.served is not None
    assert [answer == t for answer, t in zip(made.served, facts.values(), strict=True)] == [
        known.verdict != "failing" for known in made.certificates
    ]


@pytest.mark.usefixtures("_served_here", "_brief")
def test_an_answer_may_exceed_its_target_by_a_few_tokens_if_the_model_has_positions_left(
    sharp: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    generate = PeftModelForCausalLM.generate

    def noting(self: Any, **given: Any) -> Any:
        asked.append(given["input_ids"].shape[1] + given["max_new_tokens"])
        return generate(self, **given)

    monkeypatch.setattr(PeftModelForCausalLM, "generate", noting)
    monkeypatch.setattr("pml.memorizing.DOUBLINGS", 0)
    settings: dict[str, Any] = {"backbone": sharp, "rank": 2, "block": 1, "placement": ALL, "guard": None}
    made = pml.memorize({"code?": "4071"}, tmp_path / "wide", **settings)
    needed = len(made.certificates[0].example)
    path = Path(sharp) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_position_embeddings": needed}))
    pml.memorize({"code?": "4071"}, tmp_path / "narrow", **settings)
    assert asked == [needed + served.BEYOND, needed]


@pytest.mark.parametrize("pairs", [{"a": 1}, {"a": ""}, [("a", None)], {"a": "\ud800"}, {"": "b"}])
def test_an_invalid_pair_is_refused_before_a_folder_is_created(pairs: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected text that is not empty and has no lone surrogate"):
        pml.memorize(pairs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_rank_that_does_not_fit_leaves_nothing_that_blocks_the_next_call(sharp: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"adapter\.rank is 1000; above the width"):
        pml.memorize(FACTS, tmp_path / "out", backbone=sharp, rank=1000, **EASY)
    assert not (tmp_path / "out").exists()


def test_the_trained_model_is_freed_before_another_process_serves_it(
    sharp: str, _brief: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[weakref.ref[Any]] = []
    fresh = memorizing._fresh_module

    def noting(*given: Any) -> Any:
        module = fresh(*given)
        trained.append(weakref.ref(module.backbone.model))
        return module

    def serve(*given: Any) -> list[str]:
        assert trained and not any(model() for model in trained)
        return ["7"]

    monkeypatch.setattr(memorizing, "_fresh_module", noting)
    monkeypatch.setattr(memorizing, "serve", serve)
    pml.memorize({"a?": "7"}, "out", backbone=sharp, rank=4, **EASY)


def test_a_signal_leaves_the_adapter_trained_so_far(
    sharp: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop_in_the_second_epoch(self: Any, trainer: Any, *_: Any) -> None:
        if trainer.current_epoch == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("callbacks.StopWhenRecalled.on_train_batch_start", stop_in_the_second_epoch)
    Path("facts.json").write_text(json.dumps([{"query": q, "target": t} for q, t in FACTS.items()]))
    Path("facts.json").rename("facts.yaml")
    assert main(["memorize", "facts.yaml", "--out=out", f"--backbone={sharp}", "--rank=2", "--block=2"]) == 143
    said = f"pml memorize: stopped by SIGTERM; the adapter trained so far is in {Path('out/adapter')}"
    assert capsys.readouterr().err.splitlines()[-1] == said
    assert (Path("out/adapter/adapter_model.safetensors")).is_file()
    assert read_record(Path("out/record.json")).status == "interrupted"


@pytest.mark.parametrize("guard", [None, GuardConfig(directions=8)], ids=["plain", "guarded"])
@pytest.mark.parametrize("placement", ["mlp_block", ["down_proj", "q_proj"]], ids=str)
def test_a_grown_adapter_gives_the_same_logits_as_the_smaller_one(
    tiny_backbone: Backbone, placement: Any, guard: GuardConfig | None
) -> None:
    config = AdapterConfig(rank=2, block=1, placement=placement, guard=guard)
    ids = torch.tensor([[5, 9, 60, 3]])
    small = attach_adapter(tiny_backbone, config, seed=1)
    for layer in (m for m in small.modules() if hasattr(m, "lora_B")):
        torch.nn.init.normal_(layer.lora_B["default"].weight)
    before, learnt = small(ids).logits, weights_of(small)
    detach_adapter(small)
    frozen = tiny_backbone.model(ids).logits
    large = attach_adapter(tiny_backbone, AdapterConfig(**{**vars(config), "rank": 4}), seed=2)
    grow(large, learnt)
    torch.testing.assert_close(large(ids).logits, before)
    assert (before - frozen).abs().max() > 0.1
    for layer in (m for m in large.modules() if hasattr(m, "lora_B")):
        assert layer.lora_A["default"].weight[2:].abs().min(dim=1).values.max() > 0  # fresh rows
        assert not layer.lora_B["default"].weight[:, 2:].any()


def test_too_high_a_rate_is_not_blamed_on_the_backbone(tiny_backbone_folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("pml.memorizing.MIN_STEPS", {"plain": 200, "falling": 200})
    settings = {"backbone": str(tiny_backbone_folder), "guard": None, "kl_penalty": None, "placement": "mlp_block"}
    made = pml.memorize(FACTS, "out", rank=4, learning_rate=10.0, **settings)
    assert made.rank == 32 and made.failed


def test_columns_of_files_do_not_concern_pairs_given_in_python(sharp: str, _served_here: None, _brief: None) -> None:
    made = pml.memorize({"a": "b"}, "out", backbone=sharp, rank=4, query_column="Frage", **EASY)
    assert [known.example.query for known in made.certificates] == ["a"]


def test_training_begins_at_the_planned_rank_or_at_eight_if_that_is_higher(
    tiny_backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Enough(Exception):
        """Ends the call before training."""

    begun: list[tuple[int, int]] = []
    backbone = str(tiny_backbone_folder)

    def begin(corpus: Any, plan: Any, rank: int) -> None:
        begun.append((plan.rank, rank))
        raise Enough

    for least in (8, 1):
        monkeypatch.setattr("pml.memorizing.MIN_RANK", least)
        with pytest.raises(Enough):
            pml.memorize({"a?": "7"}, tmp_path / f"{least}", backbone=backbone, guard=None, on_plan=begin)
    planned = begun[0][0]
    assert planned < 8
    assert begun == [(planned, 8), (planned, planned)]


def test_answers_of_similar_lengths_are_batched_if_they_fit_the_positions() -> None:
    # Tokens in each prompt and answer.
    sizes = [(3, 5), (2, 2), (4, 2), (1, 2), (9, 2)]
    assert served.decoded_together(sizes, 2, None) == [[3, 1], [2, 4], [0]]
    # With 11 positions, a prompt of 9 tokens leaves room for an answer of 2, but not of 5.
    assert served.decoded_together(sizes, 9, 11) == [[3, 1, 2, 4], [0]]
    assert served.decoded_together(sizes, 9, 10) == [[3, 1, 2], [4], [0]]
    # At most 24 tokens in a batch: three pairs of 4 + 2, but not four of 9 + 2.
    assert served.decoded_together(sizes, 9, None, 24) == [[3, 1, 2], [4], [0]]
    assert served.decoded_together(sizes, 9, None, 1) == [[3], [1], [2], [4], [0]]


def test_small_corpora_get_more_epochs() -> None:
    # Five pairs take two steps per epoch, 400 pairs a hundred.
    assert (epoch_limit(5, "falling"), epoch_limit(5, "plain"), epoch_limit(400, "falling")) == (480, 200, 60)


def test_an_output_path_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="out is a file; expected a folder to write into"):
            pml.memorize(FACTS, tmp_path / "out", overwrite=overwrite)


def test_training_begins_at_the_largest_rank_that_fits_if_eight_does_not(
    sharp: str, _served_here: None, _brief: None
) -> None:
    # The guard leaves 5 of 32 directions, and one pair needs rank 1.
    begun: list[int] = []
    narrow = {**EASY, "guard": GuardConfig(directions=27)}
    pml.memorize({"a": "b"}, "out", backbone=sharp, **narrow, on_plan=lambda _c, _p, rank: begun.append(rank))
    assert begun == [5]


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        ({}, "pairs is empty; expected at least one query with its target"),
        (["only a query"], "pairs has 'only a query'; expected tuples of a query and a target"),
    ],
)
def test_empty_pairs_and_items_that_are_not_pairs_are_refused(
    pairs: Any, said: str, tmp_path: Path, tiny_backbone_folder: Path
) -> None:
    with pytest.raises(InputError, match=said):
        pml.memorize(pairs, tmp_path / "out", backbone=str(tiny_backbone_folder))


def test_a_margin_below_one_half_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"margin is 0.4; expected a probability of at least 0.5"):
        pml.memorize(FACTS, tmp_path / "out", margin=0.4)
