"""Cost of an optimiser step: plain PEFT against pml without and with the split, and the arithmetic each needs.

Each way runs in its own process, so that settings and memory do not mix. The ways take turns, one at a time, so that
a machine that slows down slows all of them.
"""

import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pml.adapter import AdapterConfig, adapter_parameters, attach_adapter, detach_adapter
from pml.backbone import Backbone, load_backbone
from pml.bench.machine import held_mib, peak_mib, reset_peak
from pml.corpus import Corpus, collate
from pml.cpu import give_back_memory, tune_cpu
from pml.frozen_layers import content_keys
from pml.modules import SFT, Memorization
from pml.optimizer import make_adamw
from pml.products import MatmulPrecision, float32_products
from pml.state_store import CacheConfig
from pml.weighting import weighted_mean

__all__ = ["WAYS", "Case", "Measurement", "measure_steps", "pml_loss", "step_flops", "timed_steps"]

Way = Literal["ordinary", "whole", "split"]
WAYS: tuple[Way, ...] = ("ordinary", "whole", "split")
"""PEFT on the whole model, with logits at every position and PyTorch's defaults; pml unsplit; pml split."""


@dataclass(frozen=True)
class Case:
    """One batch to step on.

    Attributes:
        corpus: `random_tokens` (one target) or `phonebook` (many short targets).
        size: Target tokens of `random_tokens`, or pairs of `phonebook`.
        dtype: Floating-point type of the backbone.
        backbone: Name of the backbone.
        rank: LoRA rank of the adapter.
        matmul_precision: Precision of float32 products in pml's steps; the ordinary step keeps PyTorch's default.
    """

    corpus: Literal["random_tokens", "phonebook"]
    size: int
    dtype: str
    backbone: str
    rank: int = 4
    matmul_precision: MatmulPrecision = "highest"

    @property
    def numbers(self) -> str:
        """Number format for tables: the dtype, or the matmul precision if that is reduced."""
        return self.dtype if self.matmul_precision == "highest" else self.matmul_precision

    @property
    def label(self) -> str:
        """Name of the case in tables."""
        return f"target {self.size}" if self.corpus == "random_tokens" else f"{self.size} pairs"


@dataclass(frozen=True)
class Measurement:
    """Cost of one way of stepping on one case.

    Attributes:
        case: The batch.
        way: The way of stepping.
        step_seconds: Median over all counted steps.
        fastest_seconds: Fastest counted step.
        slowest_seconds: Slowest counted step.
        peak_mib: Peak memory while stepping, weights included, above what was in use before the backbone was loaded:
            resident memory of the process, or allocated memory of the GPU.
        step_mib: Peak memory above what was in use before the first step.
        cut: Where the model was split into frozen and trained blocks; `whole` if it was not.
        gflop: Arithmetic of a step, in 10^9 operations; see `step_flops`.
    """

    case: Case
    way: Way
    step_seconds: float
    fastest_seconds: float
    slowest_seconds: float
    peak_mib: float
    step_mib: float
    cut: str
    gflop: float


def measure_steps(
    cases: Sequence[Case], repeats: int = 3, steps: int = 4, report: Callable[[Measurement], None] = lambda _: None
) -> list[Measurement]:
    """Time every way on every case, in turns.

    Args:
        cases: The batches.
        repeats: Turns of each way on each case.
        steps: Counted optimiser steps per turn, after one uncounted step: another process has used the CPU's caches in
            the meantime.
        report: Called with each measurement as soon as it is known.
    """
    context = multiprocessing.get_context("spawn")
    workers: dict[Way, tuple[Any, Connection]] = {}
    try:
        for way in WAYS:
            ours, theirs = context.Pipe()
            process = context.Process(target=_worker, args=(way, theirs), daemon=True)
            process.start()
            workers[way] = process, ours
        measurements = []
        for case in cases:
            facts = {way: _ask(pipe, ("case", case)) for way, (_, pipe) in workers.items()}
            seconds: dict[Way, list[float]] = {way: [] for way in WAYS}
            for _ in range(repeats):
                for way, (_, pipe) in workers.items():
                    seconds[way] += _ask(pipe, ("steps", steps))
            for way, (_, pipe) in workers.items():
                peak, above = _ask(pipe, ("memory", None))
                taken = seconds[way]
                measurement = Measurement(
                    case, way, statistics.median(taken), min(taken), max(taken), peak, above, **facts[way]
                )
                measurements.append(measurement)
                report(measurement)
        return measurements
    finally:
        for process, pipe in workers.values():
            pipe.close()
            process.join(timeout=10)
            process.kill()


