"""Memorise pairs in one call: plan the rank, train until every token is certain, then check every answer.

Two things limit the harm to other text: the guard (`pml.guard`) and the KL penalty (`pml.kl_penalty`).

With room to spare, the plain loss makes every token certain in the fewest steps and does the least harm. Near the
planned rank it leaves a few tokens below the threshold; MemFT's falling threshold lifts those above it.

If some token is not certain after the steps of one attempt, the rank doubles. The larger adapter starts from the
smaller one: A gets fresh rows, and B gets columns of zeros.
"""

import logging
import math
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from pml.adapter import AdapterConfig, adapter_for
from pml.atomic import whole_file
from pml.backbone import Backbone, backbone_facts, load_backbone, shared_backbones
from pml.bare_trainer import bare_trainer
from pml.certificate import PairCertificate
from pml.certified_stop import StopsWhereCertified, certified_pairs
from pml.checkpoints import StopsAtSteps
from pml.corpus import Corpus
from pml.decoding import plain_decoding
from pml.default_backbone import DEFAULT_BACKBONE
from pml.devices import best_device, free_memory
from pml.encoding import TextEncoder
from pml.epoch_progress import Progress, ProgressReporter
from pml.errors import InputError
from pml.given_pairs import checked_pairs, file_with
from pml.growing import grow, largest_rank, weights_of
from pml.guard import GuardConfig
from pml.kl_penalty import KlPenaltyConfig
from pml.model_card import model_card
from pml.modules import SFT, MemFT, Memorization
from pml.records import RECORD_NAME, Record, read_record
from pml.saved_adapter import CARD_NAME
from pml.served import serve
from pml.stopping import Stopped, at_step_ends
from pml.storage import RankPlan, RankTooHigh, plan_rank
from pml.weighting import FallingThreshold

__all__ = ["Memorized", "Settings", "memorize"]

log = logging.getLogger(__name__)

PER_STEP = 4
"""Pairs per optimiser step: many small steps beat few large ones."""

LEARNING_RATE = 0.03
"""Peak learning rate of AdamW. At half this rate, facts took a third more steps and did about as much harm."""

EPOCHS = 60
"""Epochs of one attempt, over which the learning rate falls to 0; most attempts end long before."""

MIN_STEPS = {"plain": 400, "falling": 960}
"""Least step budget of one attempt. Near the planned rank, a few tokens of keys and code need the larger one. With
room, a longer decay takes more steps and does more harm: 32 facts took 320 of 480 steps and cost .015 nats, against 360
of 960 and .021."""

DOUBLINGS = 3

MIN_RANK = 8
"""Lowest rank that training begins at: a smaller adapter can hold a few pairs too, but takes more steps."""

PLAIN_LOSS_RANK_RATIO = 2.5
"""Multiple of the planned rank from which training uses the plain loss. On 32 facts at rank 8, with rank 3 planned, it
took 312 steps and cost .014 nats; the falling threshold took 424 and cost .024. The plain loss left tokens below p = .6
in six of ten sets at about half this room, and in two of three books of 100 numbers at full room and half the rate."""


@dataclass(frozen=True)
class Settings:
    """Settings of `memorize`.

    Args:
        backbone: `smollm2-135m`, a folder, or a hub id.
        dtype: Floating-point type of the frozen weights, in training and for the certificate.
        rank: LoRA rank to begin with; None plans it.
        placement: Names of linear layers, which plain PEFT can load, or `mlp_block`, which only `pml` can load. None
            takes all linear layers of the block.
        block: See `pml.adapter.AdapterConfig`.
        guard: Keeps the adapter from reading the directions that ordinary text uses; None disables it.
        kl_penalty: Keeps the model close to the frozen one on ordinary text; None disables it.
        learning_rate: Peak learning rate of AdamW.
        margin: Probability that every target token has to exceed: 0.5 makes it certain, more survives rounding.
        query_column: Column of a file that holds the queries.
        target_column: Column of a file that holds the targets.
        seed: Seed of the adapter and of the order of the pairs.
    """

    backbone: str = DEFAULT_BACKBONE
    dtype: str = "float32"
    rank: int | None = None
    placement: str | list[str] | None = None
    block: int | float | list[int] = 2 / 3
    guard: GuardConfig | None = field(default_factory=GuardConfig)
    kl_penalty: KlPenaltyConfig | None = field(default_factory=KlPenaltyConfig)
    learning_rate: float = LEARNING_RATE
    margin: float = 0.6
    query_column: str = "query"
    target_column: str = "target"
    seed: int = 42

    def __post_init__(self) -> None:
        if not 0.5 <= self.margin < 1:
            raise InputError(f"margin is {self.margin}; expected a probability of at least 0.5 and below 1")


