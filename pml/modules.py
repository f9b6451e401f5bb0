"""LightningModules that write a corpus into an adapter: `SFT` with the plain loss, `MemFT` with a shared-out one."""

import inspect
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from pml.adapter import (
    AdapterConfig,
    adapter_parameters,
    adapter_state,
    attach_adapter,
    detach_adapter,
    load_adapter,
)
from pml.backbone import Backbone, load_backbone
from pml.compiled import CompileMode, reason_not_to_compile
from pml.corpus import IGNORE_INDEX
from pml.cpu import CpuChoice, CpuConfig, tune_cpu
from pml.curriculum import PrefixRatio
from pml.errors import InputError
from pml.frozen_prefix import FrozenPrefix, content_keys
from pml.plain import as_plain, from_plain
from pml.prefix_store import PrefixConfig
from pml.ranks import several_ranks
from pml.token_loss import TokenLosses, against_the_rest, is_argmax, token_losses
from pml.weighting import OnlyThreshold, TokenScores, Uniform, Weighting, weighted_mean

__all__ = ["SFT", "MemFT", "Memorization"]

log = logging.getLogger(__name__)


class Memorization(LightningModule):
    """What all methods share: a frozen backbone with one adapter, scored on target tokens only.

    The loss is sum(w L) / sum(w) over the global batch, all ranks and all accumulated micro-batches: each micro-batch
    adds the gradient of sum(w L), and the sum is divided by the global sum of weights just before the optimiser's step.

    Args:
        backbone: `smollm2-135m`, a folder, or a hub id.
        dtype: Floating-point type of the frozen weights: float32, bfloat16 or float16. The adapter is float32.
        adapter: The LoRA adapter.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: Weight decay of AdamW.
        betas: Averaging coefficients of AdamW.
        schedule: `linear` decays the learning rate to 0 over the run, `constant` keeps it.
        warmup_steps: Steps over which the learning rate rises from 0.
        frozen_prefix: Compute what lies below the adapter once per example and keep it: whether, and where.
        cpu: What may be chosen to make a CPU faster at the same accuracy; see `pml.cpu`.
        compile: Compile the blocks above the adapter: `auto` does where the fit is long enough to earn it back.
        seed: Seed of the adapter's initialisation; None takes the one that `seed_everything` was given.
    """

    method: str
    """Name of the method in records."""

    def __init__(
        self,
        backbone: str = "smollm2-135m",
        dtype: str = "float32",
        adapter: AdapterConfig | None = None,
        learning_rate: float = 0.05,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        schedule: Literal["linear", "constant"] = "linear",
        warmup_steps: int = 0,
        frozen_prefix: PrefixConfig | None = None,
        cpu: CpuConfig | None = None,
        compile: CompileMode = "auto",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if learning_rate <= 0:
            raise InputError(f"learning_rate is {learning_rate}; expected a number above 0")
        self.backbone_name = backbone
        self.dtype_name = dtype
        self.adapter = from_plain(adapter, AdapterConfig) or AdapterConfig()
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.betas = (betas[0], betas[1])
        self.schedule = schedule
        self.warmup_steps = warmup_steps
        self.frozen_prefix = from_plain(frozen_prefix, PrefixConfig) or PrefixConfig()
        self.cpu_config = from_plain(cpu, CpuConfig) or CpuConfig()
        self.cpu_choice: CpuChoice | None = None
        """What was chosen for this machine's CPU; None on other devices."""
        self.compile_mode = compile
        self.seed = torch.initial_seed() if seed is None else seed
        self.weighting: Weighting = Uniform()
        self.curriculum: PrefixRatio | None = None
        self.tokens_trained = 0
        """Target tokens in this rank's training batches so far."""
        self.skipped_steps = 0
        """Optimiser steps not taken since every target token was above threshold."""
        self._keep_plain_hyperparameters()
        self._backbone: Backbone | None = None
        self._peft_model: PeftModel | None = None
        self._prefix: FrozenPrefix | None = None
        self._steps = 0
        self._budget: Tensor | None = None
        self._any_active: Tensor | None = None

    def settings(self) -> dict[str, Any]:
        """Method and optimiser settings as plain Python, for the record."""
        return {
            "weighting": as_plain(self.weighting),
            "curriculum": as_plain(self.curriculum),
            "learning_rate": self.learning_rate,
            "weight_decay": self.weight_decay,
            "betas": list(self.betas),
            "schedule": self.schedule,
            "warmup_steps": self.warmup_steps,
            "dropout": self.adapter.dropout,
            "alpha": self.adapter.alpha,
            **({"guard": vars(self.adapter.guard)} if self.adapter.guard is not None else {}),
            # Arguments of somebody's own method.
            **{name: value for name, value in self.hparams.items() if name not in KNOWN_ARGUMENTS},
        }

    def _keep_plain_hyperparameters(self) -> None:
        """Hyperparameters go into checkpoints, which are read with weights_only: no classes in them."""
        self.save_hyperparameters(logger=False)
        self.hparams.update(as_plain(dict(self.hparams)))

    # The model -------------------------------------------------------------------------------------------------------

    @property
    def backbone(self) -> Backbone:
        """The frozen model and its tokenizer, loaded when first asked for."""
        if self._backbone is None:
            self._backbone = load_backbone(self.backbone_name, self.dtype_name)
        return self._backbone

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The backbone's tokenizer."""
        return self.backbone.tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of tokens that the backbone can predict."""
        return self.backbone.vocab_size

    @property
    def max_positions(self) -> int | None:
        """Longest sequence that the backbone takes, in tokens; None where it has no limit."""
        return self.backbone.max_positions

    @property
    def model(self) -> PeftModel:
        """The backbone with its adapter, as PEFT knows it."""
        if self._peft_model is None:
            raise RuntimeError("the adapter is attached by configure_model(); call that first outside a Trainer")
        return self._peft_model

    @property
    def prefix(self) -> FrozenPrefix:
        """The split of the adapted model, made when first needed, on the device where the model is then."""
        if self._prefix is None:
            trainer = self._trainer
            folder = Path(trainer.log_dir) if trainer is not None and trainer.log_dir else None
            try:
                self._prefix = FrozenPrefix(self.backbone, self.model, self.frozen_prefix, folder)
            except AttributeError as error:
                # torch takes an AttributeError in a property for a missing property, and would say just that.
                raise InputError(
                    f"backbone {self.backbone.name}: {type(self.backbone.model).__name__} is not made as a causal "
                    f"decoder is ({error}); take another backbone"
                ) from error
        return self._prefix

    def setup(self, stage: str) -> None:
        if self.trainer.strategy.root_device.type == "cpu":
            self.cpu_choice = tune_cpu(self.cpu_config)

    def configure_model(self) -> None:
        """Load the backbone and put a fresh adapter on it; does nothing the second time."""
        if self._peft_model is None:
            self._peft_model = attach_adapter(self.backbone, self.adapter, self.seed)
            self.train(self.training)

    def load_adapter(self, folder: str | Path) -> None:
        """Put on an adapter that `save_pretrained` wrote, in place of a fresh one.

        Raises:
            InputError: See `pml.adapter.load_adapter`.
        """
        self._peft_model = load_adapter(self.backbone, folder)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """The frozen model alone, for a while: the adapter adds nothing."""
        _ = self.prefix  # The split has to be tried with the adapter on.
        with self.model.disable_adapter():
            yield

    def release(self) -> None:
        """Take the adapter off, so that another module can use the same backbone; this one is finished."""
        if self._peft_model is not None:
            detach_adapter(self._peft_model)
        self._peft_model = self._prefix = self._backbone = None

    def train(self, mode: bool = True) -> "Memorization":
        """Switch the adapter between training and evaluation; the backbone is always in evaluation mode."""
        super().train(False)
        self.training = mode
        if self._peft_model is not None:
            for name, module in self._peft_model.named_modules():
                if "lora_dropout" in name:
                    module.train(mode)
        return self

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        """Logits (B, T, vocabulary) of the whole adapted model at every position."""
        self.backbone.restore()
        return self.model(input_ids=input_ids, **inputs).logits

    # Scores ----------------------------------------------------------------------------------------------------------

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        # Still on the host: what is read here never makes a device wait.
        return {
            **batch,
            "keys": content_keys(batch["input_ids"], batch["lengths"]),
            "target_tokens": int((batch["labels"] != IGNORE_INDEX).sum()),
        }

    def score(self, batch: dict[str, Any], gradient_above: float | None = None) -> TokenScores:
        """Loss of every target token under teacher forcing, and whether its argmax is right.

        Args:
            batch: B examples as `pml.corpus.collate` gives them, on the module's device.
            gradient_above: See `pml.token_loss.token_losses`.
        """
        labels = batch["labels"][:, 1:]
        if labels.shape[1] == 0:
            labels = torch.full_like(batch["labels"], IGNORE_INDEX)
        supervised = labels != IGNORE_INDEX
        targets = labels[supervised]
        head = self.prefix.head
        if head is not None:
            hidden = self.prefix.final_hidden(batch)[supervised]
            scored = token_losses(hidden, head, targets, gradient_above)
        else:
            # A head that caps or scales its logits is asked as a whole.
            logits = self.model(input_ids=batch["input_ids"], use_cache=False).logits[:, : labels.shape[1]]
            logits = logits[supervised].float()
            losses = nn.functional.cross_entropy(logits, targets, reduction="none")
            own, other, rival = (t.squeeze(-1) for t in against_the_rest(logits.detach().clone(), targets[:, None]))
            scored = TokenLosses(losses, is_argmax(own - other, rival, targets), own - other, rival)
        return _by_target(scored, supervised, batch["example_id"])

    # Training --------------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        self.train()
        self._steps = self._total_steps() if self.weighting.scheduled else 0
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is not None:
            self.weighting.prepare(len(datamodule.corpus), self.device)
            self._maybe_compile([len(example) for example in datamodule.corpus.examples])

    def _maybe_compile(self, lengths: list[int]) -> None:
        endless = self.trainer.max_epochs == -1 and self.trainer.max_steps == -1
        batches = math.inf if endless else self._total_steps() * self.trainer.accumulate_grad_batches
        reason = reason_not_to_compile(self.compile_mode, batches, lengths, self.device)
        if reason is None:
            self.prefix.compile()
        log.info("the blocks above the adapter are %s", "compiled" if reason is None else f"not compiled: {reason}")

    def on_train_epoch_end(self) -> None:
        # What found no room is computed at every step, from blocks that have to stay.
        if not self.frozen_prefix.release or self.backbone.released or self.prefix.store.full:
            return
        # Every rank has its own cache; each frees what it no longer needs.
        loader: Any = self.trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
        keys = (key for batch in loader for key in content_keys(batch["input_ids"], batch["lengths"]))
        if all(key in self.prefix.store for key in keys):
            self.prefix.release()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        if self.weighting.scheduled:
            self.weighting.progress = min(1.0, self.trainer.global_step / self._steps)
        scores = self.score(batch, self.weighting.gradient_above)
        weights = self._fall_back(self.weighting.weights(scores), scores.mask)
        self._budget = weights.sum() if self._budget is None else self._budget + weights.sum()
        self.tokens_trained += batch["target_tokens"]
        seen = scores.detach()
        self.log("train/loss", weighted_mean(seen.losses, weights), batch_size=len(weights))
        # Lightning divides by the number of accumulated micro-batches; on_before_optimizer_step knows better.
        total = (weights * scores.losses).sum() * self.trainer.accumulate_grad_batches
        return {"loss": total, "scores": seen}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        assert self._budget is not None
        budget, ranks = self._budget, 1
        if several_ranks():
            ranks = dist.get_world_size()
            dist.all_reduce(budget)
        # Only a hard threshold can leave nothing to train on, so only it pays for looking at the number.
        if self.weighting.gradient_above is not None and budget.item() == 0:
            # AdamW would move on its momentum. Without gradients it leaves parameters and state alone; the budget is
            # the same on all ranks, so they agree.
            optimizer.zero_grad(set_to_none=True)
            self.skipped_steps += 1
        else:
            # DDP has averaged the gradients over the ranks.
            scale = ranks / budget.clamp(min=torch.finfo(budget.dtype).tiny)
            for parameter in adapter_parameters(self.model).values():
                if parameter.grad is not None:
                    parameter.grad.mul_(scale)
        self._budget = self._any_active = None

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = torch.optim.AdamW(
            adapter_parameters(self.model).values(),
            lr=self.learning_rate,
            betas=self.betas,
            weight_decay=self.weight_decay,
        )
        total = self._total_steps() if self.schedule == "linear" else 0

        def factor(step: int) -> float:
            if step < self.warmup_steps:
                return (step + 1) / (self.warmup_steps + 1)
            return max(0.0, (total - step) / max(1, total - self.warmup_steps)) if total else 1.0

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        trainer = self.trainer
        if trainer.max_epochs == -1 and trainer.max_steps == -1:
            raise InputError(
                "schedule linear and a weighting that changes over the run need an end; set trainer.max_epochs or "
                "trainer.max_steps"
            )
        steps = int(trainer.estimated_stepping_batches)
        if trainer.max_steps > 0 or self.curriculum is None:
            return steps
        # Lightning multiplies the first epoch's batches; a curriculum has more of them later.
        loader: Any = trainer.train_dataloader
        epochs, per_step = range(trainer.max_epochs or 0), trainer.accumulate_grad_batches
        return sum(-(-loader.sampler.batches_in_epoch(epoch) // per_step) for epoch in epochs)

    def _fall_back(self, weights: Tensor, mask: Tensor) -> Tensor:
        """Weight 1 for all tokens while no token of the global batch has weight, where that is asked for.

        The micro-batches of a global batch come one by one. Until one brings a token with weight, all train on the
        plain mean; when one does, what the earlier ones have left in the gradients is dropped.
        """
        if self.weighting.when_memorized != "uniform":
            return weights
        active = (weights > 0).any().float()
        if several_ranks():
            dist.all_reduce(active, op=dist.ReduceOp.MAX)
        if self._any_active is not None:
            before = self._any_active
            active = torch.maximum(active, before)
            keep = 1 - (active - before)
            assert self._budget is not None
            self._budget = self._budget * keep
            for parameter in adapter_parameters(self.model).values():
                if parameter.grad is not None:
                    parameter.grad.mul_(keep)
        self._any_active = active
        return torch.where(active > 0, weights, mask.to(weights.dtype))

    # Evaluation ------------------------------------------------------------------------------------------------------

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        return {"scores": self.score(batch)}

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        return self.validation_step(batch, batch_idx)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> TokenScores:
        return self.score(batch)

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The adapter alone; the frozen backbone is found by its name again."""
        if self._peft_model is None:
            return {}
        return {name: tensor.detach() for name, tensor in adapter_state(self.model).items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take an adapter back.

        Raises:
            InputError: If a weight of the adapter is missing, unknown, or of another shape.
        """
        self.configure_model()
        own = adapter_state(self.model)
        if missing := sorted(own.keys() - state_dict.keys()):
            raise InputError(f"checkpoint lacks {len(missing)} adapter weights, such as {missing[0]}")
        if unknown := sorted(state_dict.keys() - own.keys()):
            raise InputError(f"checkpoint has {len(unknown)} weights that this adapter has not, such as {unknown[0]}")
        with torch.no_grad():
            for name, parameter in own.items():
                if parameter.shape != state_dict[name].shape:
                    raise InputError(
                        f"checkpoint: {name} has shape {tuple(state_dict[name].shape)}; this adapter's is "
                        f"{tuple(parameter.shape)}; set adapter.rank, block and guard to what it was trained with"
                    )
                parameter.copy_(state_dict[name])
        return torch.nn.modules.module._IncompatibleKeys([], [])

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Load a module of the method that a checkpoint is of, this class or one derived from it.

        Args:
            checkpoint_path: The file.
            *args: See `LightningModule.load_from_checkpoint`.
            **kwargs: See there; they override what the module was made with.

        Raises:
            InputError: If no such method is known here.
        """
        state = torch.load(checkpoint_path, map_location="cpu", weights_only=True).get("pml") or {}
        method, known = state.get("method", cls.__name__), {c.__name__: c for c in _with_derived(cls)}
        if method not in known:
            raise InputError(f"{checkpoint_path} is of the method {method}; expected one of {', '.join(sorted(known))}")
        loaded: Any = super(Memorization, known[method]).load_from_checkpoint(checkpoint_path, *args, **kwargs)
        return loaded

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["pml"] = {
            "method": type(self).__name__,
            "weighting": self.weighting.state_dict(),
            "tokens_trained": self.tokens_trained,
            "skipped_steps": self.skipped_steps,
            "corpus_hash": self._corpus_hash(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if state := checkpoint.get("pml"):
            self.weighting.load_state_dict(state["weighting"])
            self.tokens_trained, self.skipped_steps = state["tokens_trained"], state["skipped_steps"]
            before, now = state.get("corpus_hash"), self._corpus_hash()
            if self._trainer is not None and self._trainer.training and before and now and before != now:
                raise InputError(
                    f"this checkpoint is of a fit to other data: its corpus has the hash {before[:12]}, the one given "
                    f"{now[:12]}; go on with the data that it was made with, or start anew"
                )

    def _corpus_hash(self) -> str | None:
        datamodule: Any = getattr(self._trainer, "datamodule", None)
        return datamodule.corpus.content_hash if hasattr(datamodule, "corpus") else None


class SFT(Memorization):
    """Supervised fine-tuning: every target token has the same weight."""

    method = "sft"


class MemFT(Memorization):
    """MemFT: the budget goes to target tokens that are not memorised yet (Eq. 8-10).

    Args:
        weighting: How the budget is shared among tokens; None is `OnlyThreshold` at p = 0.5.
        curriculum: How it is shared among examples, epoch by epoch; None trains on all of them from the start.
        **kwargs: See `Memorization`.
    """

    method = "memft"

    def __init__(
        self,
        weighting: Weighting | None = None,
        curriculum: PrefixRatio | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.weighting = from_plain(weighting, Weighting) or OnlyThreshold()
        self.curriculum = from_plain(curriculum, PrefixRatio)
        self._keep_plain_hyperparameters()


def _with_derived(method: type[Memorization]) -> Iterator[type[Memorization]]:
    yield method
    for derived in method.__subclasses__():
        yield from _with_derived(derived)


KNOWN_ARGUMENTS = {name for method in (Memorization, MemFT) for name in inspect.signature(method.__init__).parameters}
"""Arguments of what is here; a subclass may have more."""


def _by_target(scored: TokenLosses, supervised: Tensor, example_id: Tensor) -> TokenScores:
    """Lay the scores of N supervised tokens out as (B, L), column t for the t-th target token of a row."""
    lengths = supervised.sum(dim=1)
    mask = torch.arange(supervised.shape[1], device=lengths.device) < lengths[:, None]

    def table(values: Tensor) -> Tensor:
        return values.new_zeros(mask.shape).masked_scatter(mask, values)

    losses, correct, margin, rival = map(table, scored)
    return TokenScores(losses, correct, mask, example_id, margin, rival)