def _ask(pipe: Connection, request: tuple[str, Any]) -> Any:
    pipe.send(request)
    answer = pipe.recv()
    if isinstance(answer, Exception):
        raise answer
    return answer


def _worker(way: Way, pipe: Connection) -> None:
    """Serve requests for one way of stepping until the pipe is closed."""
    from pml.quiet import ignore_noise

    ignore_noise()
    stepper: _Stepper | None = None
    while True:
        try:
            request, argument = pipe.recv()
        except EOFError:
            return
        try:
            if request == "case":
                if stepper is not None:
                    stepper.close()
                stepper = None  # frees the last case's memory before the next is measured
                gc.collect()
                stepper = _Stepper(way, argument)
                pipe.send(stepper.facts)
            elif request == "steps":
                assert stepper is not None
                pipe.send(stepper.steps(argument))
            else:
                assert stepper is not None
                pipe.send(stepper.memory())
        except Exception as error:
            pipe.send(error)


_loaded: dict[tuple[str, str], Backbone] = {}
_bare_mib = float("nan")
"""Memory in use before the process loaded its first backbone."""


class _Stepper:
    """One way of stepping on one case; `close` detaches its adapter and leaves the backbone loaded."""

    close: Callable[[], None]

    def __init__(self, way: Way, case: Case) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if way != "ordinary" and device.type == "cpu":
            tune_cpu()
        key = case.backbone, case.dtype
        global _bare_mib
        if not _loaded:
            _bare_mib = held_mib(device)
        if key not in _loaded:
            _loaded.clear()
            _loaded[key] = load_backbone(*key)
            nn.Module.to(_loaded[key].model, device)
        backbone = _loaded[key]
        corpus = _corpus(case, backbone)
        self.batch = collate(corpus.examples)
        self.batch = {name: value.to(device) for name, value in self.batch.items()}
        self.device = device
        self.precision: MatmulPrecision = "highest" if way == "ordinary" else case.matmul_precision
        adapter = AdapterConfig(rank=case.rank)
        if way == "ordinary":
            model = attach_adapter(backbone, adapter, seed=1)
            self.close = lambda: detach_adapter(model)
            self._loss = lambda: _ordinary_loss(model, self.batch)
            cut = "whole"
            parameters = adapter_parameters(model)
        else:
            module = SFT(adapter=adapter, seed=1, frozen_prefix=CacheConfig(enabled=way == "split"))
            module._backbone = backbone
            module.configure_model()
            self.close = module.release
            keys = content_keys(self.batch["input_ids"].cpu(), self.batch["lengths"].cpu())
            self._loss = lambda: pml_loss(module, {**self.batch, "keys": keys})
            cut = module.frozen_layers.cut
            parameters = adapter_parameters(module.model)
        self.optimizer = (
            torch.optim.AdamW(parameters.values(), lr=1e-3)
            if way == "ordinary"
            else make_adamw(parameters.values(), 1e-3, (0.9, 0.999), 0.0)
        )
        self.facts = {"cut": cut, "gflop": step_flops(backbone, corpus, adapter, way) / 1e9}
        if way == "split":
            self._loss()  # computes and keeps the frozen states, so the weights below the cut can go
            module.frozen_layers.release()
            module.frozen_layers.replay()
        give_back_memory()
        reset_peak(device)
        self._held = held_mib(device)
        self.steps(2)

    def steps(self, count: int) -> list[float]:
        return timed_steps(self._loss, self.optimizer, self.precision, count)

    def memory(self) -> tuple[float, float]:
        peak = peak_mib(self.device)
        return peak - _bare_mib, peak - self._held


