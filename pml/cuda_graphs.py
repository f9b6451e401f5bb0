"""The blocks above the adapter as CUDA graphs: hundreds of kernels of a short step, launched as one.

A GPU runs the kernels of a short step in less time than a host needs to launch them one by one. A graph keeps the
launches of one forward and one backward pass for one shape of batch, and replays them at the same addresses.
"""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["CapturedPasses", "Passes", "ReplayedDecoder"]

log = logging.getLogger(__name__)

PLAIN_PASSES = 2
"""Passes of a shape that run as they are, so that shapes that do not come back are never captured."""

MOST_GRAPHS = 8
"""Shapes that are captured; each keeps memory of its own for the activations of a pass."""

MOST_TOKENS = 2048
"""Tokens in a batch, padding included, above which the kernels run for longer than their launches take."""

TOLERANCE = 1e-4
"""Largest difference of replayed states from plain ones, relative to the largest state. The kernels are the same; the
library behind them may choose others while it is captured."""


class Passes(Protocol):
    """A forward and a backward pass of one shape, which can be had again and again."""

    def forward(self, states: Tensor) -> Tensor:
        """What comes out, in memory that the next call writes to."""

    def backward(self, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient by the states (None where they need none), in such memory too, and by each parameter."""


class CapturedPasses:
    """The kernels of a forward and a backward pass, in two CUDA graphs.

    Args:
        function: From states (B, S, d) on a CUDA device to states (B, S, d), without a look at any number.
        states: An example of its input, with a gradient wherever it will need one.
        parameters: What else a gradient is wanted for. They have to stay where they are.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], states: Tensor, parameters: Sequence[Tensor]) -> None:
        self._states = states.detach().clone().requires_grad_(states.requires_grad)
        wanted = [*([self._states] if states.requires_grad else []), *parameters]
        stream = torch.cuda.Stream(states.device)
        stream.wait_stream(torch.cuda.current_stream(states.device))
        with torch.cuda.stream(stream):
            # Libraries make their handles and workspaces at the first calls, which a graph must not hold.
            for _ in range(3):
                out = function(self._states)
                torch.autograd.grad(out, wanted, torch.zeros_like(out))
        torch.cuda.current_stream(states.device).wait_stream(stream)
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # Other threads, such as those of NCCL, may go on with what is not allowed in this one.
        with torch.cuda.graph(self._forward, capture_error_mode="thread_local"):
            out = function(self._states)
        self._gradient = torch.empty_like(out)
        with torch.cuda.graph(self._backward, pool=self._forward.pool(), capture_error_mode="thread_local"):
            gradients = list(torch.autograd.grad(out, wanted, self._gradient))
            self._by_states = gradients.pop(0) if states.requires_grad else None
            self._by_parameters = torch.cat([g.flatten() for g in gradients]) if gradients else None
        self._shapes = [parameter.shape for parameter in parameters]
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
        # Autograd may keep what it is given as a parameter's gradient, and the next replay would write over it.
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
    """A decoder whose training passes are captured once their shape has come back, and replayed from then on.

    It runs as it is while an earlier replay has not gone back yet: the next one would write over what its backward pass
    needs.

    Args:
        function: From states (B, S, d) to final hidden states (B, S, d).
        parameters: Parameters of the adapter that it goes through.
        capture: Makes `Passes` of a function, an input and parameters.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        parameters: Sequence[Tensor],
        capture: Callable[[Callable[[Tensor], Tensor], Tensor, Sequence[Tensor]], Passes] = CapturedPasses,
    ) -> None:
        self._function = function
        self._parameters = tuple(parameters)
        self._capture = capture
        self._seen: Counter[tuple[Any, ...]] = Counter()
        self._passes: dict[tuple[Any, ...], Passes] = {}
        self._waiting: set[tuple[Any, ...]] = set()
        self._given_up = False

    def __call__(self, states: Tensor) -> Tensor:
        """Final hidden states (B, S, d), through which gradients flow."""
        if self._given_up:
            return self._function(states)
        shape = (*states.shape, states.dtype, states.requires_grad)
        if shape in self._passes and shape not in self._waiting:
            self._waiting.add(shape)
            return self._replay(shape, states)
        plain = self._function(states)
        self._seen[shape] += 1
        small_enough = states.shape[0] * states.shape[1] <= MOST_TOKENS
        if self._seen[shape] == PLAIN_PASSES + 1 and small_enough and len(self._passes) < MOST_GRAPHS:
            self._try(shape, states, plain)
        return plain

    def _replay(self, shape: tuple[Any, ...], states: Tensor) -> Tensor:
        replayed: Tensor = _Replay.apply(
            self._passes[shape], lambda: self._waiting.discard(shape), states, *self._parameters
        )
        return replayed

    def _try(self, shape: tuple[Any, ...], states: Tensor, plain: Tensor) -> None:
        """Capture a shape, unless that fails or gives other states than the plain pass gave."""
        try:
            passes = self._capture(self._function, states, self._parameters)
            error = ((passes.forward(states.detach()) - plain).abs().max() / plain.abs().max()).item()
        # A model may look at a number on the device, which cannot be captured.
        except RuntimeError as failure:
            self._given_up = True
            reason = str(failure).strip().partition("\n")[0]
            log.info("the blocks above the adapter are not replayed as CUDA graphs: %s", reason)
            return
        if not error <= TOLERANCE:
            self._given_up = True
            log.warning(
                "replayed states differ by %.1e of their size; the blocks above the adapter run as they are", error
            )
            return
        self._passes[shape] = passes
