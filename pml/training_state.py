"""The module's part of a checkpoint: the adapter, and the state from which training resumes exactly."""

import random
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from pml.adapter import adapter_parameters
from pml.cpu import tune_cpu
from pml.errors import InputError
from pml.ranks import from_all_ranks, is_first_rank, summed_over_ranks
from pml.same_model import refuse_other_settings
from pml.schedule import used_batches

if TYPE_CHECKING:
    from pml.modules import Memorization

__all__ = [
    "copy_adapter",
    "corpus_hash",
    "method_of",
    "restore",
    "resume_training",
    "seed_rank",
    "training_state",
]


def training_state(module: "Memorization") -> dict[str, Any]:
    """State from which training resumes exactly, as tensors and plain Python only. All ranks must call it.

    It includes the random generators of every rank, for dropout, and between two micro-batches of a step the gradients
    so far. Only the first rank's gradients are kept, so with several ranks, resuming is exact only between steps.
    """
    parameters = adapter_parameters(module.model)
    gradients = {n: p.grad.detach().clone() for n, p in parameters.items() if p.grad is not None}
    return {
        "method": type(module).__name__,
        "weighting": module.weighting.state_dict(),
        "tokens_trained": int(summed_over_ranks(torch.tensor(module.tokens_trained, device=module.device))),
        "skipped_steps": module.skipped_steps,
        "resumed": module.resumed,
        "corpus_hash": corpus_hash(module),
        "backbone_hash": module.backbone.content_hash,
        "seed": module.seed,
        "generators": from_all_ranks(_generators(module.device)),
        "global_batch": module.global_batch.state_dict(),
        "gradients": gradients if module.global_batch.is_open else {},
        "batches": _position(module),
        "onednn": module.cpu_choice.onednn if module.cpu_choice is not None else None,
    }


def seed_rank(rank: int) -> None:
    """Give each rank its own dropout masks; the first rank draws the same ones as a single process."""
    if rank > 0:
        torch.manual_seed((torch.initial_seed() + rank) % 2**63)


def restore(module: "Memorization", state: Mapping[str, Any], made_with: Mapping[str, Any]) -> None:
    """Restore a module's counts and weighting; if training is to resume, `resume_training` restores the rest.

    Args:
        module: The module, which may have no trainer.
        state: What `training_state` returned, possibly in an older version.
        made_with: Hyperparameters in the checkpoint.

    Raises:
        InputError: If training would resume with other settings, on another corpus, or on other frozen weights.
    """
    is_training = module._trainer is not None and module._trainer.training
    if is_training:
        _refuse_other_method(module, state)
        refuse_other_settings(module.hparams, made_with)
        _refuse_other_data(module, state)
    module.weighting.load_state_dict(state["weighting"])
    module.tokens_trained, module._skipped = _own_share(state["tokens_trained"]), state["skipped_steps"]
    module.resumed = state.get("resumed", 0)
    if is_training:
        if module.cpu_choice is not None:  # a new timing might choose another product, which rounds differently
            module.cpu_choice = tune_cpu(module.cpu_config, state.get("onednn"))
        module.resumed += 1
        module.resume_state = dict(state)
        module.seed = state.get("seed", module.seed)  # the KL penalty orders its passages by it


def resume_training(module: "Memorization") -> None:
    """Restore generators, gradients and the position in the epoch, just before training starts or resumes.

    Args:
        module: The module, on its device; its `resume_state` is what `training_state` returned, possibly in an older
            version, and empty for a new fit. It is empty afterwards.
    """
    state, module.resume_state = module.resume_state, {}
    _follow_schedules(module.trainer)
    if "global_batch" in state:
        module.global_batch.load_state_dict(state["global_batch"], module.device)
    for name, gradient in state.get("gradients", {}).items():
        adapter_parameters(module.model)[name].grad = gradient.to(module.device)
    loader: Any = module.trainer.train_dataloader
    if state.get("batches") and hasattr(loader, "load_state_dict"):
        # Lightning loses this state if the length of the fit was computed before it restores its loops.
        loader.load_state_dict(state["batches"])
        _enter_epoch(module.trainer, state["batches"])
    generators = state.get("generators", [])
    # If there are more ranks than before, the additional ones keep the seeds from `seed_rank`.
    if module.global_rank < len(generators):
        _restore_generators(generators[module.global_rank], module.device)


def _enter_epoch(trainer: Any, position: Mapping[str, Any]) -> None:
    """Make Lightning enter the epoch that a checkpoint was saved in, or the next one if that epoch had ended.

    On its own, Lightning with `max_steps` enters a finished epoch again, for the first batch of the next one; and it
    takes an epoch for finished if the fit took its last step in it.
    """
    loop = trainer.fit_loop
    progress = loop.epoch_progress.current
    counted_as_done = progress.processed == progress.started == progress.ready
    if not counted_as_done:
        return
    sampler: Any = trainer.train_dataloader.sampler
    batches = position.get("of", sampler.batches_in_epoch(position["epoch"]))
    if position["batches"] < used_batches(trainer, batches):
        _reopen_epoch(loop)
    else:
        _begin_next_epoch(loop)


