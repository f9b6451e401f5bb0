"""Fits that `test_ddp` runs on one rank and on several: what each rank runs, and what it saves for comparison."""

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from callbacks import Generalization, Harm, Retention, RunRecord, StopWhenRecalled, TokenThresholds, VerbatimRecall
from pml import stopping
from pml.adapter import AdapterConfig, adapter_parameters, adapter_state
from pml.checkpoints import Checkpoints, newest_checkpoint
from pml.corpus import Corpus, Example
from pml.curriculum import PrefixRatio
from pml.guard import GuardConfig
from pml.kl_penalty import KlPenaltyConfig
from pml.modules import SFT, MemFT, Memorization
from pml.recall import gather_scores, greedy_recall, score_corpus
from pml.state_store import CacheConfig
from pml.stopping import Stopped
from pml.weighting import OnlyThreshold, SlidingWindow, Weighting, WholeTargets
from tests.fits import module_on
from tests.tiny_runs import Ids, make_trainer, uneven

__all__ = [
    "GLOBAL_BATCH",
    "GRADIENT_CASES",
    "METHODS",
    "gradients",
    "guarded_fit",
    "kicked",
    "many_ranks",
    "recorded_fit",
    "released_fit",
    "skipped_fit",
    "trained",
    "window_fit",
]

WEIGHTINGS: dict[str, Callable[[float], Weighting | None]] = {
    "sft": lambda threshold: None,
    "only threshold": lambda threshold: OnlyThreshold(threshold),
    "only threshold, uniform": lambda threshold: OnlyThreshold(threshold, when_memorized="uniform"),
    "all memorised, uniform": lambda threshold: OnlyThreshold(1e-12, when_memorized="uniform"),
    "whole targets": lambda threshold: WholeTargets(reach_start=4.0),
    "sliding window": lambda threshold: SlidingWindow(window=2, floor=0.01),
}
# Weighting, number of examples, examples in a global batch, micro-batches accumulated per optimiser step.
GRADIENT_CASES = [
    (name, examples, per_batch, accumulate)
    for name in WEIGHTINGS
    for examples, per_batch, accumulate in ((6, 6, 1), (5, 4, 1), (5, 4, 2), (7, 2, 2), (1, 2, 1))
]

METHODS: dict[str, Callable[[Path], Memorization]] = {
    "sft": lambda folder: module_on(folder),
    "only threshold": lambda folder: module_on(folder, MemFT, weighting=OnlyThreshold()),
    "sliding window": lambda folder: module_on(folder, MemFT, weighting=SlidingWindow(window=2, patience=2)),
    "whole targets": lambda folder: module_on(folder, MemFT, weighting=WholeTargets(reach_start=4.0)),
    "last share": lambda folder: module_on(folder, MemFT, weighting=WholeTargets(reach_start=4.0, last_share=0.3)),
    "curriculum": lambda folder: module_on(folder, MemFT, curriculum=PrefixRatio([0.3, 0.6, 1.0], [1, 3, 9])),
    # The text yields a single piece, of five tokens and the one before them, so all micro-batches draw the same one.
    "penalty": lambda folder: module_on(
        folder, kl_penalty=KlPenaltyConfig(weight=3.0, passages=1, tokens=5, text=str(folder / "ordinary.txt"))
    ),
}
GLOBAL_BATCH, STEPS, EXAMPLES = 8, 10, 11
"""With eleven examples, the second step of an epoch has three, so the last two of four ranks have none."""


