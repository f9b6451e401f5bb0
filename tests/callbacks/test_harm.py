import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.nn.functional import cross_entropy

from callbacks import Harm, RunRecord
from pml.adapter import adapter_parameters
from pml.errors import InputError
from pml.modules import SFT
from pml.ordinary_text import shipped_passages, text_examples
from pml.recall import score_examples
from pml.records import read_record
from tests.conftest import CHAT_TEMPLATE
from tests.ddp_cases import kicked
from tests.fits import module_on
from tests.tiny_runs import Ids, make_trainer, uneven


def by_hand(module: SFT, kind: str) -> float:
    """Return the mean token loss over all passages of a kind, each in a plain forward pass of the whole model."""
    passages = [p for p in shipped_passages("harm") if p.kind == kind]
    losses = []
    for example in text_examples(passages, module.tokenizer, module.max_positions):
        ids = torch.tensor([example.prompt_ids + example.target_ids])
        with torch.no_grad():
            logits = module.model(input_ids=ids).logits[0, len(example.prompt_ids) - 1 : -1]
        losses.append(cross_entropy(logits, torch.tensor(example.target_ids), reduction="none"))
    return float(torch.cat(losses).mean())


def test_harm_records_the_loss_on_prose_code_and_chats_before_and_after_the_fit(
    tiny_backbone_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = module_on(tiny_backbone_folder, SFT, learning_rate=0.1)
    module.configure_model()
    kinds = ("prose", "code", "chat")
    before = {kind: by_hand(module, kind) for kind in kinds}
    logger = CSVLogger(tmp_path, name="run", version="")
    with caplog.at_level(logging.INFO, "callbacks.harm"):
        make_trainer(tmp_path, max_epochs=20, callbacks=[Harm(), RunRecord()], logger=logger).fit(
            module, datamodule=Ids(uneven(5), batch_size=5)
        )
    after = {kind: by_hand(module, kind) for kind in kinds}
    harm = read_record(tmp_path / "run" / "record.json").harm
    assert harm.keys() == {*kinds, "mean"}
    for kind in kinds:
        assert harm[kind]["target_tokens"] == 4 * 128
        assert harm[kind]["loss_before"] == pytest.approx(before[kind], rel=1e-4)
        assert harm[kind]["loss_after"] == pytest.approx(after[kind], rel=1e-4)
        assert after[kind] != pytest.approx(before[kind], rel=1e-3)
    lost = [after[kind] - before[kind] for kind in kinds]
    assert harm["mean"]["loss_after"] - harm["mean"]["loss_before"] == pytest.approx(sum(lost) / 3, rel=1e-3)  # type: ignore[operator]
    (line,) = [message for message in caplog.messages if message.startswith("harm")]
    assert line.startswith(f"harm: {sum(lost) / 3:+.3f} nats a token on other text (prose {lost[0]:+.3f}, code")
    curves = (tmp_path / "run" / "metrics.csv").read_text()
    assert all(f"harm/{name}" in curves.splitlines()[0] for name in harm)


def test_measuring_harm_changes_no_weights_and_runs_the_frozen_layers_once_per_passage(
    tiny_backbone_folder: Path, tmp_path: Path
) -> None:
    harm: Any = Harm(passages=1)
    module = module_on(tiny_backbone_folder, SFT)
    trainer = make_trainer(tmp_path, callbacks=[harm])
    trainer.fit(module, datamodule=Ids(uneven(3), batch_size=3))
    filled = module.frozen_layers.filled
    assert filled == 3 + 3
    weights = {name: p.clone() for name, p in adapter_parameters(module.model).items()}
    harm._measured_at = None  # so that the record measures again
    assert harm.record_fields(trainer, module, True)["harm"].keys() == {"prose", "code", "chat", "mean"}
    assert module.frozen_layers.filled == filled
    assert all(torch.equal(weights[name], p) for name, p in adapter_parameters(module.model).items())


def test_loss_before_is_that_of_the_frozen_model_and_loss_after_is_measured_in_each_fit(
    tiny_backbone_folder: Path, tmp_path: Path
) -> None:
    harm, found = Harm(passages=1), []
    for rate in (1e-9, 0.05):
        module = kicked(module_on(tiny_backbone_folder, SFT, learning_rate=rate))
        trainer = make_trainer(tmp_path, callbacks=[harm], max_epochs=2)
        trainer.fit(module, datamodule=Ids(uneven(3), batch_size=3))
        found.append(harm.record_fields(trainer, module, ended=True)["harm"])
    (first, second), plain = found, module_on(tiny_backbone_folder, SFT)
    plain.configure_model()
    one = [next(p for p in shipped_passages("harm") if p.kind == kind) for kind in ("prose", "code", "chat")]
    with plain.frozen():
        scores = score_examples(plain, text_examples(one, plain.tokenizer, plain.max_positions))
    assert first["mean"]["loss_before"] == pytest.approx(scores.losses[scores.mask].mean().item(), rel=1e-4)
    assert first["mean"]["loss_after"] != pytest.approx(first["mean"]["loss_before"], rel=1e-3)
    assert second["mean"]["loss_before"] == pytest.approx(first["mean"]["loss_before"], rel=1e-6)
    assert second["mean"]["loss_after"] != pytest.approx(first["mean"]["loss_after"], rel=1e-4)


def test_the_mean_weights_all_kinds_of_text_equally_whatever_their_length(
    tiny_backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = [replace(p, text=p.text[:9]) if p.kind == "code" else p for p in shipped_passages("harm")]
    monkeypatch.setattr("callbacks.harm.shipped_passages", lambda _: long)
    harm, module = Harm(passages=1), module_on(tiny_backbone_folder, SFT)
    trainer = make_trainer(tmp_path, callbacks=[harm])
    trainer.fit(module, datamodule=Ids(uneven(3), batch_size=3))
    found = harm.record_fields(trainer, module, ended=True)["harm"]
    kinds = [found[kind] for kind in ("prose", "code", "chat")]
    # The first of nine bytes is the prompt.
    assert [kind["target_tokens"] for kind in kinds] == [128, 8, 128]
    assert found["mean"]["target_tokens"] == 264
    for name in ("loss_before", "loss_after"):
        assert found["mean"][name] == pytest.approx(sum(kind[name] for kind in kinds) / 3)
        assert found["mean"][name] != pytest.approx(sum(k[name] * k["target_tokens"] for k in kinds) / 264, rel=1e-3)


NEEDS_MODE = "{% if mode is not defined %}{{ raise_exception('no mode') }}{% endif %}{{ mode }} "
DATED = "{{ strftime_now('%Y') }} " + CHAT_TEMPLATE


@pytest.mark.parametrize(
    ("template", "data", "prompt"),
    [
        ("{{ raise_exception('no') }}", {"chat_template": False}, "{query}"),
        (NEEDS_MODE + CHAT_TEMPLATE, {}, "{query}"),
        (NEEDS_MODE + CHAT_TEMPLATE, {"template_kwargs": {"mode": "calm"}}, "calm {in_template}"),
        (DATED, {"template_date": "1999-01-02", "system": "Be exact."}, "1999 {in_template}"),
    ],
)
def test_chats_are_in_the_template_of_the_corpus_or_without_one_that_cannot_be_used(
    template: str,
    data: dict[str, Any],
    prompt: str,
    tiny_backbone_folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    harm, module = Harm(passages=1), module_on(tiny_backbone_folder, SFT)
    module.tokenizer.chat_template = template
    make_trainer(tmp_path, callbacks=[harm]).fit(module, datamodule=Ids(uneven(3), **data))
    query = next(p.query for p in shipped_passages("harm") if p.kind == "chat")
    (ids,) = [e.prompt_ids for e in harm._examples if e.source == "chat"]
    in_template = f"<|im_start|>user\n{query}<|im_end|>\n<|im_start|>assistant\n"
    assert module.tokenizer.decode(ids) == prompt.format(query=query, in_template=in_template)
    assert not [record for record in caplog.records if record.name.startswith("pml") and record.levelname == "WARNING"]


def test_a_resumed_fit_does_not_log_the_loss_of_the_frozen_model_again(
    tiny_backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[int] = []
    monkeypatch.setattr(
        "callbacks._before_and_after.log_everywhere", lambda trainer, _: logged.append(trainer.global_step)
    )
    harm, module = Harm(passages=1), module_on(tiny_backbone_folder, SFT)
    trainer = make_trainer(tmp_path, callbacks=[harm], max_epochs=2)
    trainer.fit(module, datamodule=Ids(uneven(3), batch_size=3))
    assert logged == [0, 2]
    harm.on_train_start(trainer, module)
    assert logged == [0, 2]


@pytest.mark.parametrize("passages", [0, 5])
def test_an_out_of_range_number_of_passages_is_refused(passages: int) -> None:
    with pytest.raises(InputError, match=f"passages is {passages}; expected 1 to 4 of each kind"):
        Harm(passages=passages)


def test_the_harm_texts_share_no_eight_words_in_a_row_with_guard_or_kl_penalty_texts() -> None:
    def words(name: str) -> list[set[str]]:
        split = [passage.text.split() for passage in shipped_passages(name)]
        return [{" ".join(text[i : i + 8]) for i in range(len(text) - 7)} for text in split]

    for name in ("guard", "penalty"):
        seen = set().union(*words(name))
        assert len(seen) > 1000
        assert not any(passage & seen for passage in words("harm"))