def timed_steps(
    loss_of_batch: Callable[[], Tensor], optimizer: torch.optim.Optimizer, precision: MatmulPrecision, count: int
) -> list[float]:
    """Seconds of each of `count` optimiser steps, after one that is not counted.

    Args:
        loss_of_batch: Computes the loss, with its graph.
        optimizer: Optimiser of the trained parameters, in one group.
        precision: Precision of float32 products, forward and backward.
        count: Number of steps to time.
    """
    parameters, seconds = optimizer.param_groups[0]["params"], []
    for _ in range(count + 1):
        started = time.perf_counter()
        with float32_products(precision):
            loss = loss_of_batch()
            optimizer.zero_grad()
            loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if parameters[0].device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        # As trainers do: otherwise the graph would stay in memory through the next step's forward pass.
        del loss
    return seconds[1:]


def _ordinary_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean target loss as transformers' Trainer computes it: logits at every position, the model's own loss."""
    mask = torch.arange(batch["input_ids"].shape[1], device=batch["lengths"].device) < batch["lengths"][:, None]
    return model(input_ids=batch["input_ids"], attention_mask=mask.long(), labels=batch["labels"], use_cache=False).loss


def pml_loss(module: Memorization, batch: dict[str, Any]) -> Tensor:
    """Loss of a training step on a batch with its content keys, in nats per target token."""
    scores = module.score(batch)
    return weighted_mean(scores.losses, module.weighting.weights(scores))


def _corpus(case: Case, backbone: Backbone) -> Corpus:
    # Imported by name, as on the command line: pml does not depend on data_modules.
    corpora = import_module("data_modules")
    if case.corpus == "random_tokens":
        data = corpora.RandomTokens(length=case.size)
    else:
        data = corpora.PhoneBook(pairs=case.size)
    return data.build(backbone.tokenizer, backbone.vocab_size, backbone.max_positions)


def step_flops(backbone: Backbone, corpus: Corpus, adapter: AdapterConfig, way: Way = "split") -> float:
    """Floating-point operations of a step on a whole corpus; no way of stepping can do with fewer than the split way.

    Forward: two per block weight and input token without padding, plus attention's products with keys and values; the
    split way counts only blocks above the adapted one. Backward: through the blocks above the adapted one, as many
    again for their weights, which are frozen, and twice as many for attention. Head: two per weight and target token
    (ordinary way: input token), forward and again backward. The adapter and elementwise operations are left out: they
    are below a hundredth of the total.
    """
    first_above = max(adapter.block_indices(len(backbone.blocks))) + 1
    tokens = sum(len(e) - 1 for e in corpus.examples)
    # Causal: each token attends to half of the others on average, in one product with keys and one with values.
    attention = sum((len(e) - 1) ** 2 for e in corpus.examples) * _attention_width(backbone)

    def once_through(blocks: Sequence[nn.Module], attention_products: float) -> float:
        weights = sum(m.weight.numel() for block in blocks for m in block.modules() if isinstance(m, nn.Linear))
        return 2.0 * (weights * tokens + attention_products * len(blocks))

    head = 2.0 * backbone.model.get_output_embeddings().weight.numel()
    head *= tokens if way == "ordinary" else corpus.target_tokens
    above = list(backbone.blocks)[first_above:]
    forward = above if way == "split" else list(backbone.blocks)
    return once_through(forward, attention) + once_through(above, 2 * attention) + 2 * head


def _attention_width(backbone: Backbone) -> int:
    config = backbone.config
    return config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
