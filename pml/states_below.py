"""Frozen states: what the layers below a cut give for each example."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pml.backbone import Backbone
from pml.cut_trial import FAILURES
from pml.whole_model import run_decoder

__all__ = ["states_below", "streamed_states", "with_blocks"]

PORTION_BYTES = 2**28
"""Bytes of states that pass each streamed block together: more means fewer moves and more memory."""


def states_below(backbone: Backbone, block: int, mlp: nn.Module | None, input_ids: Tensor) -> tuple[Tensor, ...]:
    """Input (S, d) of a block for one row; with `mlp`, the block's output and the MLP's input, each (S, d).

    Args:
        backbone: The model, with its adapter on or off.
        block: Index of the block.
        mlp: The adapted MLP of the block if the cut is after the block, else None.
        input_ids: Token ids (1, S).
    """
    return _kept(_run(backbone, slice(0, block + 1), mlp, input_ids=input_ids), mlp)


def streamed_states(
    backbone: Backbone, block: int, mlp: nn.Module | None, rows: Sequence[Tensor]
) -> Iterator[tuple[Tensor, ...]]:
    """Yield `states_below` of many rows, moving streamed blocks once per portion instead of once per row.

    A decoder may do more between its blocks than pass states on. So the longest row, which would show most of that,
    also runs through all blocks at once; if its states differ, all rows run that way. So do one or two rows, for which
    that check would cost more moves than it saves.
    """
    few = backbone.streamed is None or len(rows) < 3
    if few or not _are_alike(backbone, block, mlp, max(rows, key=lambda row: row.shape[1])):
        yield from (states_below(backbone, block, mlp, row) for row in rows)
        return
    portion: list[Tensor] = []
    tokens, most = 0, PORTION_BYTES / (backbone.hidden_size * backbone.model.dtype.itemsize)
    for row in rows:
        portion.append(row)
        tokens += row.shape[1]
        if tokens >= most:
            yield from _block_by_block(backbone, block, mlp, portion)
            portion, tokens = [], 0
    if portion:
        yield from _block_by_block(backbone, block, mlp, portion)


def _are_alike(backbone: Backbone, block: int, mlp: nn.Module | None, row: Tensor) -> bool:
    try:
        (alone,) = _block_by_block(backbone, block, mlp, [row])
    except FAILURES:
        return False
    return all(map(torch.equal, alone, states_below(backbone, block, mlp, row)))


def _block_by_block(
    backbone: Backbone, block: int, mlp: nn.Module | None, rows: Sequence[Tensor]
) -> Iterator[tuple[Tensor, ...]]:
    assert backbone.streamed is not None
    inputs = [{"input_ids": row} for row in rows]
    for number in range(block):
        with backbone.streamed.resident(number):
            inputs = [
                {"inputs_embeds": _run(backbone, slice(number, number + 1), None, **given)["out"]} for given in inputs
            ]
    for given in inputs:
        yield _kept(_run(backbone, slice(block, block + 1), mlp, **given), mlp)


def _kept(caught: dict[str, Tensor], mlp: nn.Module | None) -> tuple[Tensor, ...]:
    kept = (caught["in"],) if mlp is None else (caught["out"], caught["mlp"])
    return tuple(states[0].clone() for states in kept)


def _run(backbone: Backbone, blocks: slice, mlp: nn.Module | None, **inputs: Tensor) -> dict[str, Tensor]:
    """Input and output (1, S, d) of the last of some blocks, and the input of its MLP if given."""
    last = backbone.blocks[blocks.stop - 1]
    caught: dict[str, Tensor] = {}

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught["in"] = args[0] if args else kwargs["hidden_states"]

    def after(_: nn.Module, __: Any, output: Any) -> None:
        caught["out"] = output if isinstance(output, Tensor) else output[0]

    def into_mlp(_: nn.Module, args: tuple[Any, ...]) -> None:
        caught["mlp"] = args[0]

    hooks = [last.register_forward_pre_hook(before, with_kwargs=True), last.register_forward_hook(after)]
    if mlp is not None:
        hooks.append(mlp.register_forward_pre_hook(into_mlp))
    try:
        run_decoder(with_blocks(backbone, blocks), **inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return caught


def with_blocks(backbone: Backbone, blocks: slice) -> nn.Module:
    """Shallow copy of the decoder that shares its modules but has only some of its blocks."""
    decoder: Any = copy.copy(backbone.decoder)
    kept = nn.ModuleList(backbone.blocks[blocks])
    decoder._modules = {**decoder._modules, backbone.blocks_path.rsplit(".", 1)[-1]: kept}
    config = copy.copy(decoder.config)
    # Decoders look up a block's kind by its index in a list, so the lists are cut too. Written past the configuration's
    # checks, since the result need not describe a model that could be built.
    listed = {name: value for name, value in vars(config).items() if isinstance(value, list | tuple)}
    vars(config).update({name: value[blocks] for name, value in listed.items() if len(value) == len(backbone.blocks)})
    vars(config)["num_hidden_layers"] = len(kept)
    decoder.config = config
    return decoder
