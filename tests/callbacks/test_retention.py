"""Retention: losses on text outside the corpus match whole forward passes, and measuring leaves a fit unchanged."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from callbacks import Retention, RunRecord
from callbacks.retention import _python_reference
from data_modules import LinearRule, PhoneBook, RandomTokens
from pml.adapter import adapter_parameters
from pml.corpus import Example
from pml.errors import InputError
from pml.modules import MemFT
from pml.records import read_record
from tests.fits import module_on
from tests.tiny_runs import Ids, make_trainer, uneven

BOOK: dict[str, Any] = {"pairs": 6, "batch_size": 3, "chat_template": False}


def mean_loss(model: torch.nn.Module, examples: list[Example]) -> float:
    """Mean loss over all target tokens, from whole forward passes of one example at a time."""
    losses = []
    for example in examples:
        start, end, target = len(example.prompt_ids), len(example), torch.tensor(example.target_ids)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([example.prompt_ids + example.target_ids])).logits[0]
        losses.append(-logits[start - 1 : end - 1].log_softmax(-1)[torch.arange(len(target)), target])
    return torch.cat(losses).mean().item()


def test_the_loss_before_is_of_the_frozen_model_and_the_loss_after_of_the_adapted_model(
    sharp: Path, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    module, data = module_on(sharp), PhoneBook(**BOOK)
    # Retention comes after the record in the list, and the record has its losses all the same.
    callbacks: list[Callback] = [RunRecord(), Retention(examples=4, batch_size=3)]
    make_trainer(tmp_path, max_epochs=20, callbacks=callbacks).fit(module, datamodule=data)
    retention = read_record(tmp_path / "record.json").retention

    frozen = AutoModelForCausalLM.from_pretrained(sharp, dtype=torch.float32)
    others = PhoneBook(**{**BOOK, "seed": 43}).build(tiny_tokenizer, 259)
    texts = {
        "python_reference": list(_python_reference(tiny_tokenizer, 4, 1024).examples),
        "non_members": list(others.examples)[:4],
    }
    assert retention.keys() == texts.keys()
    for name, examples in texts.items():
        assert retention[name]["target_tokens"] == sum(len(e.target_ids) for e in examples)
        assert retention[name]["loss_before"] == pytest.approx(mean_loss(frozen, examples), rel=1e-5)
        assert retention[name]["loss_after"] == pytest.approx(mean_loss(module.model, examples), rel=1e-5)
        assert retention[name]["loss_after"] != pytest.approx(retention[name]["loss_before"], rel=1e-3)


def test_no_non_member_has_a_prompt_of_the_corpus(sharp: Path, tmp_path: Path) -> None:
    data, callback = LinearRule(size=5, held_out_share=0.4, chat_template=False), Retention(examples=100)
    make_trainer(tmp_path, callbacks=[callback]).fit(module_on(sharp), datamodule=data)
    asked = {example.prompt_ids for example in data.corpus.examples}
    others = callback._texts["non_members"]
    # Another seed splits the same grid differently: what remains are points that it trains on and this seed holds out.
    assert 0 < len(others) < len(asked)
    assert asked.isdisjoint(example.prompt_ids for example in others)


def test_a_corpus_with_the_same_prompts_for_every_seed_has_no_non_members(
    sharp: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = Retention()
    with caplog.at_level("INFO", logger="callbacks"):
        trainer = make_trainer(tmp_path, callbacks=[callback, RunRecord()])
        trainer.fit(module_on(sharp), datamodule=RandomTokens(length=4))
    assert list(read_record(tmp_path / "record.json").retention) == ["python_reference"]
    said = "retention: another seed of random_tokens asks for nothing new, so it has no non-members"
    assert said in caplog.messages


def test_general_text_can_be_any_corpus_and_non_members_can_be_turned_off(sharp: Path, tmp_path: Path) -> None:
    callback = Retention(text=RandomTokens(length=9, count=5), non_members=False, examples=3)
    make_trainer(tmp_path, callbacks=[callback, RunRecord()]).fit(module_on(sharp), datamodule=PhoneBook(**BOOK))
    retention = read_record(tmp_path / "record.json").retention
    assert {name: losses["target_tokens"] for name, losses in retention.items()} == {"random_tokens": 27}


def test_general_text_with_all_its_prompts_in_the_corpus_is_refused(sharp: Path, tmp_path: Path) -> None:
    callback = Retention(text=PhoneBook(**BOOK))
    with pytest.raises(InputError, match="retention text 'phonebook' asks only what the corpus 'phonebook' asks too"):
        make_trainer(tmp_path, callbacks=[callback]).fit(module_on(sharp), datamodule=PhoneBook(**BOOK))


def test_examples_whose_prompts_are_in_the_corpus_are_not_measured(sharp: Path, tmp_path: Path) -> None:
    callback = Retention(text=PhoneBook(**{**BOOK, "pairs": 8}), non_members=False)
    data = PhoneBook(**BOOK)
    make_trainer(tmp_path, callbacks=[callback]).fit(module_on(sharp), datamodule=data)
    # The larger book starts with the six people of the smaller one.
    assert [example.example_id for example in callback._texts["phonebook"]] == [6, 7]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_measuring_leaves_the_trained_weights_and_the_frozen_layer_cache_unchanged(
    dropout: float, sharp: Path, tmp_path: Path
) -> None:
    weights = []
    for callbacks in ([], [Retention(examples=3, every_n_steps=1)]):
        module = module_on(sharp, MemFT)
        module.adapter = type(module.adapter)(rank=4, block=2, dropout=dropout)
        torch.manual_seed(0)
        make_trainer(tmp_path, max_epochs=4, callbacks=callbacks).fit(module, datamodule=PhoneBook(**BOOK))
        weights.append(adapter_parameters(module.model))
        assert len(module.frozen_layers.store) == 6
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name])


@pytest.mark.parametrize(("every", "accumulate", "logged"), [(0, 1, [8]), (3, 1, [3, 6, 8]), (2, 2, [2, 4])])
def test_losses_are_logged_after_every_nth_optimiser_step_and_at_the_end(
    every: int, accumulate: int, logged: list[int], sharp: Path, tmp_path: Path, logged_trainer: Callable[..., Trainer]
) -> None:
    trainer = logged_trainer(
        max_epochs=4, accumulate_grad_batches=accumulate, callbacks=[Retention(examples=2, every_n_steps=every)]
    )
    # Six pairs in batches of three: two micro-batches an epoch.
    trainer.fit(module_on(sharp), datamodule=PhoneBook(**BOOK))
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    for name in ("python_reference", "non_members"):
        scalars = events.Scalars(f"retention/{name}")
        assert [event.step for event in scalars] == [0, *logged]
        # The losses differ, since every step changes the model.
        assert len({event.value for event in scalars}) == 1 + len(logged)


def test_time_spent_in_on_fit_start_is_not_part_of_wall_seconds(sharp: Path, tmp_path: Path) -> None:
    class Slow(Callback):
        def on_fit_start(self, *_: Any) -> None:
            time.sleep(1.5)

    make_trainer(tmp_path, callbacks=[RunRecord(), Slow()]).fit(module_on(sharp), datamodule=Ids(uneven(2)))
    assert read_record(tmp_path / "record.json").wall_seconds < 1.5


def test_language_reference_passages_have_128_tokens_or_fill_a_shorter_context(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    corpus = _python_reference(tiny_tokenizer, 5, None)
    assert [len(e.target_ids) for e in corpus.examples] == [128] * 5
    first = corpus.examples[0]
    text = tiny_tokenizer.decode(list(first.prompt_ids + first.target_ids))
    assert str(text).startswith('The "assert" statement\n**********************\n\nAssert statements are a convenient')
    short = _python_reference(tiny_tokenizer, 5, 20)
    assert [len(e) for e in short.examples] == [20] * 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"examples": 0}, "examples is 0; expected at least 1 example"),
        ({"batch_size": 0}, "batch_size is 0; expected at least 1 example"),
        ({"every_n_steps": -1}, "every_n_steps is -1; expected a number of steps, or 0 for never"),
        ({"text": LightningDataModule()}, "text is a LightningDataModule; expected a corpus, such as"),
    ],
)
def test_invalid_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Retention(**settings)
