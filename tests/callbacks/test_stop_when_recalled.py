"""A fit ends when its current weights are certified on the whole corpus, and not before."""

import logging
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from callbacks import StopWhenRecalled
from pml.adapter import AdapterConfig, adapter_parameters
from pml.certificate import Rounding, greedy_answers
from pml.corpus import Example
from pml.curriculum import PrefixRatio
from pml.errors import InputError
from pml.modules import SFT, MemFT, Memorization
from pml.recall import certified, greedy_recall, score_corpus
from pml.token_scores import TokenScores
from tests.fits import ADAPTER, module_on
from tests.tiny_runs import Ids, make_trainer, uneven


def fit(
    module: Memorization, data: Ids, tmp_path: Path, *callbacks: Callback, epochs: int = 300, **options: Any
) -> Any:
    trainer = make_trainer(tmp_path, max_epochs=epochs, callbacks=list(callbacks), gradient_clip_val=1.0, **options)
    trainer.fit(module, datamodule=data)
    return trainer


@pytest.mark.parametrize("method", [SFT, MemFT])
def test_the_fit_stops_when_the_corpus_is_certified(method: type[Memorization], sharp: Path, tmp_path: Path) -> None:
    stop, data, module = StopWhenRecalled(), Ids(uneven(5), batch_size=2), module_on(sharp, method)
    trainer = fit(module, data, tmp_path, stop)
    assert trainer.current_epoch < 299
    assert stop.steps_to_recall == trainer.global_step - module.skipped_steps
    assert certified(score_corpus(module, data.val_dataloader()))
    assert all(g.exact for g in greedy_recall(module, data.examples))


def test_the_current_weights_are_certified_and_not_those_that_scored_the_batches(sharp: Path, tmp_path: Path) -> None:
    class Spoiling(Callback):
        """Halves the adapter after each of the first two steps that look certified."""

        spoilt = 0

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
            if certified(outputs["scores"]) and self.spoilt < 2:
                self.spoilt += 1
                with torch.no_grad():
                    for parameter in pl_module.parameters():
                        if parameter.requires_grad:
                            parameter.mul_(0.5)

    stop, spoiling, data, module = StopWhenRecalled(), Spoiling(), Ids(uneven(3)), module_on(sharp)
    fit(module, data, tmp_path, spoiling, stop)
    assert spoiling.spoilt == 2
    assert stop.steps_to_recall is not None
    assert certified(score_corpus(module, data.val_dataloader()))


def test_a_fit_with_dropout_stops_once_the_corpus_is_certified_without_dropout(sharp: Path, tmp_path: Path) -> None:
    adapter = AdapterConfig(rank=ADAPTER.rank, block=ADAPTER.block, dropout=0.05)
    stop, data, module = StopWhenRecalled(), Ids(uneven(3)), module_on(sharp, adapter=adapter)
    fit(module, data, tmp_path, stop)
    assert stop.steps_to_recall is not None
    assert certified(score_corpus(module, data.val_dataloader()))