@dataclass(frozen=True)
class Memorized:
    """Result of `memorize`.

    Attributes:
        folder: The run's folder.
        adapter: The adapter's folder, in PEFT's format.
        plan: The rank that the pairs need; None if a rank was given and no rank that fits is enough.
        certificates: Certificate of each pair, from teacher forcing.
        served: Answers of transformers and PEFT without `pml`; None for `mlp_block`, which PEFT cannot load.
        record: The run's record, with the harm.
        seconds: Duration of the whole call.
    """

    folder: Path
    adapter: Path
    plan: RankPlan | None
    certificates: Sequence[PairCertificate]
    served: Sequence[str] | None
    record: Record
    seconds: float

    @property
    def rank(self) -> int:
        """Rank of the final adapter."""
        return self.record.rank

    @property
    def steps(self) -> int:
        """Optimiser steps, summed over all attempts."""
        return self.record.optimizer_steps

    @property
    def failed(self) -> list[PairCertificate]:
        """Pairs that are not certain, or whose answer was not the target byte for byte."""
        answers: Sequence[str | None] = self.served or [known.example.target for known in self.certificates]
        return [
            known
            for known, answer in zip(self.certificates, answers, strict=True)
            if known.verdict != "certain" or answer != known.example.target
        ]

    @property
    def harm(self) -> float | None:
        """Rise of the loss on other text in nats per token, mean over three kinds of text; None if not measured."""
        return self.record.mean_harm


def memorize(
    pairs: str | Path | Mapping[str, str] | Iterable[tuple[str, str]],
    out: str | Path,
    *,
    overwrite: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    on_plan: Callable[[Corpus, RankPlan | None, int], None] | None = None,
    **settings: Any,
) -> Memorized:
    """Write pairs into an adapter, so that greedy decoding returns every target word for word.

    Args:
        pairs: A file that `data_modules.Facts` reads, a mapping of queries to targets, or (query, target) tuples.
        out: Folder for the adapter, its record and its pairs.
        overwrite: Write into a folder that is not empty.
        on_progress: Called after each epoch.
        on_plan: Called before training with the corpus, the plan, and the rank that training begins at.
        **settings: See `Settings`.

    Raises:
        InputError: If the pairs, the folder or a setting are invalid; raised before anything is trained.

    Example:
        `pml.memorize({"Door code?": "4071#"}, "door").failed` is empty if every target came back. Pairs that cannot be
        memorised are refused before anything is loaded or written:

        >>> memorize({}, "door")
        Traceback (most recent call last):
        ...
        pml.errors.InputError: pairs is empty; expected at least one query with its target
    """
    chosen, folder, started = Settings(**settings), Path(out), time.monotonic()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; expected a folder to write into")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise InputError(f"{folder} is not an empty folder; choose another one, or pass overwrite")
    trained = _trained(chosen, checked_pairs(pairs), folder, on_progress, on_plan)
    corpus, encoder, plain = trained.corpus, trained.encoder, trained.plain
    record, served = read_record(folder / RECORD_NAME), None
    if isinstance(record.placement, list):
        free_memory()  # for the process that serves the adapter
        base = Path(backbone_facts(chosen.backbone)["path"])
        served = serve(base, folder / "adapter", corpus.examples, encoder, plain, chosen.dtype)
    seconds = time.monotonic() - started
    made = Memorized(folder, folder / "adapter", trained.plan, trained.certificates, served, record, seconds)
    with whole_file(made.adapter / CARD_NAME) as file:
        file.write(model_card(record, corpus, encoder, plain, served, trained.certificates).encode())
    return made


@dataclass(frozen=True)
class _Trained:
    """What is known after training: everything but the model itself, whose memory can be freed.

    `plain` are the arguments of `generate` that leave the logits of the base alone.
    """

    corpus: Corpus
    plan: RankPlan | None
    certificates: Sequence[PairCertificate]
    encoder: TextEncoder
    plain: Mapping[str, Any]


def _trained(
    chosen: Settings,
    given: Path | list[tuple[str, str]],
    folder: Path,
    on_progress: Callable[[Progress], None] | None,
    on_plan: Callable[[Corpus, RankPlan | None, int], None] | None,
) -> _Trained:
    """Plan, train and certify; the adapter and its record are left in the folder."""
    with shared_backbones():
        backbone = load_backbone(chosen.backbone, chosen.dtype)
        backbone.model.to(best_device())  # type: ignore[arg-type]  # the wrapper has lost its signature
        with file_with(given, folder) as path:
            columns = {"query_column": chosen.query_column, "target_column": chosen.target_column}
            data = import_module("data_modules").Facts(
                str(path), batch_size=PER_STEP, seed=chosen.seed, **(columns if isinstance(given, Path) else {})
            )
            corpus = data.build(backbone.tokenizer, backbone.vocab_size, backbone.max_positions)
            adapter = adapter_for(backbone, chosen.placement, chosen.block, chosen.guard)
            plan = _planned(chosen, backbone, corpus, adapter)
            rank = _first_rank(chosen, plan)
            # Made here, so that settings that no module takes leave nothing behind.
            module = _fresh_module(chosen, replace(adapter, rank=rank), plan, chosen.seed)
        if on_plan is not None:
            on_plan(corpus, plan, rank)
        module = _train(chosen, module, plan, data, folder, on_progress)
        certificates = certified_pairs(module, corpus)
        encoder, plain = data.encoder(module.tokenizer), plain_decoding(backbone.model)
        module.release()
    return _Trained(corpus, plan, certificates, encoder, plain)


