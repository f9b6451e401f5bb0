"""The record of a fit: its fields against independent computations, its files, and when they may be overwritten."""

import dataclasses
import gc
import importlib.metadata
import json
import math
import platform
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torchmetrics.functional.text import edit_distance
from transformers import AutoModelForCausalLM

from callbacks import RunRecord, StopWhenRecalled, TokenThresholds, VerbatimRecall
from pml.adapter import AdapterConfig, adapter_parameters
from pml.corpus import Corpus
from pml.errors import InputError
from pml.modules import SFT, MemFT, Memorization
from pml.recall import greedy_recall, score_corpus
from pml.records import Record, read_record
from pml.token_scores import TokenScores
from pml.weighting import OnlyThreshold
from tests.fits import ADAPTER, module_on
from tests.tiny_runs import Ids, make_trainer, uneven


def all_callbacks(**record: Any) -> list[Callback]:
    return [VerbatimRecall(), TokenThresholds(), StopWhenRecalled(), RunRecord(**record)]


def test_a_module_is_freed_after_its_fit(tiny_backbone_folder: Path, tmp_path: Path) -> None:
    def fitted() -> "weakref.ref[Memorization]":
        module = module_on(tiny_backbone_folder)
        trainer = make_trainer(tmp_path, max_epochs=1, callbacks=all_callbacks(dirpath=str(tmp_path / "run")))
        trainer.fit(module, datamodule=Ids(uneven(3)))
        return weakref.ref(module)

    module = fitted()
    gc.collect()
    assert module() is None


def token_losses(model: torch.nn.Module, data: Ids) -> list[list[float]]:
    """Losses of all target tokens, from full forward passes over one example at a time."""
    losses = []
    for example in data.examples:
        start, end = len(example.prompt_ids), len(example)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([example.prompt_ids + example.target_ids])).logits[0]
        target = torch.tensor(example.target_ids)
        losses.append((-logits[start - 1 : end - 1].log_softmax(-1)[torch.arange(len(target)), target]).tolist())
    return losses


def flat(losses: list[list[float]]) -> list[float]:
    return [loss for row in losses for loss in row]


@pytest.fixture
def data() -> Ids:
    return Ids(uneven(5), batch_size=2)