class Gradients(Callback):
    """Keeps the gradients that each optimiser step used, which are None if the step was skipped."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor | None]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step > len(self.steps):
            parameters = adapter_parameters(pl_module.model)
            self.steps.append({n: None if p.grad is None else p.grad.clone() for n, p in parameters.items()})


def kicked(module: Memorization) -> Memorization:
    """The module with a random B, since no gradient reaches A while B is 0."""
    module.configure_model()
    generator = torch.Generator().manual_seed(6)
    for name, parameter in adapter_parameters(module.model).items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3, generator=generator)
    return module


def gradients(
    folder: Path, tmp_path: Path, ranks: int, case: tuple[str, int, int, int], threshold: float
) -> list[dict[str, torch.Tensor | None]]:
    """The gradients of all steps of one epoch, in which weights hardly move, so that every step is comparable."""
    name, examples, per_batch, accumulate = case
    weighting = WEIGHTINGS[name](threshold)
    settings: dict[str, Any] = {"learning_rate": 1e-9}
    module = module_on(folder, **settings) if weighting is None else module_on(folder, MemFT, weighting=weighting)
    module.learning_rate = 1e-9
    watch = Gradients()
    data = Ids(uneven(examples), batch_size=per_batch // ranks, shuffle=False)
    fit(kicked(module), data, tmp_path, ranks, callbacks=[watch], accumulate_grad_batches=accumulate)
    return watch.steps


def trained(
    folder: Path, tmp_path: Path, ranks: int, method: str, accumulate: int = 1
) -> tuple[list[dict[str, torch.Tensor | None]], dict[str, torch.Tensor]]:
    """Ten shuffled steps with global batches of eight: the gradients of each step, and the final weights."""
    module, watch = METHODS[method](folder), Gradients()
    data = Ids(uneven(EXAMPLES), batch_size=GLOBAL_BATCH // ranks // accumulate)
    options = {"max_epochs": -1, "max_steps": STEPS, "accumulate_grad_batches": accumulate}
    fit(kicked(module), data, tmp_path, ranks, callbacks=[watch], **options)
    return watch.steps, {n: p.detach().clone() for n, p in adapter_parameters(module.model).items()}


def skipped_fit(folder: Path, tmp_path: Path, ranks: int) -> tuple[int, int, list[dict[str, torch.Tensor | None]]]:
    """A fit in which no token is below the threshold: skipped steps, all steps and the gradients of each."""
    module, watch = kicked(module_on(folder, MemFT, weighting=OnlyThreshold(1e-12))), Gradients()
    data = Ids(uneven(5), batch_size=4 // ranks)
    trainer = fit(module, data, tmp_path, ranks, callbacks=[watch], max_epochs=2)
    return module.skipped_steps, trainer.global_step, watch.steps


def window_fit(folder: Path, tmp_path: Path, ranks: int) -> dict[str, torch.Tensor]:
    """Window states after epochs in which shuffling moves examples from rank to rank."""
    weighting = SlidingWindow(window=2, patience=1)
    module = kicked(module_on(folder, MemFT, weighting=weighting, learning_rate=1e-3))
    fit(module, Ids(uneven(5), batch_size=2 // ranks), tmp_path, ranks, max_epochs=4)
    return weighting.state_dict()


def guarded_fit(folder: Path, tmp_path: Path, ranks: int) -> dict[str, torch.Tensor]:
    """Final state of a guarded adapter on this rank; the second rank starts with other free directions."""
    adapter = AdapterConfig(rank=2, block=2, guard=GuardConfig(directions=8))
    module = kicked(module_on(folder, adapter=adapter, learning_rate=1e-2))
    state = adapter_state(module.model)
    (basis,) = (tensor for name, tensor in state.items() if name.endswith("basis"))
    if ranks > 1 and dist.get_rank() == 1:
        basis.neg_()
    fit(module, Ids(uneven(4), batch_size=2), tmp_path, ranks, max_epochs=3)
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def buffers_are_broadcast(folder: Path, tmp_path: Path, ranks: int) -> bool:
    """Whether DDP sends the model's buffers from rank to rank in every step."""

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            self.found = trainer.strategy.model.broadcast_buffers

    watch = Watch()
    fit(module_on(folder), Ids(uneven(2), batch_size=1), tmp_path, ranks, max_epochs=1, callbacks=[watch])
    return watch.found