def test_target_tokens_that_cannot_become_certain_are_named_in_a_warning(
    sharp: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, module = Ids(uneven(3)), module_on(sharp)
    module.configure_model()
    target = data.examples[0].target_ids[0]
    other = next(token for token in range(module.vocab_size) if all(token not in e.target_ids for e in data.examples))
    with caplog.at_level(logging.WARNING):
        fit(module, data, tmp_path / "before", StopWhenRecalled(), epochs=1)
        assert "cannot all become certain" not in caplog.text
        head = module.backbone.model.get_output_embeddings()
        with torch.no_grad():
            head.weight[other] = head.weight[target]
        fit(module, data, tmp_path / "after", StopWhenRecalled(), epochs=1)
    names = module.tokenizer.convert_ids_to_tokens([target, other])
    assert f"so their probability is at most 0.5 ({names[0]!r} and {names[1]!r})" in caplog.text


def test_a_higher_margin_takes_more_steps_and_every_probability_exceeds_it(sharp: Path, tmp_path: Path) -> None:
    steps = []
    for margin in (0.0, 0.5, 0.8):
        stop, data, module = StopWhenRecalled(margin), Ids(uneven(4)), module_on(sharp)
        fit(module, data, tmp_path, stop)
        scores = score_corpus(module, data.val_dataloader())
        assert torch.exp(-scores.losses[scores.mask]).min() > margin
        steps.append(stop.steps_to_recall)
    assert steps == sorted(set(steps))


def test_a_fit_does_not_stop_before_its_curriculum_has_shown_the_whole_corpus(sharp: Path, tmp_path: Path) -> None:
    class Known(Callback):
        """Counts the epochs that showed only a part of the corpus, all of it certain."""

        epochs = 0
        shown = 0
        sure = True

        def on_train_epoch_start(self, *_: Any) -> None:
            self.shown, self.sure = 0, True

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
            self.shown += len(outputs["scores"].example_id)
            self.sure &= certified(outputs["scores"])

        def on_train_epoch_end(self, *_: Any) -> None:
            self.epochs += self.sure and self.shown < 6

    curriculum = PrefixRatio(ratios=[0.34, 1.0], boundaries=[80, 400])
    stop, known, data = StopWhenRecalled(), Known(), Ids(uneven(6), batch_size=2)
    trainer = fit(module_on(sharp, MemFT, curriculum=curriculum), data, tmp_path, stop, known, epochs=400)
    assert known.epochs > 0
    assert trainer.current_epoch >= 80
    assert stop.steps_to_recall is not None


def test_an_epoch_that_drops_its_last_batch_never_certifies_the_corpus(
    sharp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Such an epoch must not even trigger exact scoring.
    monkeypatch.setattr("callbacks.stop_when_recalled.exact_scores", lambda *_: pytest.fail("scored"))
    stop = StopWhenRecalled()
    data = Ids(uneven(3), batch_size=2, drop_last=True, shuffle=False)
    trainer = fit(module_on(sharp), data, tmp_path, stop, epochs=120)
    assert trainer.current_epoch == 120
    assert stop.steps_to_recall is None


def test_a_fit_too_short_to_recall_has_no_steps_to_recall(sharp: Path, tmp_path: Path) -> None:
    stop = StopWhenRecalled()
    fit(module_on(sharp), Ids(uneven(5)), tmp_path, stop, epochs=3)
    assert stop.steps_to_recall is None


def test_stopping_is_logged_once_with_target_tokens_margin_and_steps(
    sharp: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stop, data = StopWhenRecalled(0.6), Ids(uneven(2))
    with caplog.at_level(logging.INFO, logger="callbacks"):
        fit(module_on(sharp), data, tmp_path, stop)
    said = [r.getMessage() for r in caplog.records if r.name.startswith("callbacks")]
    assert said == [
        f"recalled: all {data.corpus.target_tokens} target tokens above p = 0.6 after {stop.steps_to_recall} steps"
    ]


def test_in_bfloat16_logit_margins_exceed_the_rounding_measured_by_greedy_decoding(
    sharp: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stop, data, module = StopWhenRecalled(), Ids(uneven(4)), module_on(sharp, dtype="bfloat16")
    with caplog.at_level(logging.INFO, logger="callbacks"):
        trainer = fit(module, data, tmp_path, stop)
    scores = score_corpus(module, data.val_dataloader())
    assert stop.rounding is not None and scores.margin is not None
    assert 0 < stop.rounding.logits < scores.margin[scores.mask].min()
    assert stop.rounding.tokens == data.corpus.target_tokens
    assert stop.record_fields(trainer, module, ended=True) == {
        "steps_to_recall": stop.steps_to_recall,
        "recall_margin": 0.5,
        "rounding_logits": stop.rounding.logits,
    }
    assert f"by more than rounding to bfloat16 ({stop.rounding.logits:.2g} in logits at most, seen on" in caplog.text
    assert greedy_answers(module.eval().model, data.examples) == [e.target_ids for e in data.examples]


def test_a_fit_goes_on_until_margins_exceed_rounding_which_is_measured_only_when_needed(
    sharp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[float] = []

    def rounding(module: Memorization, examples: Sequence[Example], scores: TokenScores) -> Rounding:
        assert scores.margin is not None
        measured.append(float(scores.margin[scores.mask].min()))
        return Rounding(3.0, 7)

    monkeypatch.setattr("callbacks.stop_when_recalled.rounding_of_corpus", rounding)
    stop, data, module = StopWhenRecalled(), Ids(uneven(4)), module_on(sharp, dtype="bfloat16")
    fit(module, data, tmp_path, stop)
    assert stop.steps_to_recall is not None
    first, last = measured
    assert first < 3.0 < last


def test_a_fit_prolonged_by_min_epochs_keeps_the_steps_of_its_first_certificate(sharp: Path, tmp_path: Path) -> None:
    first, again, data = StopWhenRecalled(), StopWhenRecalled(), Ids(uneven(3))
    epochs = fit(module_on(sharp), data, tmp_path / "first", first).current_epoch
    trainer = fit(module_on(sharp), data, tmp_path / "again", again, min_epochs=epochs + 4)
    assert trainer.current_epoch >= epochs + 3
    assert again.steps_to_recall == first.steps_to_recall is not None


class Forget(Callback):
    """Erases the adapter at the beginning of each of some epochs."""

    def __init__(self, epochs: range) -> None:
        self.epochs = epochs

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.current_epoch in self.epochs:
            for name, parameter in adapter_parameters(pl_module.model).items():
                if "lora_B" in name:
                    torch.nn.init.zeros_(parameter)


def test_a_fit_goes_on_if_it_loses_its_recall_before_min_epochs(sharp: Path, tmp_path: Path) -> None:
    stop, data = StopWhenRecalled(), Ids(uneven(3))
    recalled = fit(module_on(sharp), data, tmp_path / "first", StopWhenRecalled()).current_epoch
    forget = Forget(range(recalled + 2, recalled + 6))
    trainer = fit(module_on(sharp), data, tmp_path / "again", forget, stop, min_epochs=recalled + 4)
    # It does not end at min_epochs, where nothing is recalled, but once everything is again.
    assert trainer.current_epoch > recalled + 6
    assert stop.steps_to_recall == trainer.global_step
    assert certified(score_corpus(trainer.model, data.val_dataloader()))


def test_a_logit_margin_survives_rounding_only_if_it_is_larger() -> None:
    scores = TokenScores(*torch.ones(3, 1, 2), torch.tensor([0]), margin=torch.tensor([[3.0, 9.0]]))
    scores = scores._replace(mask=scores.mask.bool())
    stop, module = StopWhenRecalled(), SimpleNamespace(dtype_name="bfloat16")
    for rounding, survives in ((2.9, True), (3.0, False), (3.1, False)):
        stop.rounding = Rounding(rounding, 2)
        # Rounding is measured again only if the margins exceed its last measurement.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("callbacks.stop_when_recalled.rounding_of_corpus", lambda *_: Rounding(2.9, 2))
            assert stop._survives_rounding(module, [], scores) is survives  # type: ignore[arg-type]


def test_only_the_first_rank_restores_the_token_counts_of_an_interrupted_epoch(
    sharp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = fit(module_on(sharp), Ids(uneven(3)), tmp_path, StopWhenRecalled(), epochs=1)
    (stop,) = trainer.callbacks[:1]
    for first, watched in ((True, [2, 7]), (False, [0, 0])):
        monkeypatch.setattr("callbacks.stop_when_recalled.is_first_rank", lambda first=first: first)
        checkpoint = {"pml_stop_when_recalled": {"steps_to_recall": None, "unsure_and_seen": (2, 7)}}
        stop.on_load_checkpoint(trainer, trainer.model, checkpoint)
        stop.on_train_start(trainer, trainer.model)
        assert stop._watched().tolist() == watched


def test_a_second_fit_discards_the_steps_to_recall_of_the_first(sharp: Path, tmp_path: Path) -> None:
    stop = StopWhenRecalled()
    first = fit(module_on(sharp), Ids(uneven(3)), tmp_path / "first", stop)
    assert stop.steps_to_recall == first.global_step
    second = fit(module_on(sharp), Ids(uneven(8, seed=6)), tmp_path / "second", stop)
    assert stop.steps_to_recall == second.global_step != first.global_step
    fit(module_on(sharp), Ids(uneven(8, seed=6)), tmp_path / "third", stop, epochs=1)
    assert stop.steps_to_recall is None


@pytest.mark.parametrize("margins", [(0.5, 0.9), (0.9, 0.5)])
def test_of_several_stopping_callbacks_the_one_listed_last_decides(
    margins: tuple[float, float], sharp: Path, tmp_path: Path
) -> None:
    stops = [StopWhenRecalled(margin) for margin in margins]
    module, data = module_on(sharp), Ids(uneven(5), batch_size=2)
    trainer = fit(module, data, tmp_path, *stops)
    assert stops[0].steps_to_recall is None
    assert stops[1].steps_to_recall == trainer.global_step
    scores = score_corpus(module, data.val_dataloader())
    assert certified(scores, margins[1])
    if margins[1] == 0.5:
        assert not certified(scores, 0.9)


def test_steps_to_recall_are_restored_from_a_checkpoint(sharp: Path, tmp_path: Path) -> None:
    first, second = StopWhenRecalled(), StopWhenRecalled()
    trainer = fit(module_on(sharp), Ids(uneven(3)), tmp_path, first)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    second.on_load_checkpoint(trainer, trainer.model, torch.load(tmp_path / "end.ckpt", weights_only=True))
    assert second.steps_to_recall == first.steps_to_recall is not None


@pytest.mark.parametrize("margin", [-0.1, 1.0])
def test_a_margin_that_is_negative_or_at_least_one_is_refused(margin: float) -> None:
    with pytest.raises(InputError, match=rf"margin is {margin}; expected a probability in \[0, 1\)"):
        StopWhenRecalled(margin)


def test_a_fit_that_leaves_out_examples_is_warned_that_it_never_stops(
    tiny_backbone_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(tmp_path, max_epochs=2, limit_train_batches=1, callbacks=[StopWhenRecalled()])
    trainer.fit(module_on(tiny_backbone_folder), datamodule=Ids(uneven(3), batch_size=1))
    assert caplog.text.count("StopWhenRecalled never stops this fit: an epoch trains on ") == 1


def test_a_fit_that_ends_within_its_first_epoch_is_not_said_to_leave_out_examples(
    tiny_backbone_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(tmp_path, max_epochs=-1, max_steps=2, callbacks=[StopWhenRecalled()])
    trainer.fit(module_on(tiny_backbone_folder), datamodule=Ids(uneven(3), batch_size=1))
    assert "never stops" not in caplog.text


def test_the_rounding_measured_so_far_is_in_the_checkpoint(tiny_backbone_folder: Path, tmp_path: Path) -> None:
    stop = StopWhenRecalled()
    trainer = make_trainer(tmp_path, max_epochs=1, callbacks=[stop])
    module = module_on(tiny_backbone_folder)
    trainer.fit(module, datamodule=Ids(uneven(3)))
    stop.rounding = Rounding(0.25, 7)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    resumed = StopWhenRecalled()
    resumed.on_load_checkpoint(trainer, module, checkpoint)
    assert resumed.rounding == Rounding(0.25, 7)
