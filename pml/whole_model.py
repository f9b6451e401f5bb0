"""Running a backbone whole: whether it runs at all, whether it is causal, and what its logits are made of."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import masking_utils

from pml.backbone import Backbone
from pml.cpu import attention
from pml.cut_trial import FAILURES, plainly
from pml.errors import InputError

__all__ = ["one_sequence_a_row", "plain_head", "run_decoder"]

SHORT = 3
"""Tokens in the shorter rows on which a model is tried."""

LOUD = 1000.0
"""Size of the logits that a head is made to give, larger than any cap lets through."""


def run_decoder(decoder: Callable[..., Any], **inputs: Tensor) -> Tensor:
    """Final hidden states (B, S, d) of a decoder, from `input_ids` or `inputs_embeds`."""
    first = next(iter(inputs.values()))
    with attention(first.shape[1], first.device), one_sequence_a_row():
        return _states(decoder(**inputs, use_cache=False))


@contextmanager
def one_sequence_a_row() -> Iterator[None]:
    """Tell transformers for a while that no row of a batch holds several sequences, packed one behind the other.

    To find out, it looks at positions at every pass, which waits for the device; and while it is being compiled, where
    it cannot look, it makes a full mask, which takes the fused attention away.
    """
    asked = getattr(masking_utils, "find_packed_sequence_indices", None)
    if asked is None:
        yield
        return
    masking_utils.find_packed_sequence_indices = _never_packed
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = asked


def _never_packed(position_ids: Tensor) -> None:
    return None


def plain_head(backbone: Backbone) -> nn.Linear | None:
    """The LM head, if logits are its product with the final hidden states and nothing else; else None.

    Logits may be capped, scaled or cut off after the head, and states scaled before it. A tolerance would let a cap on
    small logits through. So the head is made to give logits that are known and large, which have to come out as they
    are, and what it is given has to be the states, bit for bit.

    Raises:
        InputError: If the model does not run here, if an adapter on it would get no gradient, or if it is not causal.
    """
    who = f"backbone {backbone.name}: {type(backbone.model).__name__}"
    trained = any(parameter.requires_grad for parameter in backbone.model.parameters())
    probe = _probe(backbone)
    with plainly(backbone.model), attention(probe.shape[1], probe.device):
        try:
            with _loud(backbone) as seen, torch.set_grad_enabled(trained):
                output = backbone.model(input_ids=probe, use_cache=False).logits
            head = _if_plain(backbone, seen, output)
            logits, shorter = (output, None) if head is None else (seen.logits[0], _head_of_short(backbone, head))
            if shorter is None:
                # Without anything in its way, and on fewer tokens.
                with torch.set_grad_enabled(trained):
                    logits = backbone.model(input_ids=probe, use_cache=False).logits
                head, shorter = None, backbone.model(input_ids=probe[:, :SHORT], use_cache=False).logits
        # Models fail in many ways: a package with kernels is missing, an input is expected, a shape is not supported.
        except Exception as error:
            raise InputError(
                f"{who} does not run here on token ids alone ({type(error).__name__}: {_one_line(error)}); "
                "install what it asks for, or take another backbone"
            ) from error
    if trained and not logits.requires_grad:
        raise InputError(
            f"{who} hides its blocks from autograd, so an adapter in them gets no gradient; take another backbone"
        )
    logits = logits.detach()
    # The rows differ in their last token, which takes no other kernels, but may send it to another expert, where others
    # are then rounded otherwise. A shorter row may take other kernels throughout.
    one, other = logits[:, :-1]
    if _change(one, other) > 0.05 or _change(logits[:, :SHORT], shorter) > 0.2:
        raise InputError(
            f"{who} gives a token other logits when later tokens change; expected a causal model "
            "(of the BERT kind, is_decoder: true in config.json makes it one)"
        )
    return head


@dataclass
class _Seen:
    """What went through a model: final states of its decoder, what its head was given and gave."""

    states: list[Tensor] = field(default_factory=list)
    given: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)


@contextmanager
def _loud(backbone: Backbone) -> Iterator[_Seen]:
    """Put known, large logits in the place of what a linear head gives."""
    seen = _Seen()

    def after_decoder(_: nn.Module, __: Any, output: Any) -> None:
        # What holds the blocks may be the whole model, which gives logits.
        with suppress(AttributeError):
            seen.states.append(_states(output))

    def after_head(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.given.append(args[0])
        seen.logits.append(output)
        return _known(output)

    head = backbone.model.get_output_embeddings()
    hooks = [backbone.decoder.register_forward_hook(after_decoder)]
    if isinstance(head, nn.Linear):
        hooks.append(head.register_forward_hook(after_head))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _known(logits: Tensor) -> Tensor:
    return torch.linspace(-LOUD, LOUD, logits.shape[-1], device=logits.device).to(logits.dtype).expand_as(logits)


def _if_plain(backbone: Backbone, seen: _Seen, output: Tensor) -> nn.Linear | None:
    if not (len(seen.given) == len(seen.states) == 1):
        return None
    logits = seen.logits[0]
    same_logits = output.shape == logits.shape and torch.equal(output.float(), _known(logits).float())
    same_states = seen.given[0].dtype == seen.states[0].dtype and torch.equal(seen.given[0], seen.states[0])
    return cast(nn.Linear, backbone.model.get_output_embeddings()) if same_logits and same_states else None


def _head_of_short(backbone: Backbone, head: nn.Linear) -> Tensor | None:
    """Logits of fewer tokens by decoder and head alone; None where what holds the blocks does not take token ids."""
    try:
        return head(run_decoder(backbone.decoder, input_ids=_probe(backbone)[:, :SHORT]))
    except FAILURES:
        return None


def _change(logits: Tensor, others: Tensor) -> float:
    """Relative change at the median position: an expert that gets other tokens too may round a few differently."""
    logits, others = logits.float(), others.float()
    return float(((logits - others).norm(dim=-1) / others.norm(dim=-1)).median())


def _states(output: Any) -> Tensor:
    """The final hidden states in what a decoder gives."""
    if isinstance(output, Tensor):
        return output
    return output[0] if isinstance(output, tuple) else output.last_hidden_state


def _probe(backbone: Backbone) -> Tensor:
    """Two rows of 5 token ids that differ in the last."""
    ids = torch.arange(1, 6, device=backbone.model.device).repeat(2, 1)
    ids[1, -1] += 1
    return ids % backbone.vocab_size


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