def test_the_recorded_fields_agree_with_independent_computations(
    data: Ids, sharp: Path, tmp_path: Path, logged_trainer: Callable[..., Trainer]
) -> None:
    module = module_on(sharp, seed=9)
    callbacks = all_callbacks()
    logged_trainer(max_epochs=20, callbacks=callbacks).fit(module, datamodule=data)
    record = read_record(tmp_path / "run" / "record.json")
    assert record == callbacks[-1].record

    frozen = flat(token_losses(AutoModelForCausalLM.from_pretrained(sharp, dtype=torch.float32), data))
    rows = token_losses(module.model, data)
    final = flat(rows)
    tokens = sum(len(t) for _, t in uneven(5))
    assert tokens == len(final) == 28
    # The split and the whole model differ by float32 rounding.
    assert record.initial_loss == pytest.approx(sum(frozen) / tokens, rel=1e-5)
    assert record.final_loss == pytest.approx(sum(final) / tokens, rel=1e-5)
    assert record.loss_reduction == record.initial_loss - record.final_loss > 0.5
    assert record.sub_threshold_fraction == pytest.approx(sum(math.exp(-x) <= 0.5 for x in final) / tokens)
    assert record.min_target_probability == pytest.approx(math.exp(-max(final)), rel=1e-4)
    assert record.corpus_entropy_bits == 8.0 * tokens
    bits = 8.0 * tokens - sum(final) / math.log(2)
    assert bits > 0
    assert record.memorized_bits == pytest.approx(bits, rel=1e-5)
    parameters = 2 * 32 * ADAPTER.rank
    assert record.effective_parameters == parameters
    assert record.bits_per_parameter == pytest.approx(bits / parameters, rel=1e-5)

    answers = greedy_recall(module, data.examples)
    assert record.generated_exact_match == record.exact_match == sum(a.exact for a in answers) / 5
    assert record.generated_token_accuracy == sum(a.right_tokens for a in answers) / tokens
    first = [next((t for t, ok in enumerate(a) if not ok), len(a)) for a in right_tokens(module, data)]
    assert record.first_failure == pytest.approx(sum(first) / 5)
    chances = [1 - (1 - math.exp(-sum(row))) ** 100 for row in rows]
    assert record.extraction_probability == pytest.approx(sum(chances) / 5, rel=1e-4)
    assert record.extraction_samples == 100
    decode = module.tokenizer.decode
    texts = [(str(decode(list(a.token_ids))), str(decode(list(a.example.target_ids)))) for a in answers]
    distances = [edit_distance(said, true).item() / max(len(said), len(true)) for said, true in texts]
    assert record.generated_edit_similarity == pytest.approx(1 - sum(distances) / 5)
    assert (record.by_kind, record.corpus_figures, record.retention) == ({}, {}, {})
    assert record.token_accuracy == pytest.approx(sum(map(sum, right_tokens(module, data))) / tokens)

    # Five examples in batches of two: three steps per epoch, each token trained on once.
    assert record.optimizer_steps == 60
    assert record.target_tokens_trained == 20 * tokens
    assert (record.pairs, record.target_tokens, record.corpus) == (5, tokens, "ids")
    assert record.corpus_hash == data.corpus.content_hash
    assert (record.rank, record.block, record.placement, record.init) == (16, [2], "mlp_block", "published")
    assert (record.backbone, record.dtype, record.method, record.seed) == (str(sharp), "float32", "sft", 9)
    assert record.backbone_hash == module.backbone.content_hash
    assert record.method_settings == module.settings()
    assert (record.status, record.steps_to_recall, record.schema_version) == ("finished", None, 4)
    assert 0 < record.wall_seconds < 60
    assert record.versions["python"] == platform.python_version()
    assert record.versions["torch"] == importlib.metadata.version("torch")
    assert record.hardware["device"] == "cpu"
    assert record.hardware["devices"] == 1
    assert record.hardware["threads"] == torch.get_num_threads()
    assert record.git_commit is None or re.fullmatch(r"[0-9a-f]{40}\+?", record.git_commit)


def right_tokens(module: Memorization, data: Ids) -> list[list[bool]]:
    scores = score_corpus(module, data.val_dataloader())
    return [row[mask].tolist() for row, mask in zip(scores.correct, scores.mask, strict=True)]


def test_the_record_of_a_recalled_corpus_has_its_steps_to_recall(
    data: Ids, sharp: Path, tmp_path: Path, logged_trainer: Callable[..., Trainer]
) -> None:
    module = module_on(sharp, MemFT)
    trainer = logged_trainer(max_epochs=300, callbacks=all_callbacks())
    trainer.fit(module, datamodule=data)
    record = read_record(tmp_path / "run" / "record.json")
    assert record.steps_to_recall == record.optimizer_steps == trainer.global_step - module.skipped_steps
    assert record.optimizer_steps < 900
    assert record.recall_margin == 0.5
    assert (record.exact_match, record.token_accuracy, record.sub_threshold_fraction) == (1, 1, 0)
    assert (record.generated_exact_match, record.generated_token_accuracy) == (1, 1)
    assert record.min_target_probability > 0.5
    assert record.first_failure == record.target_tokens / record.pairs
    assert record.method == "memft"


def test_skipped_steps_are_not_counted_as_optimiser_steps(sharp: Path, tmp_path: Path) -> None:
    class AllKnown(Callback):
        """From the fourth epoch on, no token is below the threshold."""

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 3:
                pl_module.weighting._critical = 1e9

    module = module_on(sharp, MemFT, weighting=OnlyThreshold())
    trainer = make_trainer(tmp_path, max_epochs=5, callbacks=[AllKnown(), RunRecord()])
    trainer.fit(module, datamodule=Ids(uneven(4), batch_size=2))
    assert module.skipped_steps == 4
    assert read_record(tmp_path / "record.json").optimizer_steps == 6


