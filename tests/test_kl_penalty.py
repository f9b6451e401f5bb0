"""The KL penalty: its value and gradient, the passages it draws, and what it does in a fit."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pml.adapter import adapter_parameters
from pml.backbone import load_backbone
from pml.corpus import Example, collate
from pml.errors import InputError
from pml.kl_penalty import KlPenalty, KlPenaltyConfig, _pieces, kl_divergence, micro_batch_index
from pml.modules import Memorization
from pml.ordinary_text import passages_of_files, text_examples
from pml.state_store import CacheConfig
from pml.weighting import weighted_mean
from tests.ddp_cases import Gradients, Released, kicked
from tests.fits import module_on, save_sharpened
from tests.tiny_runs import Ids, make_trainer, uneven
from tests.tokenizer_kinds import make_tokenizer

PASSAGES = KlPenaltyConfig(weight=3.0, passages=2, tokens=5)


@pytest.fixture(scope="module")
def sharp(tiny_backbone_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sharpened(tiny_backbone_folder, tmp_path_factory.mktemp("sharp"))


def whole_logits(module: Memorization, example: Example) -> Tensor:
    """Float64 logits at the positions that predict target tokens."""
    ids = torch.tensor([example.prompt_ids + example.target_ids])
    return module.model(input_ids=ids).logits[0, len(example.prompt_ids) - 1 : -1].double()


def divergence_by_hand(module: Memorization, examples: list[Example]) -> Tensor:
    """Mean over target tokens of the sum over the vocabulary of p (ln p - ln q)."""
    tokens = []
    for example in examples:
        with torch.no_grad(), module.model.disable_adapter():
            p = whole_logits(module, example).softmax(-1)
        q = whole_logits(module, example).softmax(-1)
        tokens.append((p * (p.log() - q.log())).sum(-1))
    return torch.cat(tokens).mean()


def test_the_divergence_is_the_mean_over_tokens_whatever_the_offset_of_the_logits() -> None:
    frozen, adapted = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log() + 7, torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
    expected = 0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)
    assert kl_divergence(frozen, adapted).item() == pytest.approx(expected / 2, rel=1e-5)


def test_the_gradient_of_the_divergence_matches_autograd() -> None:
    generator = torch.Generator().manual_seed(2)
    frozen, adapted = (8 * torch.randn(5, 40, generator=generator) for _ in range(2))
    adapted.requires_grad_()
    (3 * kl_divergence(frozen, adapted)).backward()
    exact = adapted.detach().double().requires_grad_()
    log_p, log_q = frozen.double().log_softmax(-1), exact.log_softmax(-1)
    (3 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()).backward()
    assert adapted.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(adapted.grad, exact.grad.float(), rtol=1e-5, atol=1e-7)


def test_the_divergence_of_bfloat16_logits_is_computed_in_float32() -> None:
    frozen, adapted = torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    taken = kl_divergence(frozen, adapted)
    assert taken.dtype == torch.float32
    assert torch.equal(taken, kl_divergence(frozen.float(), adapted.float()))


def test_passages_are_drawn_in_turn_and_repeat_in_the_order_that_the_seed_determines(sharp: Path) -> None:
    penalty = KlPenalty(PASSAGES, load_backbone(str(sharp)), seed=3)
    turns = len(penalty.passages) // 2
    first_round = [e.example_id for turn in range(turns) for e in penalty.chosen(turn)]
    assert len(set(first_round)) == len(first_round) == 2 * turns
    assert penalty.chosen(turns + 1) == penalty.chosen(1)
    assert KlPenalty(PASSAGES, load_backbone(str(sharp)), seed=3).chosen(1) == penalty.chosen(1)
    assert KlPenalty(PASSAGES, load_backbone(str(sharp)), seed=4).chosen(1) != penalty.chosen(1)


def test_longer_text_is_cut_into_pieces_each_prompted_by_the_token_before_it(sharp: Path, tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("abcdefghijklm")
    penalty = KlPenalty(replace(PASSAGES, text=str(tmp_path / "own.txt")), load_backbone(str(sharp)), seed=3)
    # The tokenizer has one token per byte; the first token is the prompt.
    decode = load_backbone(str(sharp)).tokenizer.decode
    pieces = {(decode(e.prompt_ids), decode(e.target_ids)) for e in penalty.passages}
    assert pieces == {("a", "bcdef"), ("f", "ghijk"), ("k", "lm")}
    assert sorted(e.example_id for e in penalty.passages) == [0, 1, 2]


@pytest.mark.parametrize("kind", ["appending", "plain"])
def test_ordinary_text_begins_with_what_the_tokenizer_puts_before_a_text(kind: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(kind)
    (tmp_path / "own.txt").write_text("call Anna at the office 4711")
    (example,) = text_examples(passages_of_files([tmp_path / "own.txt"]), tokenizer)
    ids, first = tokenizer("call Anna at the office 4711")["input_ids"], tokenizer.convert_tokens_to_ids("<s>")
    if kind == "appending":
        assert (example.prompt_ids, example.target_ids) == ((first,), tuple(ids[1:-1]))
        pieces = list(_pieces(example, 3, (first,)))
        assert [piece.prompt_ids for piece in pieces[1:]] == [(first, p.target_ids[-1]) for p in pieces[:-1]]
    else:
        assert (example.prompt_ids, example.target_ids) == ((ids[0],), tuple(ids[1:]))


def test_every_micro_batch_draws_all_pieces_if_there_are_fewer_than_requested(sharp: Path, tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("abcdefghijklm")
    config = replace(PASSAGES, passages=5, text=str(tmp_path / "own.txt"))
    penalty = KlPenalty(config, load_backbone(str(sharp)), seed=3)
    assert len(penalty.passages) == 3
    assert penalty.chosen(0) == penalty.chosen(1) == penalty.passages


def test_the_micro_batch_index_counts_the_micro_batches_of_all_steps_and_processes() -> None:
    # The second of four processes, in the second micro-batch of the fourth step, the third step of its epoch.
    trainer: Any = SimpleNamespace(accumulate_grad_batches=2, global_step=3, world_size=4, global_rank=1)
    assert micro_batch_index(trainer, 5) == (3 * 2 + 1) * 4 + 1


def test_a_bias_of_the_head_is_part_of_the_logits_of_both_models(sharp: Path) -> None:
    module = module_on(sharp)
    bias = torch.randn(module.vocab_size, generator=torch.Generator().manual_seed(4))
    module.backbone.model.get_output_embeddings().bias = torch.nn.Parameter(bias, requires_grad=False)
    kicked(module)
    penalty = KlPenalty(PASSAGES, module.backbone, seed=1)
    assert module.frozen_layers.head is not None
    ours = penalty.loss(module.frozen_layers, module.model, 1)
    torch.testing.assert_close(ours.double(), divergence_by_hand(module, penalty.chosen(1)), rtol=1e-4, atol=1e-6)


def test_the_divergence_is_that_of_whole_models_if_the_head_is_not_linear(
    sharp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = kicked(module_on(sharp))
    penalty = KlPenalty(PASSAGES, module.backbone, seed=1)
    monkeypatch.setattr(module.frozen_layers, "head", None)
    ours = penalty.loss(module.frozen_layers, module.model, 1)
    assert ours > 0.01
    torch.testing.assert_close(ours.double(), divergence_by_hand(module, penalty.chosen(1)), rtol=1e-4, atol=1e-6)


def test_the_hidden_states_of_the_frozen_model_are_computed_once(sharp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = module_on(sharp)
    module.configure_model()
    penalty = KlPenalty(PASSAGES, module.backbone, seed=1)
    kicked(module)
    first = penalty.loss(module.frozen_layers, module.model, 0)
    calls: list[int] = []
    above = module.frozen_layers.above
    monkeypatch.setattr(module.frozen_layers, "above", lambda *kept: calls.append(1) or above(*kept))
    assert torch.equal(penalty.loss(module.frozen_layers, module.model, 0), first)
    assert len(calls) == 1


def test_the_divergence_is_zero_for_a_fresh_adapter_and_that_of_whole_models_for_another(sharp: Path) -> None:
    module = module_on(sharp)
    module.configure_model()
    penalty = KlPenalty(PASSAGES, module.backbone, seed=1)
    assert penalty.loss(module.frozen_layers, module.model, 0).item() == 0
    kicked(module)
    ours = penalty.loss(module.frozen_layers, module.model, 1)
    torch.testing.assert_close(ours.double(), divergence_by_hand(module, penalty.chosen(1)), rtol=1e-4, atol=1e-6)


def test_a_step_uses_the_gradient_of_the_loss_plus_the_weighted_divergence(sharp: Path, tmp_path: Path) -> None:
    """Two accumulated micro-batches, of three and two examples, count in proportion to their target tokens."""
    examples = [Example(i, tuple(prompt), tuple(target)) for i, (prompt, target) in enumerate(uneven(5))]
    module, watch = kicked(module_on(sharp, kl_penalty=PASSAGES, learning_rate=1e-9)), Gradients()
    trainer = make_trainer(tmp_path, callbacks=[watch], accumulate_grad_batches=2)
    trainer.fit(module, datamodule=Ids(uneven(5), batch_size=3, shuffle=False))

    reference = kicked(module_on(sharp))
    scores = reference.score(collate(examples))
    tokens = [len(e.target_ids) for e in examples]
    shares = [sum(tokens[:3]) / sum(tokens), sum(tokens[3:]) / sum(tokens)]
    penalty = KlPenalty(PASSAGES, reference.backbone, seed=1)
    divergence = sum(s * divergence_by_hand(reference, penalty.chosen(turn)) for turn, s in enumerate(shares))
    (weighted_mean(scores.losses, scores.mask.float()) + 3.0 * divergence).backward()
    for name, parameter in adapter_parameters(reference.model).items():
        # The tolerance is relative to the largest gradient, since the reference divergence is float64.
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(watch.steps[0][name], parameter.grad, rtol=1e-4, atol=1e-5 * scale)


def test_the_penalty_halves_the_divergence_on_unseen_text_at_a_similar_loss(sharp: Path, tmp_path: Path) -> None:
    def fitted(penalty: KlPenaltyConfig | None) -> tuple[float, float]:
        module = module_on(sharp, kl_penalty=penalty)
        make_trainer(tmp_path, max_epochs=80).fit(module, datamodule=Ids(uneven(4), batch_size=4))
        unseen = [replace(e, target_ids=e.target_ids[5:15]) for e in KlPenalty(WHOLE, module.backbone, 1).passages[:8]]
        losses = module.eval().score(collate([Example(i, *map(tuple, e)) for i, e in enumerate(uneven(4))])).losses
        return divergence_by_hand(module, unseen).item(), losses.mean().item()

    plain, plain_loss = fitted(None)
    kept, kept_loss = fitted(replace(PASSAGES, weight=1.0))
    assert kept < 0.5 * plain
    assert plain_loss < 0.2
    assert kept_loss < 0.2


WHOLE = KlPenaltyConfig(tokens=64)


def test_states_of_all_passages_are_cached_before_the_lower_blocks_are_freed(sharp: Path, tmp_path: Path) -> None:
    # A short text, since every piece that the penalty may draw passes through the lower blocks.
    (tmp_path / "own.txt").write_text("a bridge over a river")
    penalty, watch = replace(PASSAGES, text=str(tmp_path / "own.txt")), Released()
    module = module_on(sharp, kl_penalty=penalty, frozen_prefix=CacheConfig(release=True))
    make_trainer(tmp_path, max_epochs=3, callbacks=[watch]).fit(module, datamodule=Ids(uneven(4), batch_size=2))
    assert (watch.loads, watch.released) == (0, [True] * 3)


def test_the_settings_of_a_module_include_its_penalty(sharp: Path) -> None:
    assert module_on(sharp, kl_penalty=PASSAGES).settings()["kl_penalty"] == {
        "weight": 3.0,
        "passages": 2,
        "tokens": 5,
        "text": None,
    }
    assert "kl_penalty" not in module_on(sharp).settings()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"weight": 0.0}, "kl_penalty.weight is 0.0; expected a number above 0"),
        ({"weight": math.inf}, "kl_penalty.weight is inf"),
        ({"passages": 0}, "kl_penalty.passages is 0; expected at least 1"),
        ({"tokens": 0}, "kl_penalty.tokens is 0; expected at least 1"),
    ],
)
def test_penalty_settings_out_of_range_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        KlPenaltyConfig(**settings)


def test_a_resumed_fit_draws_its_passages_by_the_seed_of_the_fit(sharp: Path, tmp_path: Path) -> None:
    def fit(epochs: int, drawn_seed: int, checkpoint: Path | None) -> tuple[Memorization, dict[str, Tensor]]:
        torch.manual_seed(drawn_seed)  # a module without a seed takes this one
        module = module_on(sharp, seed=None, kl_penalty=PASSAGES)
        trainer = make_trainer(tmp_path, max_epochs=epochs)
        trainer.fit(module, datamodule=Ids(uneven(3)), ckpt_path=checkpoint, weights_only=True)
        if checkpoint is None and epochs == 2:
            trainer.save_checkpoint(tmp_path / "last.ckpt")
        return module, {name: p.detach().clone() for name, p in adapter_parameters(module.model).items()}

    _, whole = fit(4, 5, None)
    fit(2, 5, None)
    module, resumed = fit(4, 6, tmp_path / "last.ckpt")
    assert module.seed == 5
    for name, parameter in whole.items():
        assert torch.equal(resumed[name], parameter)
