"""The held-out part of a corpus is measured beside the memorised part and never trained on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from callbacks import Generalization, RunRecord, StopWhenRecalled, VerbatimRecall
from data_modules import LinearRule
from pml.adapter import adapter_parameters
from pml.corpus import Example
from pml.errors import InputError
from pml.modules import SFT
from pml.recall import greedy_recall
from pml.records import read_record
from tests.fits import module_on
from tests.tiny_runs import Ids, make_trainer, uneven


@pytest.fixture
def data() -> LinearRule:
    return LinearRule(size=4, held_out_share=0.25, batch_size=6, chat_template=False)


def whole_model(model: torch.nn.Module, examples: list[Example]) -> tuple[float, float, float]:
    """Mean loss, token accuracy and exact match from one full forward pass per example."""
    losses, right = [], []
    for example in examples:
        start, end, target = len(example.prompt_ids), len(example), torch.tensor(example.target_ids)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([example.prompt_ids + example.target_ids])).logits[0]
        logits = logits[start - 1 : end - 1]
        losses.append(-logits.log_softmax(-1)[torch.arange(len(target)), target])
        right.append(logits.argmax(-1) == target)
    exact = sum(bool(row.all()) for row in right) / len(right)
    return torch.cat(losses).mean().item(), torch.cat(right).double().mean().item(), exact


def test_a_memorised_rule_does_not_generalise_and_the_record_says_so(
    data: LinearRule, sharp: Path, tmp_path: Path
) -> None:
    module = module_on(sharp)
    # `RunRecord` gets the figures although it comes before `Generalization` in the list.
    callbacks = [VerbatimRecall(), StopWhenRecalled(), RunRecord(), Generalization()]
    make_trainer(tmp_path, max_epochs=400, callbacks=callbacks).fit(module, datamodule=data)
    record = read_record(tmp_path / "record.json")
    assert (record.exact_match, record.generated_exact_match, record.pairs) == (1, 1, 12)
    figures = record.corpus_figures
    assert data.held_out is not None
    loss, accuracy, exact = whole_model(module.model, list(data.held_out.examples))
    assert figures["held_out_pairs"] == 4
    assert figures["held_out_loss"] == pytest.approx(loss, rel=1e-5)
    assert figures["held_out_token_accuracy"] == pytest.approx(accuracy)
    assert figures["held_out_exact_match"] == exact < 1
    generated = greedy_recall(module, data.held_out.examples)
    assert figures["held_out_generated_exact_match"] == sum(g.exact for g in generated) / 4
    frozen = AutoModelForCausalLM.from_pretrained(sharp, dtype=torch.float32)
    before, _, _ = whole_model(frozen, list(data.held_out.examples))
    assert figures["held_out_initial_loss"] == pytest.approx(before, rel=1e-5)
    assert record.memorized_bits is record.corpus_entropy_bits is None


def test_held_out_measures_are_logged_at_the_start_each_validation_and_the_end(
    data: LinearRule, sharp: Path, tmp_path: Path, logged_trainer: Callable[..., Trainer]
) -> None:
    module, callback = module_on(sharp), Generalization()
    trainer = logged_trainer(max_epochs=3, callbacks=[callback])
    trainer.fit(module, datamodule=data)
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    first, *validated, last = (event.value for event in events.Scalars("val/held_out_loss"))
    assert len(validated) == 3
    assert len({first, *validated}) == 4
    figures = callback.record_fields(trainer, module, ended=True)["corpus_figures"]
    assert first == pytest.approx(figures["held_out_initial_loss"], rel=1e-6)
    # The last validation ran on the final weights.
    assert validated[-1] == last == pytest.approx(figures["held_out_loss"], rel=1e-6)
    ends = {tag for tag in events.Tags()["scalars"] if tag.startswith("val/held_out")}
    assert all(
        [e.step for e in (events.Scalars(tag)[0], events.Scalars(tag)[-1])] == [0, trainer.global_step] for tag in ends
    )
    assert sorted(tag.removeprefix("val/") for tag in ends) == [
        "held_out_exact_match",
        "held_out_generated_exact_match",
        "held_out_loss",
        "held_out_token_accuracy",
    ]


@pytest.mark.parametrize("generate", [True, False])
def test_the_test_loop_measures_the_held_out_part(
    generate: bool, data: LinearRule, sharp: Path, logged_trainer: Callable[..., Trainer]
) -> None:
    module = module_on(sharp)
    callback = Generalization(generate_at_end=generate)
    (values,) = logged_trainer(callbacks=[callback]).test(module, datamodule=data, verbose=False)
    assert data.held_out is not None
    loss, accuracy, _ = whole_model(module.model, list(data.held_out.examples))
    assert values["test/held_out_loss"] == pytest.approx(loss, rel=1e-5)
    assert values["test/held_out_token_accuracy"] == pytest.approx(accuracy)
    assert ("test/held_out_generated_exact_match" in values) is generate


def test_measuring_held_out_pairs_changes_neither_training_nor_the_frozen_layer_cache(
    data: LinearRule, sharp: Path, tmp_path: Path
) -> None:
    weights = []
    for callbacks in ([], [Generalization()]):
        module: SFT = module_on(sharp)  # type: ignore[assignment]
        options: dict[str, Any] = {"max_epochs": 3, "limit_val_batches": 1.0, "callbacks": callbacks}
        make_trainer(tmp_path, **options).fit(module, datamodule=data)
        weights.append(adapter_parameters(module.model))
        assert len(module.frozen_layers.store) == len(data.corpus) == 12
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name])


def test_a_corpus_without_a_held_out_part_has_no_held_out_figures(sharp: Path, tmp_path: Path) -> None:
    callbacks = [Generalization(), RunRecord()]
    make_trainer(tmp_path, limit_val_batches=1.0, callbacks=callbacks).fit(module_on(sharp), datamodule=Ids(uneven(3)))
    assert read_record(tmp_path / "record.json").corpus_figures == {}


def test_a_second_fit_without_a_held_out_part_logs_no_held_out_values_of_the_first(
    data: LinearRule, sharp: Path, tmp_path: Path, logged_trainer: Callable[..., Trainer]
) -> None:
    generalization = Generalization()
    make_trainer(tmp_path, max_epochs=1, callbacks=[generalization]).fit(module_on(sharp), datamodule=data)
    trainer = logged_trainer(max_epochs=1, callbacks=[generalization])
    trainer.fit(module_on(sharp), datamodule=Ids(uneven(2)))
    assert trainer.log_dir is not None
    assert not [tag for tag in EventAccumulator(trainer.log_dir).Reload().Tags()["scalars"] if "held_out" in tag]


def test_held_out_recall_is_reported_once(
    data: LinearRule, sharp: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="callbacks"):
        make_trainer(tmp_path, callbacks=[Generalization(), RunRecord()]).fit(module_on(sharp), datamodule=data)
    assert [message for message in caplog.messages if message.startswith("held out")] == [
        "held out: 0.0000 of 4 targets right"
    ]


def test_a_batch_size_of_zero_is_refused() -> None:
    with pytest.raises(InputError, match="batch_size is 0; expected at least 1 held-out pair"):
        Generalization(batch_size=0)