def test_the_token_table_has_one_row_per_target_token(data: Ids, sharp: Path, tmp_path: Path) -> None:
    module = module_on(sharp)
    make_trainer(tmp_path, max_epochs=10, callbacks=[RunRecord()]).fit(module, datamodule=data)
    table = pq.read_table(tmp_path / "tokens.parquet").to_pydict()
    expected = [(i, t, token) for i, (_, target) in enumerate(uneven(5)) for t, token in enumerate(target)]
    assert list(zip(table["example_id"], table["position"], table["token_id"], strict=True)) == expected
    assert table["loss"] == pytest.approx(flat(token_losses(module.model, data)), rel=1e-4, abs=1e-5)
    assert table["correct"] == [ok for row in right_tokens(module, data) for ok in row]
    record = read_record(tmp_path / "record.json")
    assert sum(table["loss"]) / len(table["loss"]) == pytest.approx(record.final_loss, rel=1e-6)


class Mixed(Ids):
    """Marks the second token of each target and every third after it as random, and asks for two facts twice."""

    def make_corpus(self, *arguments: Any) -> Corpus:
        corpus = super().make_corpus(*arguments)
        examples = [dataclasses.replace(e, replaced=tuple(range(1, len(e.target_ids), 3))) for e in corpus.examples]
        return Corpus(corpus.name, examples, entropy_bits=200.0, fact_ids=[0, 1, 0, 2, 1])

    def figures(self, scores: TokenScores) -> dict[str, float]:
        return {"tokens": float(scores.mask.sum())}


def test_random_and_natural_tokens_are_recorded_separately(sharp: Path, tmp_path: Path) -> None:
    module, data = module_on(sharp), Mixed(uneven(5), batch_size=2)
    make_trainer(tmp_path, max_epochs=20, callbacks=[RunRecord()]).fit(module, datamodule=data)
    record = read_record(tmp_path / "record.json")
    frozen = token_losses(AutoModelForCausalLM.from_pretrained(sharp, dtype=torch.float32), data)
    final, right = token_losses(module.model, data), right_tokens(module, data)
    for kind, random in (("natural", False), ("random", True)):
        places = [(i, t) for i, row in enumerate(final) for t in range(len(row)) if (t % 3 == 1) is random]
        assert len(places) > 5
        figures = record.by_kind[kind]  # type: ignore[index]
        assert figures["target_tokens"] == len(places)
        assert figures["initial_loss"] == pytest.approx(sum(frozen[i][t] for i, t in places) / len(places), rel=1e-5)
        assert figures["final_loss"] == pytest.approx(sum(final[i][t] for i, t in places) / len(places), rel=1e-5)
        assert figures["token_accuracy"] == pytest.approx(sum(right[i][t] for i, t in places) / len(places))
    table = pq.read_table(tmp_path / "tokens.parquet").to_pydict()
    assert table["replaced"] == [position % 3 == 1 for position in table["position"]]
    assert record.corpus_figures == {"tokens": 28}


def test_a_fact_with_two_questions_counts_once_in_the_memorised_bits(sharp: Path, tmp_path: Path) -> None:
    module, data = module_on(sharp), Mixed(uneven(5), batch_size=2)
    make_trainer(tmp_path, max_epochs=20, callbacks=[RunRecord()]).fit(module, datamodule=data)
    first, second, third, fourth, fifth = map(sum, token_losses(module.model, data))
    missing = (first + third) / 2 + (second + fifth) / 2 + fourth
    record = read_record(tmp_path / "record.json")
    assert record.memorized_bits == pytest.approx(200 - missing / math.log(2), rel=1e-5)
    assert record.memorized_bits > 0


def test_the_saved_adapter_gives_the_recorded_loss_and_holds_no_backbone_weights(
    data: Ids, sharp: Path, tmp_path: Path
) -> None:
    make_trainer(tmp_path, max_epochs=10, callbacks=[RunRecord()]).fit(module_on(sharp), datamodule=data)
    loaded = module_on(sharp)
    loaded.load_adapter(tmp_path / "adapter")
    final = flat(token_losses(loaded.model, data))
    assert sum(final) / len(final) == pytest.approx(read_record(tmp_path / "record.json").final_loss, rel=1e-5)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 2 * 32 * 16 * 4 + 2000


