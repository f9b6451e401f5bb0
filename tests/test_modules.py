"""Training: the loss of the global batch, which weights change, and checkpoints that hold only the adapter."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from tiny_runs import Ids, make_trainer, uneven
from torch import Tensor

from pml.adapter import AdapterConfig, adapter_parameters
from pml.corpus import collate
from pml.curriculum import PrefixRatio
from pml.errors import InputError
from pml.modules import SFT, MemFT, Memorization
from pml.state_store import CacheConfig
from pml.weighting import FallingThreshold, OnlyThreshold, SlidingWindow, Weighting, WholeTargets
from tests.ddp_cases import Gradients, kicked

SMALL = AdapterConfig(rank=2, block=1)


def step_gradients(module: Memorization, tmp_path: Path, batch_size: int, **trainer: Any) -> dict[str, Tensor | None]:
    kicked(module)
    watch = Gradients()
    data = Ids(uneven(6), batch_size=batch_size, shuffle=False)
    make_trainer(tmp_path, callbacks=[watch], **trainer).fit(module, datamodule=data)
    return watch.steps[0]


WEIGHTINGS = {
    "sft": lambda folder: SFT(backbone=folder, adapter=SMALL, seed=1),
    "only threshold": lambda folder: MemFT(backbone=folder, adapter=SMALL, seed=1, weighting=OnlyThreshold()),
    "sliding window": lambda folder: MemFT(
        backbone=folder, adapter=SMALL, seed=1, weighting=SlidingWindow(window=2, floor=0.01)
    ),
    "whole targets": lambda folder: MemFT(
        backbone=folder, adapter=SMALL, seed=1, weighting=WholeTargets(reach_start=4.0)
    ),
    "mostly memorised, uniform": lambda folder: MemFT(
        backbone=folder, adapter=SMALL, seed=1, weighting=OnlyThreshold(threshold=1e-9, when_memorized="uniform")
    ),
    "partly memorised, uniform": lambda folder: MemFT(
        backbone=folder, adapter=SMALL, seed=1, weighting=OnlyThreshold(threshold=2e-4, when_memorized="uniform")
    ),
}


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_accumulated_micro_batches_give_the_gradient_of_one_large_batch(
    name: str, tiny_backbone_folder: Path, tmp_path: Path
) -> None:
    make = WEIGHTINGS[name]
    whole = step_gradients(make(str(tiny_backbone_folder)), tmp_path, batch_size=6)
    for batch_size in (1, 2, 3, 4):
        parts = step_gradients(
            make(str(tiny_backbone_folder)), tmp_path, batch_size, accumulate_grad_batches=-(-6 // batch_size)
        )
        for key, expected in whole.items():
            torch.testing.assert_close(parts[key], expected, rtol=1e-4, atol=1e-6)


def test_the_gradient_is_that_of_the_mean_loss_over_all_target_tokens(
    tiny_backbone_folder: Path, tmp_path: Path
) -> None:
    module = SFT(backbone=str(tiny_backbone_folder), adapter=SMALL, seed=1)
    steps = step_gradients(module, tmp_path, batch_size=2, accumulate_grad_batches=3)
    reference = SFT(backbone=str(tiny_backbone_folder), adapter=SMALL, seed=1)
    kicked(reference)
    losses = []
    for prompt, target in uneven(6):
        logits = reference(torch.tensor([prompt + target]))[0, len(prompt) - 1 : -1]
        losses.append(-logits.log_softmax(-1)[torch.arange(len(target)), torch.tensor(target)])
    torch.cat(losses).mean().backward()
    for name, parameter in adapter_parameters(reference.model).items():
        torch.testing.assert_close(steps[name], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weighting", [OnlyThreshold(), SlidingWindow(scale=200.0)], ids=["hard", "steep"])
def test_a_step_without_tokens_below_the_threshold_changes_neither_adapter_nor_momentum(
    weighting: Weighting, tiny_backbone_folder: Path, tmp_path: Path
) -> None:
    # Steps are taken while tokens are below the threshold, which then drops below all of them.
    class Dropping(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 3:
                pl_module.weighting._critical = 1e9
                self.before = {n: p.clone() for n, p in adapter_parameters(pl_module.model).items()}
                self.moments = [s["exp_avg"].clone() for s in trainer.optimizers[0].state.values()]

    watch = Dropping()
    module = MemFT(backbone=str(tiny_backbone_folder), adapter=SMALL, seed=1, weighting=weighting)
    trainer = make_trainer(tmp_path, max_epochs=6, callbacks=[watch])
    trainer.fit(module, datamodule=Ids(uneven(4), batch_size=4))
    assert module.skipped_steps == 3
    for name, parameter in adapter_parameters(module.model).items():
        assert torch.equal(parameter, watch.before[name])
    for state, before in zip(trainer.optimizers[0].state.values(), watch.moments, strict=True):
        assert torch.equal(state["exp_avg"], before)


def test_a_skipped_step_goes_with_clipping_by_value(tiny_backbone_folder: Path, tmp_path: Path) -> None:
    module = MemFT(backbone=str(tiny_backbone_folder), adapter=SMALL, seed=1, weighting=OnlyThreshold(1e-6))
    trainer = make_trainer(tmp_path, max_epochs=2, gradient_clip_val=1.0, gradient_clip_algorithm="value")
    trainer.fit(module, datamodule=Ids(uneven(4)))
    assert module.skipped_steps == 2


def test_training_changes_the_adapter_and_leaves_the_backbone_unchanged(
    tiny_backbone_folder: Path, tmp_path: Path
) -> None:
    module = SFT(backbone=str(tiny_backbone_folder), adapter=SMALL, seed=1)
    module.configure_model()
    before = {name: p.clone() for name, p in module.model.named_parameters()}
    make_trainer(tmp_path, max_epochs=2).fit(module, datamodule=Ids(uneven(4)))
    moved = {name for name, p in module.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == adapter_parameters(module.model).keys()


def test_a_seed_gives_the_same_adapter_on_the_cpu_whatever_the_default_device(
    tiny_backbone_folder: Path,
) -> None:
    modules = [SFT(str(tiny_backbone_folder), adapter=SMALL, seed=3) for _ in range(2)]
    modules[0].configure_model()
    with torch.device("meta"):
        modules[1].configure_model()
    ours, theirs = (adapter_parameters(module.model) for module in modules)
    assert {parameter.device.type for parameter in theirs.values()} == {"cpu"}
    torch.testing.assert_close(theirs, ours, rtol=0, atol=0)


def test_the_seed_determines_the_run(tiny_backbone_folder: Path, tmp_path: Path) -> None:
    ends = []
    for seed in (1, 1, 2):
        module = MemFT(backbone=str(tiny_backbone_folder), adapter=SMALL, seed=seed)
        make_trainer(tmp_path, max_epochs=3).fit(module, datamodule=Ids(uneven(6), batch_size=2))
        ends.append(torch.cat([p.detach().flatten() for p in adapter_parameters(module.model).values()]))
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_runs_of_twenty_steps_with_and_without_the_frozen_layer_cache_agree(
    tiny_backbone_folder: Path, tmp_path: Path
) -> None:
    ends = []
    for split in (True, False):
        module = SFT(
            backbone=str(tiny_backbone_folder),
            adapter=SMALL,
            seed=1,
            learning_rate=1e-3,
            frozen_prefix=CacheConfig(enabled=split),
        )
        make_trainer(tmp_path, max_epochs=20).fit(module, datamodule=Ids(uneven(4), batch_size=4))
        ends.append(torch.cat([p.detach().flatten() for p in adapter_parameters(module.model).values()]))
    # AdamW divides by the size of the gradient, so rounding of near-zero gradients shows at the scale of a step.
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-3, atol=1e-4)


def test_dropout_is_active_only_in_training_and_the_backbone_is_always_in_eval_mode(
    tiny_backbone_folder: Path, tmp_path: Path
) -> None:
    seen: dict[str, list[bool]] = {"fit": [], "validate": []}

    class Watch(Callback):
        def look(self, module: Any, stage: str) -> None:
            modes = {name: m.training for name, m in module.model.named_modules() if not list(m.children())}
            dropouts = {name for name in modes if "lora_dropout" in name}
            seen[stage].append(all(modes[name] for name in dropouts))
            assert dropouts
            assert not any(modes[name] for name in modes.keys() - dropouts)

        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            self.look(pl_module, "fit")

        def on_validation_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            self.look(pl_module, "validate")

    adapter = AdapterConfig(rank=2, block=1, dropout=0.3)
    module = SFT(backbone=str(tiny_backbone_folder), adapter=adapter, seed=1)
    make_trainer(tmp_path, max_epochs=2, limit_val_batches=1.0, callbacks=[Watch()]).fit(
        module, datamodule=Ids(uneven(4), batch_size=4)
    )
    assert seen == {"fit": [True, True], "validate": [False, False]}


def test_dropout_changes_losses_in_training_mode_and_not_in_eval_mode(tiny_backbone_folder: Path) -> None:
    module = SFT(backbone=str(tiny_backbone_folder), adapter=AdapterConfig(rank=2, block=1, dropout=0.5), seed=1)
    kicked(module)
    module.train()
    batch = collate(Ids(uneven(4)).examples)
    assert not torch.equal(module.score(batch).losses, module.score(batch).losses)
    module.eval()
    assert torch.equal(module.score(batch).losses, module.score(batch).losses)


def test_a_checkpoint_holds_only_adapter_weights_and_restores_the_module(
    tiny_backbone_folder: Path, tmp_path: Path
) -> None:
    module = MemFT(
        backbone=str(tiny_backbone_folder), adapter=SMALL, seed=1, weighting=SlidingWindow(window=4), learning_rate=0.02
    )
    data = Ids(uneven(4), batch_size=4)
    trainer = make_trainer(tmp_path, max_epochs=4)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    checkpoint = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert checkpoint["state_dict"].keys() == adapter_parameters(module.model).keys()
    assert (tmp_path / "run.ckpt").stat().st_size < 30_000
    loaded = MemFT.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
    assert loaded.weighting == SlidingWindow(window=4)
    assert loaded.learning_rate == 0.02
    assert loaded.tokens_trained == module.tokens_trained
    batch = collate(data.examples)
    assert torch.equal(loaded.eval().score(batch).losses, module.eval().score(batch).losses)


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(
    tiny_backbone_folder: Path, tmp_path: Path
) -> None:
    def run(epochs: int, checkpoint: Path | None = None) -> tuple[Memorization, Any]:
        module = MemFT(
            backbone=str(tiny_backbone_folder), adapter=SMALL, seed=1, schedule="constant", weighting=SlidingWindow()
        )
        save = ModelCheckpoint(tmp_path / str(epochs), filename="end")
        trainer = make_trainer(tmp_path, max_epochs=epochs, enable_checkpointing=True, callbacks=[save])
        trainer.fit(module, datamodule=Ids(uneven(6), batch_size=2), ckpt_path=checkpoint, weights_only=True)
        return module, save.best_model_path

    whole, _ = run(6)
    _, stopped = run(3)
    resumed, _ = run(6, stopped)
    for name, parameter in adapter_parameters(whole.model).items():
        assert torch.equal(adapter_parameters(resumed.model)[name], parameter)


def test_the_progress_of_a_weighting_is_the_share_of_optimiser_steps_taken(
    tiny_backbone_folder: Path, tmp_path: Path
) -> None:
    seen: list[float] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            seen.append(pl_module.weighting.progress)

    module = MemFT(backbone=str(tiny_backbone_folder), adapter=SMALL, seed=1, weighting=FallingThreshold())
    make_trainer(tmp_path, max_epochs=5, accumulate_grad_batches=2, callbacks=[Watch()]).fit(
        module, datamodule=Ids(uneven(4), batch_size=1)
    )
    # Four batches an epoch, two steps of two micro-batches each.
    assert seen == pytest.approx([step / 10 for step in range(10) for _ in range(2)])


def test_a_falling_threshold_is_refused_if_training_has_no_limit(tiny_backbone_folder: Path, tmp_path: Path) -> None:
    module = MemFT(backbone=str(tiny_backbone_folder), adapter=SMALL, schedule="constant", weighting=FallingThreshold())
    with pytest.raises(InputError, match=r"default, need an end; set trainer\.max_epochs or trainer\.max_steps"):
        make_trainer(tmp_path, max_epochs=-1).fit(module, datamodule=Ids(uneven(4), batch_size=1))


def test_a_checkpoint_with_missing_extra_or_misshaped_weights_is_refused(tiny_backbone_folder: Path) -> None:
    module = SFT(backbone=str(tiny_backbone_folder), adapter=SMALL, seed=1)
    module.configure_model()
    state = module.state_dict()
    first = next(iter(state))
    with pytest.raises(InputError, match=f"lacks 1 adapter weights, such as {first}"):
        module.load_state_dict({name: value for name, value in state.items() if name != first})
    with pytest.raises(InputError, match="has 1 weights that this adapter lacks, such as stray"):
        module.load_state_dict({**state, "stray": torch.zeros(1)})
    with pytest.raises(InputError, match=r"has shape \(3, 32\); this adapter's is \(2, 32\)"):
        module.load_state_dict({**state, first: torch.zeros(3, 32)})


@pytest.mark.parametrize(
    ("limits", "steps"),
    [
        ({}, 12),  # two epochs of two batches, two of four
        ({"max_steps": 1000}, 12),
        ({"max_steps": 7}, 7),
        ({"limit_train_batches": 3}, 10),
        ({"limit_train_batches": 0.5}, 6),
    ],
    ids=str,
)
def test_the_learning_rate_falls_linearly_to_zero_over_all_epochs_of_a_growing_curriculum(
    limits: dict[str, Any], steps: int, tiny_backbone_folder: Path, tmp_path: Path
) -> None:
    rates: list[float] = []

    class Rates(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    module = MemFT(
        backbone=str(tiny_backbone_folder),
        adapter=SMALL,
        seed=1,
        learning_rate=0.5,
        curriculum=PrefixRatio(ratios=[0.5, 1.0], boundaries=[2, 4]),
    )
    make_trainer(tmp_path, max_epochs=4, callbacks=[Rates()], **limits).fit(
        module, datamodule=Ids(uneven(8), batch_size=2, drop_last=True)
    )
    assert rates == pytest.approx([0.5 * (steps - step) / steps for step in range(steps)])


def test_the_learning_rate_warms_up_to_its_peak_and_ends_at_zero(tiny_backbone_folder: Path, tmp_path: Path) -> None:
    module = SFT(backbone=str(tiny_backbone_folder), adapter=SMALL, warmup_steps=3, learning_rate=1.0)
    trainer = make_trainer(tmp_path, max_epochs=10)
    trainer.fit(module, datamodule=Ids(uneven(4), batch_size=4))
    (factor,) = trainer.lr_scheduler_configs[0].scheduler.lr_lambdas
    assert [factor(step) for step in (0, 1, 2, 3, 10)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.0])


def test_settings_are_plain_python_values(tiny_backbone_folder: Path) -> None:
    settings = MemFT(backbone=str(tiny_backbone_folder), weighting=OnlyThreshold(0.4), learning_rate=0.1).settings()
    assert settings["weighting"] == {
        "class_path": "pml.weighting.OnlyThreshold",
        "init_args": {"threshold": 0.4, "position_decay": None, "when_memorized": "skip"},
    }
    assert settings["learning_rate"] == 0.1


def test_a_learning_rate_of_zero_is_refused() -> None:
    with pytest.raises(InputError, match="learning_rate is 0; expected a number above 0"):
        SFT(learning_rate=0)