class StopAt(Callback):
    """Requests a stop on the last rank alone, as if only that rank had received a signal."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step and trainer.global_rank == trainer.world_size - 1:
            stopping.request(signal.SIGTERM)


def resumed_fit(folder: Path, tmp_path: Path, ranks: int) -> dict[str, list[Any]]:
    """A fit with dropout and windows, uninterrupted and in two parts: adapter and random state at each end."""
    ends: dict[str, list[Any]] = {"adapter": [], "generator": []}
    for part, (stop, checkpoint) in enumerate(((None, None), (3, None), (None, tmp_path / "part1"))):
        torch.manual_seed(4)
        adapter = AdapterConfig(rank=4, block=2, dropout=0.3)
        module = kicked(module_on(folder, MemFT, adapter=adapter, weighting=SlidingWindow(window=2, patience=1)))
        trainer = make_trainer(
            tmp_path / f"part{part}",
            enable_checkpointing=True,
            callbacks=[StopAt(stop), TokenThresholds(), Checkpoints()],
            max_epochs=3,
            strategy="ddp",
            devices=ranks,
        )
        with stopping.listening(), stopping.at_step_ends(), contextlib.suppress(Stopped):
            path = None if checkpoint is None else newest_checkpoint(checkpoint)
            data = Ids(uneven(7), batch_size=4 // ranks)
            trainer.fit(module, datamodule=data, ckpt_path=path, weights_only=True)
        ends["adapter"].append({n: p.detach().clone() for n, p in adapter_parameters(module.model).items()})
        ends["generator"].append(torch.get_rng_state())
    return ends


def released_fit(folder: Path, tmp_path: Path, ranks: int) -> tuple[int, list[bool]]:
    """How often freed layers were restored, and whether they were freed at each epoch, in a shuffled fit."""
    module, watch = module_on(folder, frozen_prefix=CacheConfig(release=True)), Released()
    fit(module, Ids(uneven(7), batch_size=2 // ranks), tmp_path, ranks, callbacks=[watch], max_epochs=4)
    return watch.loads, watch.released


class Released(Callback):
    """Records at the start of each epoch whether the lower blocks are freed, and counts how often they are restored."""

    def __init__(self) -> None:
        self.released: list[bool] = []
        self.loads = 0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        restore = pl_module.backbone.restore

        def counting() -> None:
            self.loads += pl_module.backbone.released
            restore()

        pl_module.backbone.restore = counting

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.released.append(pl_module.backbone.released)


class WithHeldOut(Ids):
    """Data with one held-out pair, so that the second of two ranks has none to score."""

    def make_held_out(self, corpus: Corpus, tokenizer: Any, vocabulary: int) -> Corpus:
        return Corpus("held_out", [Example(0, (1, 2, 3), (4, 5))])


def recorded_fit(folder: Path, tmp_path: Path, ranks: int) -> dict[str, Any]:
    """A fit with all callbacks and curves on seven examples, until they are recalled."""
    callbacks = [VerbatimRecall(generate_every=2), TokenThresholds(), StopWhenRecalled()]
    callbacks += [Generalization(), Retention(examples=3), Harm(passages=1), RunRecord()]
    logger = TensorBoardLogger(tmp_path, name="run", version="", default_hp_metric=False)
    module, data = module_on(folder, SFT), WithHeldOut(uneven(7), batch_size=4 // ranks)
    trainer = fit(
        module,
        data,
        tmp_path,
        ranks,
        callbacks=callbacks,
        logger=logger,
        max_epochs=300,
        limit_val_batches=1.0,
        check_val_every_n_epoch=10,
        gradient_clip_val=1.0,
    )
    (validated,) = trainer.validate(module, datamodule=data, verbose=False)
    scores = score_corpus(module, data.val_dataloader())
    return {
        "validated": validated,
        "scores": tuple(scores),
        "gathered": tuple(gather_scores([scores])),
        "generated": [g.token_ids for g in greedy_recall(module, data.corpus.examples)],
        "wrote": callbacks[-1].record is not None,  # type: ignore[attr-defined]
        "steps_to_recall": callbacks[2].steps_to_recall,  # type: ignore[attr-defined]
    }


def fit(module: Memorization, data: Ids, tmp_path: Path, ranks: int, **options: Any) -> Any:
    if ranks > 1:
        options |= {"strategy": "ddp", "devices": ranks}
    trainer = make_trainer(tmp_path, **options)
    trainer.fit(module, datamodule=data)
    return trainer


def many_ranks(rank: int, ranks: int, port: int, folder: Path, tmp_path: Path, threshold: float) -> None:
    """Run all cases as one of two ranks, or ten steps as one of more; each rank saves its results as `rank0.pt` ..."""
    # What a launcher such as torchrun sets, so that Lightning starts no processes of its own.
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "tests"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"}
    os.environ |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    os.environ["PML_CACHE"] = str(tmp_path / f"cache{rank}")
    dist.init_process_group("gloo")
    results: dict[str, Any] = {"trained": {method: trained(folder, tmp_path, ranks, method) for method in METHODS}}
    if ranks == 2:
        results["accumulated"] = {method: trained(folder, tmp_path, ranks, method, 2) for method in METHODS}
        results |= {
            "gradients": {case: gradients(folder, tmp_path, 2, case, threshold) for case in GRADIENT_CASES},
            "skipped": skipped_fit(folder, tmp_path, 2),
            "window": window_fit(folder, tmp_path, 2),
            "released": released_fit(folder, tmp_path, 2),
            "resumed": resumed_fit(folder, tmp_path, 2),
            "guarded": guarded_fit(folder, tmp_path, 2),
            "broadcasts": buffers_are_broadcast(folder, tmp_path, 2),
            "recorded": recorded_fit(folder, tmp_path, 2),
        }
    torch.save(results, tmp_path / f"rank{rank}.pt")
    dist.destroy_process_group()
