"""The blocks above the adapter as CUDA graphs: hundreds of kernels of a short step, launched as one.

A GPU runs the kernels of a short step in less time than a host needs to launch them one by one. A graph keeps the
launches of one forward and one backward pass for one shape of batch, and replays them at the same addresses.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["CapturedPasses", "Decoder", "Passes", "ReplayedDecoder"]

log = logging.getLogger(__name__)

PLAIN_PASSES = 2
"""Passes of a shape that run as they are, so that shapes that do not come back are never captured."""

MOST_GRAPHS = 8
"""Shapes that are captured; each keeps memory of its own for the activations of a pass."""

MOST_TOKENS = 2048
"""Tokens in a batch, padding included, above which the kernels run for longer than their launches take."""

TOLERANCE = 1e-3
"""Largest difference of replayed states and gradients from plain ones, relative to the largest of them. The kernels are
the same, but the library behind them may choose others while it is captured."""

Decoder = Callable[[Tensor, Mapping[str, Tensor]], Tensor]
"""From states (B, S, d) to final hidden states (B, S, d), with tensors in the place of parameters of those names."""


class Passes(Protocol):
    """A forward and a backward pass of one shape, which can be had again and again."""

    def forward(self, states: Tensor) -> Tensor:
        """What comes out, in memory that the next call writes to."""

    def backward(self, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient by the states (None where they need none), in such memory too, and by each parameter."""


class CapturedPasses:
    """The kernels of a forward and a backward pass, in two CUDA graphs.

    Args:
        decoder: What runs, without a look at any number.
        states: An example of its input on a CUDA device, with a gradient wherever it will need one.
        parameters: What else a gradient is wanted for. They have to stay where they are.

    Raises:
        RuntimeError: If it cannot be captured.
    """

    def __init__(self, decoder: Decoder, states: Tensor, parameters: Mapping[str, Tensor]) -> None:
        self._states = states.detach().clone().requires_grad_(states.requires_grad)
        self._shapes = [parameter.shape for parameter in parameters.values()]
        # Autograd hands a parameter's gradient over on the stream on which the parameter was first used, and a capture
        # must not wait for another stream. So gradients are taken by fresh tensors that lie where the parameters do.
        aliases = {name: parameter.detach().requires_grad_() for name, parameter in parameters.items()}
        wanted = [*([self._states] if states.requires_grad else []), *aliases.values()]
        stream = torch.cuda.Stream(states.device)
        stream.wait_stream(torch.cuda.current_stream(states.device))
        with torch.cuda.stream(stream):
            # Libraries make their handles and workspaces at the first calls, which a graph must not hold.
            for _ in range(3):
                out = decoder(self._states, aliases)
                torch.autograd.grad(out, wanted, torch.zeros_like(out))
            del out
        torch.cuda.current_stream(states.device).wait_stream(stream)
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        try:
            self._capture(decoder, aliases, wanted)
        except RuntimeError:
            # PyTorch's generator goes on believing that it is being captured, and refuses to draw.
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            generator.graphsafe_set_state(generator.clone_state())
            raise

    def _capture(self, decoder: Decoder, aliases: Mapping[str, Tensor], wanted: list[Tensor]) -> None:
        # Other threads, such as those of NCCL, may go on with what is not allowed in this one.
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
        decoder: What runs.
        parameters: Parameters of the adapter that it goes through, by their names in it.
        capture: Makes `Passes` of a decoder, an input and parameters.
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
        """Capture a shape, unless that fails or gives anything else than the plain pass."""
        try:
            passes = self._capture(self._decoder, states, self._parameters)
        # A model may look at a number on the device, which cannot be captured.
        except RuntimeError as failure:
            self._given_up = True
            reason = str(failure).strip().partition("\n")[0]
            log.info("the blocks above the adapter are not replayed as CUDA graphs: %s", reason)
            return
        error = self._difference(passes, states, plain)
        if error <= TOLERANCE:
            self._passes[shape] = passes
        else:
            self._given_up = True
            log.warning("a replayed step differs by %.1e of its size; the blocks run as they are", error)

    def _difference(self, passes: Passes, states: Tensor, plain: Tensor) -> float:
        """The largest relative difference between a replay and a plain pass, of states and of all gradients."""
        wanted = [*([states] if states.requires_grad else []), *self._parameters.values()]
        gradient = plain.detach()
        expected = [gradient, *torch.autograd.grad(plain, wanted, gradient, retain_graph=True)]
        replayed = [passes.forward(states.detach()), *(g for g in passes.backward(gradient) if g is not None)]
        errors = [(a - b).abs().max() / b.abs().max().clamp(min=1e-30) for a, b in zip(replayed, expected, strict=True)]
        return float(torch.stack(errors).max())
