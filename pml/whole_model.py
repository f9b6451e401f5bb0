"""Running a whole backbone: whether it runs at all, whether it is causal, and how it computes its logits."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import masking_utils

from pml.backbone import Backbone
from pml.cpu import attention
from pml.cut_trial import FAILURES, deterministic_eval
from pml.errors import InputError, not_finite

__all__ = ["one_sequence_a_row", "plain_head", "run_decoder"]

SHORT = 3
"""Tokens in the shorter rows that a model is tested on."""

PROBE_LOGIT = 1000.0
"""Magnitude of the logits that replace a head's, larger than any cap lets through."""


def run_decoder(decoder: Callable[..., Any], **inputs: Tensor) -> Tensor:
    """Final hidden states (B, S, d) of a decoder, from `input_ids` or `inputs_embeds`."""
    first = next(iter(inputs.values()))
    with attention(first.shape[1], first.device), one_sequence_a_row():
        return _states(decoder(**inputs, use_cache=False))


@contextmanager
def one_sequence_a_row() -> Iterator[None]:
    """Tell transformers that, within this context, no row of a batch packs several sequences.

    Otherwise it checks positions at every pass, which waits for the device. While it is compiled it cannot inspect
    them and builds a full mask, which rules out fused attention.
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
    """The LM head if logits are exactly its output for the final hidden states; else None.

    A model may cap, scale or truncate logits after the head, or scale states before it. Comparing within a tolerance
    would miss a cap on small logits. So the head's output is replaced by known, large logits, which must come out
    unchanged, and the head's input must equal the final states bit for bit.

    Raises:
        InputError: If the model does not run here, an adapter on it would get no gradient, its logits are not finite,
            or it is not causal.
    """
    who = f"backbone {backbone.name}: {type(backbone.model).__name__}"
    trained = any(parameter.requires_grad for parameter in backbone.model.parameters())
    probe = _probe(backbone)
    with deterministic_eval(backbone.model), attention(probe.shape[1], probe.device):
        try:
            with _known_logits(backbone) as seen, torch.set_grad_enabled(trained):
                output = backbone.model(input_ids=probe, use_cache=False).logits
            head = _if_plain(backbone, seen, output)
            logits, shorter = (output, None) if head is None else (seen.logits[0], _head_of_short(backbone, head))
            if shorter is None:
                # Run the model without hooks, on all tokens and on fewer.
                with torch.set_grad_enabled(trained):
                    logits = backbone.model(input_ids=probe, use_cache=False).logits
                head, shorter = None, backbone.model(input_ids=probe[:, :SHORT], use_cache=False).logits
        # Models fail in many ways: a kernel package or another input is missing, or a shape is not supported.
        except Exception as error:
            raise InputError(
                f"{who} does not run here on token ids alone ({type(error).__name__}: {_one_line(error)}); "
                "install what it asks for, or use another backbone"
            ) from error
    if trained and not logits.requires_grad:
        raise InputError(
            f"{who} hides its blocks from autograd, so an adapter in them gets no gradient; use another backbone"
        )
    logits = logits.detach()
    if not logits.isfinite().all():
        raise not_finite(backbone.name, "logits", backbone.model.dtype)
    # The rows differ only in their last token, so the kernels are the same; but it may go to another expert and change
    # how other tokens there are rounded. A shorter row may use other kernels throughout, so it gets more tolerance.
    one, other = logits[:, :-1]
    # Written so that a NaN is refused too.
    if not (_change(one, other) <= 0.05 and _change(logits[:, :SHORT], shorter) <= 0.2):
        raise InputError(
            f"{who} changes a token's logits when later tokens change; expected a causal model "
            "(for a model like BERT, set is_decoder: true in config.json)"
        )
    return head


@dataclass
class _Seen:
    """Tensors seen in one pass: the decoder's final states, and the input and output of the head."""

    states: list[Tensor] = field(default_factory=list)
    given: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)


@contextmanager
def _known_logits(backbone: Backbone) -> Iterator[_Seen]:
    """Replace the output of a linear head by known, large logits within this context."""
    seen = _Seen()

    def after_decoder(_: nn.Module, __: Any, output: Any) -> None:
        # The module that holds the blocks may be the whole model, whose output has no final states.
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
    return (
        torch.linspace(-PROBE_LOGIT, PROBE_LOGIT, logits.shape[-1], device=logits.device)
        .to(logits.dtype)
        .expand_as(logits)
    )


def _if_plain(backbone: Backbone, seen: _Seen, output: Tensor) -> nn.Linear | None:
    if not (len(seen.given) == len(seen.states) == 1):
        return None
    logits = seen.logits[0]
    same_logits = output.shape == logits.shape and torch.equal(output.float(), _known(logits).float())
    same_states = seen.given[0].dtype == seen.states[0].dtype and torch.equal(seen.given[0], seen.states[0])
    return cast(nn.Linear, backbone.model.get_output_embeddings()) if same_logits and same_states else None


def _head_of_short(backbone: Backbone, head: nn.Linear) -> Tensor | None:
    """Logits of fewer tokens by decoder and head alone; None if the decoder does not run on token ids alone."""
    try:
        return head(run_decoder(backbone.decoder, input_ids=_probe(backbone)[:, :SHORT]))
    except FAILURES:
        return None


def _change(logits: Tensor, others: Tensor) -> float:
    """Relative change at the median position, since an expert that gets other tokens may round a few differently."""
    logits, others = logits.float(), others.float()
    return float(((logits - others).norm(dim=-1) / others.norm(dim=-1)).median())


def _states(output: Any) -> Tensor:
    """Final hidden states from a decoder's output."""
    if isinstance(output, Tensor):
        return output
    return output[0] if isinstance(output, tuple) else output.last_hidden_state


def _probe(backbone: Backbone) -> Tensor:
    """Two rows of 5 token ids that differ only in the last."""
    ids = torch.arange(1, 6, device=backbone.model.device).repeat(2, 1)
    ids[1, -1] += 1
    return ids % backbone.vocab_size


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