def test_a_run_folder_holds_only_the_configuration_the_corpus_and_the_results(
    data: Ids, sharp: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    callbacks = [RunRecord(dirpath=str(out))]
    make_trainer(tmp_path, callbacks=callbacks).fit(module_on(sharp), datamodule=data)
    assert sorted(path.name for path in out.iterdir()) == [
        "adapter",
        "config.yaml",
        "corpus.parquet",
        "record.json",
        "tokens.parquet",
    ]


class NoTraining(Callback):
    def on_train_start(self, *_: Any) -> None:
        raise AssertionError("training has begun")


def test_an_existing_record_is_refused_before_training_and_left_unchanged(
    data: Ids, sharp: Path, tmp_path: Path
) -> None:
    make_trainer(tmp_path, callbacks=[RunRecord()]).fit(module_on(sharp), datamodule=data)
    before = (tmp_path / "record.json").read_bytes()
    second = make_trainer(tmp_path, callbacks=[RunRecord(), NoTraining()])
    with pytest.raises(InputError, match=r"record\.json is the record of an earlier run; choose another folder"):
        second.fit(module_on(sharp), datamodule=Ids(uneven(5)))
    assert (tmp_path / "record.json").read_bytes() == before


def test_a_failed_fit_leaves_no_record_of_the_one_that_it_overwrites(sharp: Path, tmp_path: Path) -> None:
    class Fails(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            raise RuntimeError("the machine is on fire")

    record = RunRecord(dirpath=str(tmp_path / "run"), overwrite=True)
    make_trainer(tmp_path, max_epochs=1, callbacks=[record]).fit(module_on(sharp), datamodule=Ids(uneven(3)))
    assert (tmp_path / "run" / "record.json").is_file()
    with pytest.raises(RuntimeError, match="on fire"):
        make_trainer(tmp_path, max_epochs=1, callbacks=[record, Fails()]).fit(
            module_on(sharp), datamodule=Ids(uneven(5))
        )
    assert not (tmp_path / "run" / "record.json").exists()


def test_an_existing_record_is_overwritten_on_request(data: Ids, sharp: Path, tmp_path: Path) -> None:
    make_trainer(tmp_path, callbacks=[RunRecord()]).fit(module_on(sharp), datamodule=data)
    again = make_trainer(tmp_path, max_epochs=2, callbacks=[RunRecord(overwrite=True)])
    again.fit(module_on(sharp, seed=2), datamodule=Ids(uneven(5), batch_size=2))
    record = read_record(tmp_path / "record.json")
    assert (record.seed, record.optimizer_steps) == (2, 6)


def test_overwriting_a_run_leaves_no_file_of_the_earlier_run(data: Ids, sharp: Path, tmp_path: Path) -> None:
    stale = [tmp_path / name for name in ("held_out.parquet", "history.parquet")]
    for path in stale:
        path.write_text("of an earlier run")
    (tmp_path / "config.yaml").write_text("model: of an earlier run by the command line")
    make_trainer(tmp_path, callbacks=[RunRecord(overwrite=True)]).fit(module_on(sharp), datamodule=data)
    assert not any(path.exists() for path in stale)
    assert (tmp_path / "config.yaml").read_text().startswith("# Of a run that was made from Python.")


class Stop(Callback):
    def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.current_epoch == 3:
            raise self.error

    def __init__(self, error: BaseException) -> None:
        self.error = error


def test_a_fast_dev_run_after_a_fit_leaves_the_files_of_the_fit_unchanged(
    data: Ids, sharp: Path, tmp_path: Path
) -> None:
    recorder = RunRecord()
    make_trainer(tmp_path, max_epochs=3, callbacks=[recorder]).fit(module_on(sharp), datamodule=data)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    make_trainer(tmp_path, fast_dev_run=True, callbacks=[recorder]).fit(module_on(sharp), datamodule=Ids(uneven(2)))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_a_module_that_is_fitted_again_restarts_its_counts(sharp: Path, tmp_path: Path) -> None:
    module = module_on(sharp, MemFT, weighting=OnlyThreshold())
    records = []
    for name, corpus in (("first", Ids(uneven(3))), ("second", Ids(uneven(5)))):
        recorder = RunRecord(dirpath=str(tmp_path / name))
        make_trainer(tmp_path, max_epochs=60, callbacks=[recorder]).fit(module, datamodule=corpus)
        records.append(read_record(tmp_path / name / "record.json"))
        tokens = sum(len(example.target_ids) for example in corpus.examples)
        assert records[-1].target_tokens_trained == 60 * tokens
        assert records[-1].optimizer_steps + records[-1].skipped_steps == 60
    assert records[0].skipped_steps > 0


def test_an_interrupted_fit_leaves_an_interrupted_record_and_the_adapter_it_describes(
    data: Ids, sharp: Path, tmp_path: Path
) -> None:
    module = module_on(sharp)
    recall = VerbatimRecall(generate_every=1)
    trainer = make_trainer(
        tmp_path, max_epochs=50, limit_val_batches=1.0, callbacks=[recall, Stop(KeyboardInterrupt()), RunRecord()]
    )
    with pytest.raises(SystemExit):
        trainer.fit(module, datamodule=data)
    record = read_record(tmp_path / "record.json")
    assert (record.status, record.optimizer_steps) == ("interrupted", 12)
    assert record.target_tokens_trained == 4 * record.target_tokens
    loaded = module_on(sharp)
    loaded.load_adapter(tmp_path / "adapter")
    final = flat(token_losses(loaded.model, data))
    assert sum(final) / len(final) == pytest.approx(record.final_loss, rel=1e-5)
    assert record.final_loss < record.initial_loss


def test_a_fit_that_fails_leaves_no_record(data: Ids, sharp: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_epochs=50, callbacks=[Stop(RuntimeError("broken")), RunRecord()])
    with pytest.raises(RuntimeError, match="broken"):
        trainer.fit(module_on(sharp), datamodule=data)
    assert not (tmp_path / "record.json").exists()


def saved_weights(module: Memorization, backbone: Path, folder: Path) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The module's trained weights, and those of the adapter saved in a run's folder."""
    loaded = module_on(backbone)
    loaded.load_adapter(folder / "adapter")
    trained, saved = (list(adapter_parameters(m.model).values()) for m in (module, loaded))
    assert any(weight.abs().sum() > 0 for weight in trained)
    return trained, saved


class FailsAtItsEnd(Callback):
    """Runs out of memory in a measurement after the last step, before the record is written."""

    def on_train_end(self, *_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("fails", [FailsAtItsEnd(), Stop(RuntimeError("broken"))])
def test_a_fit_that_fails_after_a_step_leaves_its_adapter_beside_no_record_of_another(
    fails: Callback, data: Ids, sharp: Path, tmp_path: Path
) -> None:
    make_trainer(tmp_path, max_epochs=1, callbacks=[RunRecord()]).fit(module_on(sharp, seed=2), datamodule=data)
    module, record = module_on(sharp), RunRecord(overwrite=True)
    with pytest.raises(RuntimeError, match=r"out of memory|broken"):
        make_trainer(tmp_path, max_epochs=5, callbacks=[fails, record]).fit(module, datamodule=data)
    torch.testing.assert_close(*saved_weights(module, sharp, tmp_path), rtol=0, atol=0)
    assert not (tmp_path / "record.json").exists()


def test_a_fit_that_fails_before_its_first_step_leaves_no_adapter(data: Ids, sharp: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="training has begun"):
        make_trainer(tmp_path, callbacks=[RunRecord(), NoTraining()]).fit(module_on(sharp), datamodule=data)
    assert not (tmp_path / "adapter").exists()


def test_an_error_after_the_record_is_written_leaves_the_results_as_they_are(
    data: Ids, sharp: Path, tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError, match="out of memory"):
        make_trainer(tmp_path, callbacks=[RunRecord(), FailsAtItsEnd()]).fit(module_on(sharp), datamodule=data)
    assert read_record(tmp_path / "record.json").status == "finished"
    assert "teacher forcing" in (tmp_path / "adapter" / "README.md").read_text()


class Measures(Callback):
    def __init__(self, **fields: Any) -> None:
        self.fields = fields

    def record_fields(self, trainer: Any, pl_module: Any, ended: bool) -> dict[str, Any]:
        return self.fields


def test_record_fields_that_a_record_cannot_take_are_left_out_with_a_warning_that_names_the_callback(
    sharp: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = Measures(coverage=1, final_loss=9.0, steps_to_recall="soon", corpus_figures={"words": "many"})
    right = Measures(steps_to_recall=3, corpus_figures={"letters": 5.0})
    callbacks = [right, wrong, RunRecord()]
    make_trainer(tmp_path, callbacks=callbacks).fit(module_on(sharp), datamodule=Mixed(uneven(5)))
    record = read_record(tmp_path / "record.json")
    assert (record.steps_to_recall, record.corpus_figures) == (3, {"tokens": 28, "letters": 5})
    assert record.final_loss != 9
    said = [m.removeprefix("Measures: its record field ") for m in caplog.messages if m.startswith("Measures")]
    assert said == [
        "'coverage' is left out of the record: there is no such field; give numbers of your own as a mapping, under "
        "the name corpus_figures",
        "'final_loss' is left out of the record: RunRecord sets it itself",
        "'steps_to_recall' is left out of the record: Input should be a valid integer, unable to parse string as an "
        "integer",
        "'corpus_figures' is left out of the record: words: Input should be a valid number, unable to parse string as "
        "a number",
    ]


def test_greedy_decoding_in_an_earlier_validation_is_not_recorded_as_the_final_result(
    data: Ids, sharp: Path, tmp_path: Path
) -> None:
    recall = VerbatimRecall(generate_every=3, generate_at_end=False)
    trainer = make_trainer(tmp_path, max_epochs=4, limit_val_batches=1.0, callbacks=[recall, RunRecord()])
    trainer.fit(module_on(sharp), datamodule=data)
    assert recall.generated_at_step == 9
    assert read_record(tmp_path / "record.json").generated_exact_match is None


def test_a_corpus_of_unknown_entropy_has_no_memorised_bits(sharp: Path, tmp_path: Path) -> None:
    class Unknown(Ids):
        def make_corpus(self, *arguments: Any) -> Any:
            corpus = super().make_corpus(*arguments)
            return type(corpus)(corpus.name, corpus.examples)

    make_trainer(tmp_path, callbacks=[RunRecord()]).fit(module_on(sharp), datamodule=Unknown(uneven(3)))
    record = read_record(tmp_path / "record.json")
    assert record.corpus_entropy_bits is record.memorized_bits is record.bits_per_parameter is None


def test_a_placement_on_listed_modules_is_recorded_with_its_parameter_count(
    data: Ids, sharp: Path, tmp_path: Path
) -> None:
    adapter = AdapterConfig(rank=3, block=[1, 2], placement=["down_proj"], init="peft")
    make_trainer(tmp_path, callbacks=[RunRecord()]).fit(module_on(sharp, adapter=adapter), datamodule=data)
    record = read_record(tmp_path / "record.json")
    assert (record.block, record.placement, record.init) == ([1, 2], ["down_proj"], "peft")
    # In two blocks, at rank 3, down_proj maps 64 features to 32.
    assert record.effective_parameters == 2 * 3 * (64 + 32)


def test_the_event_file_has_all_curves_and_one_set_of_hyperparameters(
    data: Ids, sharp: Path, tmp_path: Path, logged_trainer: Callable[..., Trainer]
) -> None:
    logged_trainer(max_epochs=4, callbacks=all_callbacks()).fit(module_on(sharp), datamodule=data)
    record = read_record(tmp_path / "run" / "record.json")
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    tags = events.Tags()["scalars"]
    # Twelve steps and four validations, the frozen model before them and the final results after them.
    curves = {"train/loss": 14, "val/loss": 6, "val/token_accuracy": 6, "val/generated_exact_match": 2}
    assert {tag: len(events.Scalars(tag)) for tag in curves} == curves
    for tag in tags:
        assert events.Scalars(tag)[0].step == 0, tag
        assert len(events.Scalars(tag)) > 1, tag
        assert events.Scalars(tag)[-1].step == 12, tag
    assert not [tag for tag in tags if tag.startswith("end/")]
    assert events.Scalars("val/loss")[0].value == pytest.approx(record.initial_loss, rel=1e-6)
    ends = {"val/loss": record.final_loss, "val/exact_match": record.exact_match}
    ends |= {"val/token_accuracy": record.token_accuracy, "run/wall_seconds": record.wall_seconds}
    ends |= {"val/sub_threshold_fraction": record.sub_threshold_fraction, "val/first_failure": record.first_failure}
    for tag, value in ends.items():
        assert events.Scalars(tag)[-1].value == pytest.approx(value, rel=1e-6), tag

    plugin = [
        value.metadata.plugin_data.content
        for path in (tmp_path / "run").glob("events*")
        for event in EventFileLoader(str(path)).Load()
        for value in event.summary.value
        if value.tag == "_hparams_/session_start_info"
    ]
    assert len(plugin) == 1
    for name in ("rank", "target_tokens", "method", "learning_rate"):
        assert name.encode() in plugin[0]


def test_the_path_of_the_record_is_logged(
    data: Ids, sharp: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="callbacks"):
        make_trainer(tmp_path, callbacks=[RunRecord()]).fit(module_on(sharp), datamodule=data)
    assert f"record: {tmp_path / 'record.json'}" in caplog.messages


def test_the_record_is_json_with_the_fields_of_the_schema(data: Ids, sharp: Path, tmp_path: Path) -> None:
    make_trainer(tmp_path, callbacks=[RunRecord()]).fit(module_on(sharp), datamodule=data)
    content = json.loads((tmp_path / "record.json").read_text())
    assert content.keys() == Record.model_fields.keys()


def test_a_module_of_another_class_is_refused(sharp: Path, tmp_path: Path) -> None:
    class Other(LightningModule):
        tokenizer = max_positions = None
        vocab_size = 1000

        def training_step(self, *_: Any) -> None: ...

        def validation_step(self, *_: Any) -> None: ...

        def configure_optimizers(self) -> None: ...

    with pytest.raises(InputError, match="RunRecord records SFT and MemFT; the model is a Other"):
        make_trainer(tmp_path, callbacks=[RunRecord()]).fit(Other(), datamodule=Ids(uneven(2)))


def test_a_threshold_outside_zero_and_one_is_refused() -> None:
    with pytest.raises(InputError, match=r"threshold is 1\.5; expected a probability strictly between 0 and 1"):
        RunRecord(threshold=1.5)


def test_zero_extraction_samples_are_refused() -> None:
    with pytest.raises(InputError, match="extraction_samples is 0; expected at least 1 sample"):
        RunRecord(extraction_samples=0)


def test_each_module_class_names_its_method() -> None:
    assert (SFT.method, MemFT.method) == ("sft", "memft")


@pytest.mark.parametrize(("generated", "said"), [(3 / 5, 0), (2 / 5, 1)])
def test_a_disagreement_of_greedy_decoding_and_teacher_forcing_is_logged(
    generated: float, said: int, data: Ids, sharp: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Pretending(VerbatimRecall):
        def shares(self) -> dict[str, float]:
            return {**super().shares(), "generated_exact_match": generated}

    callbacks = [Pretending(), RunRecord()]
    with caplog.at_level("INFO", logger="callbacks"):
        make_trainer(tmp_path, max_epochs=20, callbacks=callbacks).fit(module_on(sharp, seed=9), datamodule=data)
    # Three of five targets: a share that float32 would round.
    assert read_record(tmp_path / "record.json").exact_match == 3 / 5
    assert sum(message.startswith("greedy decoding recalls 0.4000") for message in caplog.messages) == said