def _first_rank(chosen: Settings, plan: RankPlan | None) -> int:
    """The rank that training begins at."""
    if chosen.rank is not None:
        return chosen.rank
    assert plan is not None
    return max(plan.rank, min(MIN_RANK, plan.largest_rank))


def _planned(chosen: Settings, backbone: Backbone, corpus: Corpus, adapter: AdapterConfig) -> RankPlan | None:
    try:
        return plan_rank(backbone, corpus, adapter)
    except RankTooHigh as error:
        if chosen.rank is None:
            raise
        log.warning("%s", error)
        return None


def epoch_limit(pairs: int, objective: Literal["plain", "falling"]) -> int:
    """Most epochs of one attempt on `pairs` pairs, with the plain loss or the falling threshold."""
    return max(EPOCHS, math.ceil(MIN_STEPS[objective] / math.ceil(pairs / PER_STEP)))


def _train(
    chosen: Settings,
    module: Memorization,
    plan: RankPlan | None,
    data: Any,
    folder: Path,
    on_progress: Callable[[Progress], None] | None,
) -> Memorization:
    """Train a module until every token is certain, doubling its rank at most `DOUBLINGS` times; returns the last one.

    The objective is chosen anew at each rank: an adapter that has grown enough switches to the plain loss.
    """
    record, is_recalled = _fit(module, chosen.margin, data, folder, None, on_progress)
    for attempt in range(1, DOUBLINGS + 1):
        rank = module.adapter.rank
        if is_recalled or 2 * rank > largest_rank(module):
            break
        steps = record.optimizer_steps
        log.info("some tokens are not certain at rank %d after %d steps: continuing at rank %d", rank, steps, 2 * rank)
        learnt, larger = weights_of(module.model), replace(module.adapter, rank=2 * rank)
        module.release()
        module = _fresh_module(chosen, larger, plan, chosen.seed + attempt)
        _ = module.frozen_layers  # tried with the fresh adapter: a huge one rounds too coarsely to be judged
        grow(module.model, learnt)
        record, is_recalled = _fit(module, chosen.margin, data, folder, record, on_progress)
    return module


def _fresh_module(chosen: Settings, adapter: AdapterConfig, plan: RankPlan | None, seed: int) -> Memorization:
    """A module with a fresh adapter: the plain loss if the adapter has room to spare, else the falling threshold."""
    settings: dict[str, Any] = {
        "backbone": chosen.backbone,
        "dtype": chosen.dtype,
        "adapter": adapter,
        "learning_rate": chosen.learning_rate,
        "kl_penalty": chosen.kl_penalty,
        "seed": seed,
    }
    if plan is not None and adapter.rank >= PLAIN_LOSS_RANK_RATIO * plan.rank:
        module: Memorization = SFT(**settings)
    else:
        # Keep every token in the loss until it exceeds the margin at which training stops.
        falling = FallingThreshold(start=max(0.999, chosen.margin), end=max(0.6, chosen.margin))
        module = MemFT(weighting=falling, **settings)
    module.configure_model()
    return module


def _fit(
    module: Memorization,
    margin: float,
    data: Any,
    folder: Path,
    smaller: Record | None,
    on_progress: Callable[[Progress], None] | None,
) -> tuple[Record, bool]:
    """One attempt: its record, and whether every token became certain. `smaller` is the record that it grew from."""
    observers = import_module("callbacks")
    stop, recorder = observers.StopWhenRecalled(margin), observers.RunRecord(dirpath=str(folder), overwrite=True)
    recorder.grown_from = smaller
    callbacks = [
        StopsAtSteps(),
        stop,
        StopsWhereCertified(stop),
        observers.Generalization(),
        observers.Harm(),
        recorder,
    ]
    if on_progress is not None:
        callbacks.append(ProgressReporter(margin, module.adapter.rank, on_progress))
    epochs = epoch_limit(len(data.corpus), "plain" if isinstance(module, SFT) else "falling")
    trainer = bare_trainer(max_epochs=epochs, callbacks=callbacks, default_root_dir=folder)
    on_ctrl_c = signal.getsignal(signal.SIGINT)
    try:
        with at_step_ends():
            trainer.fit(module, datamodule=data)
    except Stopped as stopped:
        if not stopped.at_once:
            stopped.advice = f"the adapter trained so far is in {folder / 'adapter'}"
        raise
    except SystemExit as stopped:
        if not isinstance(stopped.__context__, KeyboardInterrupt):
            raise  # as after SIGTERM
        # After Ctrl-C, Lightning ignores further ones and exits.
        signal.signal(signal.SIGINT, on_ctrl_c)
        raise KeyboardInterrupt from None
    record = recorder.record
    assert record is not None
    if record.status == "diverged" or (record.final_loss or 0) > (record.initial_loss or math.inf):
        raise InputError(
            f"training at rank {record.rank} raised the loss: learning_rate is {module.learning_rate}; expected a "
            "lower one"
        )
    return record, stop.steps_to_recall is not None
