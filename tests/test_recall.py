"""Recall: the certificate, greedy decoding against a loop without a cache, and the theorem that connects them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from callbacks import StopWhenRecalled
from pml import metrics
from pml.adapter import AdapterConfig
from pml.backbone import Backbone
from pml.certificate import Rounding
from pml.cli import main
from pml.corpus import Example, collate
from pml.decoding import generate_greedily
from pml.errors import InputError
from pml.frozen_layers import move_backbone
from pml.modules import Memorization
from pml.recall import (
    Generated,
    certified,
    gather_scores,
    greedy_recall,
    rounding_of_corpus,
    score_corpus,
    score_examples,
)
from pml.records import read_record
from pml.run_folder import run_folder
from pml.runs import open_run
from pml.state_store import CacheConfig
from pml.token_scores import TokenScores
from tests.ddp_cases import kicked
from tests.fits import module_on, save_sharpened
from tests.tiny_runs import Ids, make_trainer, uneven


@pytest.fixture(scope="module")
def sharp(tiny_backbone_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sharpened(tiny_backbone_folder, tmp_path_factory.mktemp("sharp"))


def trained(folder: Path, data: Ids, tmp_path: Path, epochs: int, stop: float | None = None) -> Memorization:
    module = module_on(folder)
    watch = [StopWhenRecalled(stop)] if stop is not None else []
    make_trainer(tmp_path, max_epochs=epochs, callbacks=watch, gradient_clip_val=1.0).fit(module, datamodule=data)
    return module.eval()


def without_cache(module: Memorization, prompt: tuple[int, ...], tokens: int) -> list[int]:
    """Greedy decoding by definition: run all tokens so far, append the argmax, repeat."""
    ids = list(prompt)
    for _ in range(tokens):
        with torch.no_grad():
            ids.append(int(module(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def table(losses: list[list[float]], correct: list[list[int]]) -> TokenScores:
    mask = torch.tensor([[loss >= 0 for loss in row] for row in losses])
    return TokenScores(torch.tensor(losses).clamp(min=0), torch.tensor(correct).bool(), mask, torch.arange(len(losses)))


@pytest.mark.parametrize(
    ("losses", "correct", "margin", "certain"),
    [
        ([[0.1, 0.2]], [[1, 1]], 0.5, True),
        ([[0.1, 0.8]], [[1, 1]], 0.5, False),  # p = 0.45: the argmax is right, but p alone does not show it
        ([[0.1, 0.8]], [[1, 1]], 0.4, True),
        ([[0.1, 0.2]], [[1, 0]], 0.5, False),  # rounding may make the argmax wrong even at p > 0.5
        ([[0.1, 0.2]], [[1, 1]], 0.85, False),
        ([[0.1, 0.2], [0.1, -1.0]], [[1, 1], [1, 0]], 0.5, True),  # padding (-1) is ignored
        ([[0.1, 0.2], [0.9, -1.0]], [[1, 1], [0, 0]], 0.5, False),
        ([[0.6931472, 0.1]], [[1, 1]], 0.5, False),  # exactly p = 0.5 may be a tie
    ],
)
def test_certified_needs_a_right_argmax_and_a_probability_above_the_margin_at_every_token(
    losses: list[list[float]], correct: list[list[int]], margin: float, certain: bool
) -> None:
    assert certified(table(losses, correct), margin) is certain


def test_gathered_scores_have_one_row_per_example_in_order_and_no_padding_examples() -> None:
    first = TokenScores(
        torch.tensor([[0.1, 0.2], [0.3, 0.0]]),
        torch.tensor([[True, False], [True, False]]),
        torch.tensor([[True, True], [True, False]]),
        torch.tensor([2, 0]),
    )
    second = TokenScores(
        torch.tensor([[0.4, 0.5, 0.6], [0.0, 0.0, 0.0], [0.1, 0.2, 0.0]]),
        torch.tensor([[True, True, False], [False, False, False], [True, False, False]]),
        torch.tensor([[True, True, True], [False, False, False], [True, True, False]]),
        torch.tensor([1, -1, 2]),
    )
    whole = gather_scores([first, second])
    assert whole.example_id.tolist() == [0, 1, 2]
    torch.testing.assert_close(whole.losses, torch.tensor([[0.3, 0, 0], [0.4, 0.5, 0.6], [0.1, 0.2, 0]]))
    assert whole.mask.sum(1).tolist() == [1, 3, 2]
    assert whole.correct.tolist() == [[True, False, False], [True, True, False], [True, False, False]]


def test_the_scores_of_a_corpus_are_those_of_the_whole_model_on_one_example_at_a_time(
    tiny_backbone_folder: Path, tmp_path: Path
) -> None:
    data = Ids(uneven(5), batch_size=2)
    module = trained(tiny_backbone_folder, data, tmp_path, epochs=3)
    module.train()
    scores = score_corpus(module, data.val_dataloader())
    assert module.training
    for example, losses, correct in zip(data.examples, scores.losses, scores.correct, strict=True):
        start, end = len(example.prompt_ids), len(example)
        with torch.no_grad():
            logits = module(torch.tensor([example.prompt_ids + example.target_ids]))[0, start - 1 : end - 1]
        target = torch.tensor(example.target_ids)
        expected = -logits.log_softmax(-1)[torch.arange(len(target)), target]
        torch.testing.assert_close(losses[: len(target)], expected)
        assert correct[: len(target)].tolist() == (logits.argmax(-1) == target).tolist()
        assert not losses[len(target) :].any()


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
def test_decoding_with_a_cache_gives_the_same_tokens_as_recomputing_every_prefix(
    architecture: str, make_tiny_backbone: Callable[[str], Backbone]
) -> None:
    module = module_on(Path("unused"))
    module._backbone = make_tiny_backbone(architecture)
    module.configure_model()
    for name, parameter in module.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    prompts = [(5, 6, 7, 8), (200, 3, 9, 100), (1, 1, 1, 1)]
    with torch.no_grad():
        rows = generate_greedily(module.model, torch.tensor(prompts), 12).tolist()
    for prompt, row in zip(prompts, rows, strict=True):
        assert row == without_cache(module, prompt, 12)


def test_greedy_decoding_breaks_a_tie_with_the_lowest_token_id() -> None:
    class Tied(nn.Module):
        def forward(self, input_ids: torch.Tensor, **_: object) -> object:
            logits = torch.zeros(*input_ids.shape, 6)
            logits[..., [4, 2, 5]] = 1.0
            return type("Out", (), {"past_key_values": None, "logits": logits})

    assert generate_greedily(Tied(), torch.tensor([[0]]), 3).tolist() == [[2, 2, 2]]


def test_greedy_decoding_reproduces_every_target_if_every_token_has_p_above_one_half(
    sharp: Path, tmp_path: Path
) -> None:
    data = Ids(uneven(6), batch_size=8)
    module = trained(sharp, data, tmp_path, epochs=300, stop=0.5)
    scores = score_corpus(module, data.val_dataloader())
    assert metrics.min_target_probability(scores) > 0.5
    assert certified(scores)
    generated = greedy_recall(module, data.examples)
    assert [g.token_ids for g in generated] == [e.target_ids for e in data.examples]
    assert all(g.exact for g in generated)
    for example in data.examples:
        assert without_cache(module, example.prompt_ids, len(example.target_ids)) == list(example.target_ids)


@pytest.mark.parametrize("epochs", [20, 25, 35, 45])
def test_the_first_failure_under_teacher_forcing_is_the_first_failure_of_greedy_decoding(
    epochs: int, sharp: Path, tmp_path: Path
) -> None:
    data = Ids(uneven(8), batch_size=8)
    module = trained(sharp, data, tmp_path, epochs)
    first = metrics.first_failure(score_corpus(module, data.val_dataloader())).tolist()
    exact = metrics.exact_match(score_corpus(module, data.val_dataloader())).tolist()
    # Half-learnt, so that both sides of the equivalence are tested.
    assert not all(exact)
    assert any(n > 0 for n in first)
    for example, position, right in zip(data.examples, first, exact, strict=True):
        answer = without_cache(module, example.prompt_ids, len(example.target_ids))
        pairs = enumerate(zip(answer, example.target_ids, strict=True))
        assert position == next((t for t, (a, b) in pairs if a != b), len(answer))
        assert right == (tuple(answer) == example.target_ids)
    assert [g.exact for g in greedy_recall(module, data.examples)] == exact


def test_targets_with_right_tokens_below_one_half_are_recalled_but_not_certified(sharp: Path, tmp_path: Path) -> None:
    data = Ids(uneven(4), batch_size=8)
    module = module_on(sharp)
    trainer = make_trainer(tmp_path, max_epochs=300, callbacks=[StopWhenRecalled(margin=0.0)])
    trainer.fit(module, datamodule=data)
    scores = score_corpus(module, data.val_dataloader())
    assert 0 < metrics.min_target_probability(scores) < 0.5
    assert all(g.exact for g in greedy_recall(module, data.examples))
    assert not certified(scores)
    assert certified(scores, margin=0.0)


def test_answers_come_in_the_order_asked_whatever_the_batch_size(tiny_backbone_folder: Path, tmp_path: Path) -> None:
    data = Ids(uneven(9), batch_size=4)
    module = trained(tiny_backbone_folder, data, tmp_path, epochs=10)
    asked = [data.examples[i] for i in (7, 2, 0, 8, 5, 1)]
    answers = greedy_recall(module, asked, batch_size=2)
    assert [g.example for g in answers] == asked
    for answer in answers:
        assert list(answer.token_ids) == without_cache(
            module, answer.example.prompt_ids, len(answer.example.target_ids)
        )
    assert greedy_recall(module, asked, batch_size=64) == answers


def test_right_tokens_are_counted_position_by_position() -> None:
    answer = Generated(Example(0, (1,), (5, 6, 7, 8)), (5, 7, 7, 8))
    assert answer.right_tokens == 3
    assert not answer.exact
    assert Generated(Example(0, (1,), (5, 6)), (5, 6)).exact


def test_greedy_decoding_leaves_dropout_in_training_mode(tiny_backbone_folder: Path, tmp_path: Path) -> None:
    data = Ids(uneven(3))
    module = trained(tiny_backbone_folder, data, tmp_path, epochs=1)
    module.train()
    greedy_recall(module, data.examples)
    modes = {m.training for name, m in module.model.named_modules() if "lora_dropout" in name}
    assert modes == {True}


def test_scores_answers_and_rounding_measured_in_training_mode_are_without_dropout(sharp: Path) -> None:
    examples = Ids(uneven(5)).examples
    module = kicked(module_on(sharp, adapter=AdapterConfig(rank=16, block=2, dropout=0.5)))
    module.eval()
    batches = [collate(examples[:3]), collate(examples[3:])]
    scores = gather_scores([module.score(batch) for batch in batches])
    answers = greedy_recall(module, examples)
    module.train()
    assert not torch.equal(module.score(batches[0]).losses, module.score(batches[0]).losses)
    torch.testing.assert_close(score_corpus(module, batches).losses, scores.losses)
    assert greedy_recall(module, examples) == answers
    assert rounding_of_corpus(module, examples, scores).logits < 1e-3


def test_the_rounding_of_a_corpus_is_the_largest_seen_by_any_process(
    sharp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, examples = module_on(sharp), Ids(uneven(3)).examples
    module.configure_model()
    scores = gather_scores([module.eval().score(collate(examples))])
    # On this process, margins move by almost nothing.
    monkeypatch.setattr("pml.recall.from_all_ranks", lambda own: [own, Rounding(0.75, 4), Rounding(0.5, 2)])
    tokens = sum(len(example.target_ids) for example in examples)
    assert rounding_of_corpus(module, examples, scores) == (0.75, tokens + 4 + 2)


def test_examples_whose_states_are_kept_pass_the_streamed_blocks_together(tiny_backbone_folder: Path) -> None:
    moves = []
    for count in (3, 6):
        module = module_on(tiny_backbone_folder, frozen_prefix=CacheConfig(release=True))
        module.configure_model()
        move_backbone(module, torch.device("cpu"))
        _ = module.frozen_layers  # testing the cut moves blocks too
        streamed = module.backbone.streamed
        assert streamed is not None
        before = streamed.moves
        score_examples(module, Ids(uneven(count)).examples, batch_size=2, keep=True)
        moves.append(streamed.moves - before)
    assert moves[0] == moves[1] > 0


def fit(folder: Path, *more: str) -> int:
    arguments = ["fit", "--model=SFT", f"--model.backbone={folder}", "--model.adapter.block=2"]
    arguments += ["--data=PhoneBook", "--data.pairs=5", "--trainer.max_epochs=12", "--trainer.accelerator=cpu"]
    return main([*arguments, "--trainer.enable_progress_bar=false", *more])


def test_an_opened_run_has_the_recorded_losses(
    tiny_backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert fit(tiny_backbone_folder, "--data.seed=3") == 0
    folder = tmp_path / "runs/fit/version_0"
    record = read_record(folder / "record.json")
    module, data = open_run(folder)
    corpus = data.corpus
    assert corpus.content_hash == record.corpus_hash
    assert not module.training
    scores = gather_scores([module.score(collate(corpus.examples[i : i + 2])) for i in (0, 2, 4)])
    # Batches differ from those of the run, and with them float32 rounding.
    assert metrics.mean_loss(scores).item() == pytest.approx(record.final_loss, rel=1e-5)
    assert metrics.min_target_probability(scores).item() == pytest.approx(record.min_target_probability, rel=1e-4)
    assert record.final_loss < record.initial_loss
    module.release()


def test_a_run_folder_is_found_from_its_parts_even_if_it_is_called_adapter(tmp_path: Path) -> None:
    run = tmp_path / "adapter"
    (run / "adapter").mkdir(parents=True)
    (run / "record.json").touch()
    for part in (run, run / "adapter", run / "record.json", run / "config.yaml"):
        assert run_folder(part) == run


def test_a_folder_without_the_configuration_of_a_run_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.yaml: no such file; expected the folder of a run"):
        open_run(tmp_path)
    (tmp_path / "config.yaml").write_text("model: {class_path: SFT}\n")
    with pytest.raises(InputError, match="not the configuration of a run: it has no 'data'"):
        open_run(tmp_path)
    (tmp_path / "config.yaml").write_text(
        json.dumps({"model": {"class_path": "SFT", "init_args": {"learning_rate": 0}}, "data": "RandomTokens"})
    )
    with pytest.raises(InputError, match=r"not the configuration of a run: learning_rate is 0.*; expected a number"):
        open_run(tmp_path)