def _reopen_epoch(loop: Any) -> None:
    """Go on within an epoch that counts as done because the fit took its last step in it."""
    progress, total = loop.epoch_progress.current, loop.epoch_progress.total
    loop._restarting = loop.epoch_loop._restarting = True
    progress.processed, total.processed = progress.processed - 1, total.processed - 1
    progress.completed, total.completed = progress.processed, total.processed
    loop.update_restart_stage()


def _begin_next_epoch(loop: Any) -> None:
    """Leave the mode in which Lightning would enter the finished epoch again."""
    progress, total = loop.epoch_progress.current, loop.epoch_progress.total
    loop._restarting = loop.epoch_loop.restarting = False
    loop.reset_restart_stage()
    progress.completed, total.completed = progress.processed, total.processed


def _follow_schedules(trainer: Any) -> None:
    """Set the learning rate of the next step from the current schedule, since a resumed fit may run for longer."""
    for config in trainer.lr_scheduler_configs:
        scheduler = config.scheduler
        if isinstance(scheduler, LambdaLR):
            rates = zip(scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
            for group, base, factor in rates:
                group["lr"] = base * factor(scheduler.last_epoch)


def _position(module: "Memorization") -> dict[str, Any]:
    """Position of the training batches in the epoch; empty if the loader cannot tell."""
    loader: Any = module._trainer.train_dataloader if module._trainer is not None else None
    return loader.state_dict() if hasattr(loader, "state_dict") else {}


def _own_share(total: int) -> int:
    """Assign a sum over ranks to the first rank, so that summing again gives the same total."""
    return total if is_first_rank() else 0


def corpus_hash(module: "Memorization") -> str | None:
    """Hash of the corpus that a module is trained on; None if there is none yet."""
    datamodule: Any = getattr(module._trainer, "datamodule", None)
    return datamodule.corpus.content_hash if hasattr(datamodule, "corpus") else None


def _refuse_other_method(module: "Memorization", state: Mapping[str, Any]) -> None:
    """Refuse to resume with another method.

    Raises:
        InputError: If the module's class is not that of the checkpoint.
    """
    before, now = state.get("method"), type(module).__name__
    if before and before != now:
        raise InputError(f"this checkpoint is of the method {before}, and the module is {now}; go on with {before}")


def _refuse_other_data(module: "Memorization", state: Mapping[str, Any]) -> None:
    """Refuse to resume on another corpus or on other frozen weights.

    Raises:
        InputError: If they are not those that the checkpoint was trained on.
    """
    before, now = state.get("corpus_hash"), corpus_hash(module)
    if before and now and before != now:
        raise InputError(
            f"this checkpoint is of a fit to other data: its corpus has the hash {before[:12]}, the given corpus "
            f"{now[:12]}; go on with the data that it was made with, or start anew"
        )
    before, now = state.get("backbone_hash"), module.backbone.content_hash
    if before and before != now:
        raise InputError(
            f"this checkpoint is of a fit on other weights: its backbone has the hash {before[:12]}, "
            f"{module.backbone.name} now {now[:12]}; go on with the weights that it was made with, or start anew"
        )


def method_of(path: Any, base: "type[Memorization]") -> "type[Memorization]":
    """The class that wrote a checkpoint file: `base`, or one derived from it.

    Raises:
        InputError: If no class of that name has been imported.
    """
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    method = (checkpoint.get("pml") or {}).get("method", base.__name__)
    known = list(_with_derived(base))
    found = [one for one in known if one.__name__ == method]
    if not found:
        names = ", ".join(sorted({one.__name__ for one in known}))
        raise InputError(f"{path} was written by the method {method}; expected one of {names}")
    # Classes of two modules may have one name.
    named = checkpoint.get("hyper_parameters", {}).get("_class_path")
    return next((one for one in found if f"{one.__module__}.{one.__qualname__}" == named), found[-1])


def _with_derived(method: "type[Memorization]") -> "Iterator[type[Memorization]]":
    yield method
    for derived in method.__subclasses__():
        yield from _with_derived(derived)


def copy_adapter(own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Copy saved weights into an adapter.

    Args:
        own: The adapter's tensors by name, from `pml.adapter.adapter_state`.
        saved: Saved tensors by name.

    Raises:
        InputError: If a weight is missing, unknown, or of another shape.
    """
    if missing := sorted(own.keys() - saved.keys()):
        raise InputError(f"checkpoint lacks {len(missing)} adapter weights, such as {missing[0]}")
    if unknown := sorted(saved.keys() - own.keys()):
        raise InputError(f"checkpoint has {len(unknown)} weights that this adapter lacks, such as {unknown[0]}")
    with torch.no_grad():
        for name, parameter in own.items():
            if parameter.shape != saved[name].shape:
                raise InputError(
                    f"checkpoint: {name} has shape {tuple(saved[name].shape)}; this adapter's is "
                    f"{tuple(parameter.shape)}; set adapter.rank, block and guard to what it was trained with"
                )
            parameter.copy_(saved[name])


def _generators(device: torch.device) -> dict[str, Any]:
    """States of all random generators that training may use, as tensors and plain Python."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _restore_generators(states: Mapping[str, Any], device: torch.device) -> None:
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
