"""The LightningModule that writes a corpus into an adapter; `pml.modules` derives the methods from it."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pml.adapter import AdapterConfig, adapter_parameters, adapter_state, attach_adapter, detach_adapter, load_adapter
from pml.backbone import Backbone, backbones_are_shared, load_backbone
from pml.compiled import CompileMode, Compiling, check_compile_mode
from pml.cpu import CpuChoice, CpuConfig, tune_cpu
from pml.curriculum import PrefixRatio
from pml.fit_config import check_trainer
from pml.frozen_layers import FrozenLayers, content_keys, split_for, stream_below
from pml.global_batch import GlobalBatch
from pml.kl_penalty import KlPenalty, KlPenaltyConfig, micro_batch_index
from pml.optimizer import make_adamw, skip_step_without_weight, trained_by
from pml.plain import as_plain, from_plain
from pml.products import MatmulPrecision, check_matmul_precision, float32_products, highest_products
from pml.ranks import keep_buffers
from pml.schedule import OPTIMIZER_SETTINGS, check_optimizer, learning_rate_factor, total_steps
from pml.scoring import score_batch
from pml.state_store import CacheConfig
from pml.token_scores import TokenScores
from pml.training_state import copy_adapter, method_of, restore, resume_training, seed_rank, training_state
from pml.weighting import Uniform, Weighting

__all__ = ["Memorization"]


class Memorization(LightningModule):
    """Base class of all methods: a frozen backbone with one adapter, scored on target tokens only.

    The loss is sum(w L) / sum(w) over the global batch: all ranks and all accumulated micro-batches. Each micro-batch
    adds the gradient of sum(w L); the total is divided by the global sum(w) just before the optimiser step.

    Args:
        backbone: `smollm2-135m`, a folder, or a hub id.
        dtype: Floating-point type of the frozen weights: float32, bfloat16 or float16. The adapter is float32.
        adapter: The LoRA adapter.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: Weight decay of AdamW.
        betas: Averaging coefficients of AdamW.
        schedule: `linear` decays the learning rate to 0 over the run, `constant` keeps it.
        warmup_steps: Steps over which the learning rate rises to its peak.
        frozen_prefix: Whether to compute the frozen states below the adapter once per example, and where to keep them.
        cpu: Speed-ups allowed on a CPU, all at the same accuracy; see `pml.cpu`.
        matmul_precision: Precision of float32 matrix products in training steps, as named by
            `torch.set_float32_matmul_precision`: `high` and `medium` are faster on devices with hardware for them.
            Frozen states, measurements, certificates and decoding always use `highest`.
        compile: Whether to compile the blocks above the adapter; `auto` does so if the fit is long enough to pay off.
        cuda_graphs: On a GPU, replay short steps through the blocks above the adapter, if there is no dropout.
        kl_penalty: Penalty on how far training changes the model on ordinary text; None disables it.
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
        frozen_prefix: CacheConfig | None = None,
        cpu: CpuConfig | None = None,
        matmul_precision: MatmulPrecision = "highest",
        compile: CompileMode = "auto",
        cuda_graphs: bool = True,
        kl_penalty: KlPenaltyConfig | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        check_optimizer(learning_rate, weight_decay, betas, schedule, warmup_steps)
        check_matmul_precision(matmul_precision)
        check_compile_mode(compile)
        self.backbone_name = backbone
        self.dtype_name = dtype
        self.adapter = from_plain(adapter, AdapterConfig) or AdapterConfig()
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.betas = (betas[0], betas[1])
        self.schedule = schedule
        self.warmup_steps = warmup_steps
        self.frozen_prefix = from_plain(frozen_prefix, CacheConfig) or CacheConfig()
        self.cpu_config = from_plain(cpu, CpuConfig) or CpuConfig()
        self.cpu_choice: CpuChoice | None = None
        """Speed-ups chosen for this machine's CPU; None on other devices."""
        self.matmul_precision: MatmulPrecision = matmul_precision
        self.compile_mode = compile
        self.cuda_graphs = cuda_graphs
        self._compiling: Compiling | None = None
        self.kl_penalty = from_plain(kl_penalty, KlPenaltyConfig)
        self._penalty: KlPenalty | None = None
        self.seed = torch.initial_seed() if seed is None else seed
        self.weighting: Weighting = Uniform()
        self.curriculum: PrefixRatio | None = None
        self.tokens_trained = 0
        """Target tokens in this rank's training batches so far."""
        self._skipped: Tensor | int = 0
        self.resumed = 0
        """How often this fit was resumed from a checkpoint."""
        self.global_batch = GlobalBatch()
        self._keep_plain_hyperparameters()
        self._backbone: Backbone | None = None
        self._peft_model: PeftModel | None = None
        self._frozen_layers: FrozenLayers | None = None
        self.resume_state: dict[str, Any] = {}
        """State of a loaded checkpoint, until training resumes from it."""
        self.resume_folder: Path | None = None
        """Folder of the run that this fit resumes, whose unfinished results it may overwrite."""
        self._steps = 0

    @property
    def skipped_steps(self) -> int:
        """Optimiser steps skipped because every target token was above threshold. Reading it waits for the device."""
        return int(self._skipped)

    def settings(self) -> dict[str, Any]:
        """Method and optimiser settings as plain Python, for the record."""
        return {
            "weighting": as_plain(self.weighting),
            "curriculum": as_plain(self.curriculum),
            **{name: as_plain(getattr(self, name)) for name in OPTIMIZER_SETTINGS},
            "dropout": self.adapter.dropout,
            "alpha": self.adapter.alpha,
            **({"guard": vars(self.adapter.guard)} if self.adapter.guard is not None else {}),
            **({"kl_penalty": vars(self.kl_penalty)} if self.kl_penalty is not None else {}),
            **({"matmul_precision": self.matmul_precision} if self.matmul_precision != "highest" else {}),
            # Arguments that a user's own subclass adds.
            **{name: value for name, value in self.hparams.items() if name not in self._known_arguments()},
        }

    @classmethod
    def _known_arguments(cls) -> set[str]:
        """Names of the arguments that the classes of pml take; a user's subclass may take more."""
        ours = [c for c in cls.__mro__ if c.__module__.startswith("pml.")]
        return {name for c in ours for name in inspect.signature(c).parameters}

    def _keep_plain_hyperparameters(self) -> None:
        """Save the hyperparameters as plain Python: checkpoints are read with weights_only, which refuses classes."""
        self.save_hyperparameters(logger=False)
        self.hparams.update(as_plain(dict(self.hparams)))

    # The model -------------------------------------------------------------------------------------------------------

    @property
    def backbone(self) -> Backbone:
        """The frozen model and its tokenizer, loaded on first access."""
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
        """Longest sequence that the backbone takes, in tokens; None if it has no limit."""
        return self.backbone.max_positions

    @property
    def model(self) -> PeftModel:
        """The backbone with its adapter, as a PEFT model."""
        if self._peft_model is None:
            raise RuntimeError("the adapter is attached by configure_model(); call that first outside a Trainer")
        return self._peft_model

    @property
    def frozen_layers(self) -> FrozenLayers:
        """The adapted model, split at the cut on first access, on the device that the model is on at that time."""
        if self._frozen_layers is None:
            self._frozen_layers = split_for(self._trainer, self.backbone, self.model, self.frozen_prefix)
        return self._frozen_layers

    def setup(self, stage: str) -> None:
        if stage == "fit":  # A checkpoint is loaded after this.
            self.tokens_trained = self._skipped = self.resumed = 0
            self.global_batch = GlobalBatch(self.weighting.when_memorized == "uniform")
        check_trainer(self.trainer)
        highest_products()
        if self.trainer.strategy.root_device.type == "cpu":
            self.cpu_choice = tune_cpu(self.cpu_config)

    def configure_model(self) -> None:
        """Load the backbone and attach a fresh adapter; a second call does not attach another."""
        if self._peft_model is None:
            # Lightning sets its device as the default; there, the same seed would draw other numbers than on the CPU.
            with torch.device("cpu"):
                self._peft_model = attach_adapter(self.backbone, self.adapter, self.seed)
            self.train(self.training)
        # Loading a checkpoint during a fit also calls this, when the backbone is in place.
        if self._frozen_layers is None and self._trainer is not None and self._trainer.training:
            stream_below(self)

    def load_adapter(self, folder: str | Path) -> None:
        """Attach an adapter that `save_pretrained` wrote, instead of a fresh one.

        Raises:
            InputError: See `pml.adapter.load_adapter`.
        """
        self._peft_model = load_adapter(self.backbone, folder)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Disable the adapter inside the context, so that the model is the frozen backbone."""
        _ = self.frozen_layers  # the split is verified with the adapter enabled
        with self.model.disable_adapter():
            yield

    def release(self) -> None:
        """Detach the adapter, so that another module can use the backbone. This module cannot be used afterwards."""
        if self._peft_model is not None:
            detach_adapter(self._peft_model)
        self._peft_model = self._frozen_layers = self._backbone = None

    def cpu(self) -> Self:
        """Move to the CPU, as Lightning asks after a fit; a shared backbone stays on the device for the next module."""
        return self if backbones_are_shared() else super().cpu()

    def train(self, mode: bool = True) -> "Memorization":
        """Set the mode of the adapter's dropout; the backbone stays in evaluation mode."""
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
        # The batch is still on the host, so reading it does not wait for the device.
        return {
            **batch,
            "keys": content_keys(batch["input_ids"], batch["lengths"]),
            "target_tokens": batch["supervised"].shape[1],
        }

    def score(self, batch: dict[str, Any], gradient_above: float | None = None) -> TokenScores:
        """Loss of every target token in nats under teacher forcing, and whether it is the argmax.

        Args:
            batch: B examples from `pml.corpus.collate`, on the module's device.
            gradient_above: See `pml.token_loss.token_losses`.
        """
        return score_batch(self.frozen_layers, self.model, batch, gradient_above)

    # Training --------------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        self.train()
        self._steps = total_steps(self.trainer, self.curriculum) if self.weighting.scheduled else 0
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is not None:
            self.weighting.prepare(len(datamodule.corpus), self.device)
            if self.frozen_prefix.release:
                self.frozen_layers.keep(datamodule.corpus.examples)
            self._compiling = Compiling(self.compile_mode, self.trainer, self.frozen_layers, self.curriculum)

    def on_train_start(self) -> None:
        seed_rank(self.global_rank)
        keep_buffers(self.trainer.strategy.model)
        resume_training(self)
        if self.kl_penalty is not None:
            self._penalty = KlPenalty(self.kl_penalty, self.backbone, self.seed)
        self._release_frozen_layers()  # after the measurements that precede the first step
        self.frozen_layers.replay(self.cuda_graphs and not self.adapter.dropout)

    def on_train_end(self) -> None:
        self.frozen_layers.replay(False)  # frees the memory of the graphs

    def on_train_epoch_end(self) -> None:
        self._release_frozen_layers()

    def _release_frozen_layers(self) -> None:
        if self.frozen_prefix.release and not self.backbone.released:
            corpus = self.trainer.datamodule.corpus  # type: ignore[attr-defined]
            self.frozen_layers.keep_and_release([*corpus.examples, *(self._penalty.passages if self._penalty else ())])

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        if self._compiling is not None and self._compiling.is_due(self.trainer.global_step):
            self.frozen_layers.compile()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        if self.weighting.scheduled:
            self.weighting.progress = min(1.0, self.trainer.global_step / self._steps)
        with float32_products(self.matmul_precision):
            scores = self.score(batch, self.weighting.gradient_above)
        weights = self.weighting.weights(scores)
        weights = self.global_batch.add(weights, scores.losses, scores.mask, trained_by(self.trainer.optimizers[0]))
        self.tokens_trained += batch["target_tokens"]
        # Undo Lightning's division by the number of micro-batches: on_before_optimizer_step divides by the weights.
        total = (weights * scores.losses).sum()
        if self.kl_penalty is not None:
            # Closing the step divides by the sum of all weights, so each micro-batch counts by its own share of it.
            total = total + self.kl_penalty.weight * weights.sum() * self._kl_divergence(batch_idx)
        return {"loss": total * self.trainer.accumulate_grad_batches, "scores": scores.detach()}

    def _kl_divergence(self, batch_idx: int) -> Tensor:
        """KL divergence from the frozen model in nats per token, on the passages of this micro-batch and rank."""
        assert self._penalty is not None
        with float32_products(self.matmul_precision):
            divergence = self._penalty.loss(self.frozen_layers, self.model, micro_batch_index(self.trainer, batch_idx))
        self.log("train/kl_divergence", divergence.detach(), batch_size=1)
        return divergence

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        with float32_products(self.matmul_precision):
            super().backward(loss, *args, **kwargs)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        budget, loss = self.global_batch.close(trained_by(optimizer))
        # With uniform weights, no global batch is empty.
        if not isinstance(self.weighting, Uniform):
            self._skipped = self._skipped + skip_step_without_weight(optimizer, budget)
        self.log("train/loss", loss, on_step=True, on_epoch=False, batch_size=1)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        parameters = adapter_parameters(self.model).values()
        optimizer = make_adamw(parameters, self.learning_rate, self.betas, self.weight_decay)
        total = total_steps(self.trainer, self.curriculum) if self.schedule == "linear" else None
        factor = learning_rate_factor(self.warmup_steps, total)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # Evaluation ------------------------------------------------------------------------------------------------------

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        return {"scores": self.score(batch)}

    test_step = validation_step

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> TokenScores:
        return self.score(batch)

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The adapter alone; the frozen backbone is loaded again by its name."""
        if self._peft_model is None:
            return {}
        return {name: tensor.detach() for name, tensor in adapter_state(self.model).items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Restore the adapter from a checkpoint.

        Raises:
            InputError: If a weight of the adapter is missing, unknown, or of another shape.
        """
        self.configure_model()
        copy_adapter(adapter_state(self.model), state_dict)
        return torch.nn.modules.module._IncompatibleKeys([], [])

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Load a checkpoint as the method that wrote it: this class or one derived from it.

        Takes the arguments of `LightningModule.load_from_checkpoint`.

        Raises:
            InputError: If the checkpoint names an unknown method.
        """
        method = method_of(checkpoint_path, cls)
        loaded: Any = super(Memorization, method).load_from_checkpoint(checkpoint_path, *args, **kwargs)
        return loaded

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["pml"] = training_state(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if state := checkpoint.get("pml"):
            restore(self, state, checkpoint.get("hyper_parameters", {}))
