"""The blocks above the adapter as CUDA graphs: the hundreds of kernels of a short step take one launch.

A GPU runs the kernels of a short step in less time than the host needs to launch them one by one. For one batch shape,
a graph records the launches of the forward pass and another those of the backward pass; both replay them at the same
addresses.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from pml.errors import first_line

__all__ = ["CapturedPasses", "Decoder", "Passes", "ReplayedDecoder"]

log = logging.getLogger(__name__)

PLAIN_PASSES = 2
"""Passes of a shape that run without a graph, so that rare shapes are never captured."""

MOST_GRAPHS = 8
"""Most shapes that are captured; each keeps its own memory for the activations of a pass."""

MOST_TOKENS = 2048
"""Tokens in a batch, padding included, above which running the kernels takes longer than launching them."""

TOLERANCE = 1e-3
"""Largest accepted difference of replayed states and gradients from plain ones, relative to the largest of them. They
may differ because libraries may choose other kernels during capture."""

Decoder = Callable[[Tensor, Mapping[str, Tensor]], Tensor]
"""Maps states (B, S, d) to final hidden states (B, S, d), with the given tensors replacing parameters by name."""


class Passes(Protocol):
    """A forward and a backward pass for inputs of one shape, which can be repeated."""

    def forward(self, states: Tensor) -> Tensor:
        """The output, in memory that the next call overwrites."""

    def backward(self, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients by the states (None if they need none; overwritten by the next call) and by each parameter."""


class CapturedPasses:
    """The kernels of a forward and a backward pass, in two CUDA graphs.

    Args:
        decoder: The decoder to capture, which must not read tensor values on the host.
        states: An example input on a CUDA device, with `requires_grad` set as in later calls.
        parameters: Parameters that need gradients; their memory must not move.

    Raises:
        RuntimeError: If the decoder cannot be captured.
    """

    def __init__(self, decoder: Decoder, states: Tensor, parameters: Mapping[str, Tensor]) -> None:
        self._states = states.detach().clone().requires_grad_(states.requires_grad)
        self._shapes = [parameter.shape for parameter in parameters.values()]
        # Autograd hands over a parameter's gradient on the stream that first used the parameter, and a capture must not
        # wait for another stream. So gradients are taken by fresh tensors that share the parameters' memory.
        aliases = {name: parameter.detach().requires_grad_() for name, parameter in parameters.items()}
        wanted = [*([self._states] if states.requires_grad else []), *aliases.values()]
        stream = torch.cuda.Stream(states.device)
        stream.wait_stream(torch.cuda.current_stream(states.device))
        with torch.cuda.stream(stream):
            # Warm up: libraries create handles and workspaces at the first calls, which a graph must not capture.
            for _ in range(3):
                out = decoder(self._states, aliases)
                torch.autograd.grad(out, wanted, torch.zeros_like(out))
            del out
        torch.cuda.current_stream(states.device).wait_stream(stream)
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        try:
            self._capture(decoder, aliases, wanted)
        except RuntimeError:
            # Reset PyTorch's generator, which otherwise still believes it is being captured and refuses to draw.
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            generator.graphsafe_set_state(generator.clone_state())
            raise

    def _capture(self, decoder: Decoder, aliases: Mapping[str, Tensor], wanted: list[Tensor]) -> None:
        # thread_local: other threads, such as those of NCCL, may make calls that are forbidden during capture.
        with torch.cuda.graph(self._forward, capture_error_mode="thread_local"):
            out = decoder(self._states, aliases)
        self._gradient = torch.empty_like(out)
        with torch.cuda.graph(self._backward, pool=self._forward.pool(), capture_error_mode="thread_local"):
            gradients = list(torch.autograd.grad(out, wanted, self._gradient))
            self._by_states = gradients.pop(0) if self._states.requires_grad else None
            self._by_parameters = torch.cat([g.flatten() for g in gradients]) if gradients else None
        self._out = out.detach()

    def forward(self, states: Tensor) -> Tensor:
        with torch.no_grad():
            self._states.copy_(states)
        self._forward.replay()
        return self._out.detach()

    def backward(self, gradient: Tensor) -> tuple[Tensor | None, ...]:
        self._gradient.copy_(gradient)
        self._backward.replay()
        if self._by_parameters is None:
            return (self._by_states,)
        # Autograd may keep this memory as a parameter's gradient, and the next replay would overwrite it.
        flat = self._by_parameters.clone().split([shape.numel() for shape in self._shapes])
        return (self._by_states, *(part.view(shape) for part, shape in zip(flat, self._shapes, strict=True)))


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, passes: Passes, done: Callable[[], None], states: Tensor, *parameters: Tensor) -> Tensor:
        ctx.passes, ctx.done = passes, done
        return passes.forward(states)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.passes.backward(gradient)
        ctx.done()
        return None, None, *gradients


class ReplayedDecoder:
    """A decoder whose training passes are captured once their shape recurs, and replayed from then on.

    While the backward pass of a replay is outstanding, its shape runs without the graph: another replay would overwrite
    what that backward pass needs.

    Args:
        decoder: The decoder to run.
        parameters: The decoder's trained parameters by name.
        capture: Makes `Passes` from a decoder, an input and parameters.
    """

    def __init__(
        self,
        decoder: Decoder,
        parameters: Mapping[str, Tensor],
        capture: Callable[[Decoder, Tensor, Mapping[str, Tensor]], Passes] = CapturedPasses,
    ) -> None:
        self._decoder = decoder
        self._parameters = dict(parameters)
        self._capture = capture
        self._seen: Counter[tuple[Any, ...]] = Counter()
        self._passes: dict[tuple[Any, ...], Passes] = {}
        self._waiting: set[tuple[Any, ...]] = set()
        self._given_up = False

    def __call__(self, states: Tensor) -> Tensor:
        """Final hidden states (B, S, d), through which gradients flow."""
        shape = (*states.shape, states.dtype, states.requires_grad)
        if shape in self._passes and shape not in self._waiting:
            self._waiting.add(shape)
            return self._replay(shape, states)
        plain = self._decoder(states, {})
        self._seen[shape] += 1
        small_enough = states.shape[0] * states.shape[1] <= MOST_TOKENS
        come_back = self._seen[shape] == PLAIN_PASSES + 1
        if come_back and small_enough and len(self._passes) < MOST_GRAPHS and not self._given_up:
            self._try(shape, states, plain)
        return plain

    def _replay(self, shape: tuple[Any, ...], states: Tensor) -> Tensor:
        done = partial(self._waiting.discard, shape)
        replayed: Tensor = _Replay.apply(self._passes[shape], done, states, *self._parameters.values())
        return replayed

    def _try(self, shape: tuple[Any, ...], states: Tensor, plain: Tensor) -> None:
        """Capture a shape, unless that fails or the replay differs from the plain pass."""
        try:
            passes = self._capture(self._decoder, states, self._parameters)
        # A model may read a value from the device, which cannot be captured.
        except RuntimeError as failure:
            self._given_up = True
            log.info("the blocks above the adapter are not replayed as CUDA graphs: %s", first_line(failure))
            return
        error = self._difference(passes, states, plain)
        if error <= TOLERANCE:
            self._passes[shape] = passes
        else:
            self._given_up = True
            log.warning("a replayed step differs by %.1e of its size; the blocks run without CUDA graphs", error)

    def _difference(self, passes: Passes, states: Tensor, plain: Tensor) -> float:
        """Largest relative difference between a replay and a plain pass, over states and gradients."""
        wanted = [*([states] if states.requires_grad else []), *self._parameters.values()]
        gradient = plain.detach()
        expected = [gradient, *torch.autograd.grad(plain, wanted, gradient, retain_graph=True)]
        replayed = [passes.forward(states.detach()), *(g for g in passes.backward(gradient) if g is not None)]
        errors = [(a - b).abs().max() / b.abs().max().clamp(min=1e-30) for a, b in zip(replayed, expected, strict=True)]
        return float(torch.stack(errors).max())
