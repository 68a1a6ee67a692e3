"""What is timed, as calls: a training step, log q at an external z; eager, compiled, or captured in a CUDA graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.speed.flows import Flow, features, training_loss
from benchmarks.speed.timing import Call
from flowpost._graphs import cleaned_up


@dataclass(frozen=True)
class Step:
    """Forget the last gradients, compute a loss, and take its gradient in every leaf."""

    leaves: Sequence[Tensor]
    loss: Callable[[], Tensor]

    def clear(self) -> None:
        """Forget the gradients."""
        for leaf in self.leaves:
            leaf.grad = None

    def __call__(self) -> None:
        """The whole of it."""
        self.clear()
        self.loss().backward()


def training_step(flow: Flow) -> Step:
    """Draw z and its log q, and take the gradients in all weights and in h."""
    h = features(flow.size, next(flow.parameters()).device)
    return Step([h, *flow.parameters()], lambda: training_loss(*flow.sample(h)))


def scoring_step(flow: Flow) -> Step:
    """The log q of a z from elsewhere, and its gradients in all weights, in h and in z."""
    z, h = _external(flow)
    return Step([z, h, *flow.parameters()], lambda: flow.log_prob(z, h).sum())


def scoring(flow: Flow) -> Call:
    """The log q of a z from elsewhere, alone."""
    z, h = _external(flow)
    return torch.no_grad()(lambda: flow.log_prob(z, h))


def _external(flow: Flow) -> tuple[Tensor, Tensor]:
    h = features(flow.size, next(flow.parameters()).device)
    generator = torch.Generator().manual_seed(2)
    z = 0.5 * torch.randn(flow.size.batch, flow.size.dim, generator=generator)
    return z.to(h.device).requires_grad_(), h


def compiled(step: Step, mode: str | None = None) -> Step:
    """The loss by `torch.compile`, whole; called twice, so that no compilation is timed."""
    loss = torch.compile(step.loss, fullgraph=True, dynamic=False, mode=mode)

    def marked() -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return loss()

    result = replace(step, loss=loss if mode is None else marked)
    result()
    result()
    return result


def captured(step: Call) -> Call:
    """The whole step as one CUDA graph, gradients into the same memory each time; the replay is what is called.

    The noise is the default generator's, which torch registers with the graph.

    Raises:
        RuntimeError: if the step cannot be captured; later steps, captured or not, run as if it had not been tried.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # lazy initializations happen here, not in the graph
        for _ in range(3):
            step()
        _refuse_waits(step)
    torch.cuda.current_stream().wait_stream(side)
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    with cleaned_up(torch.device("cuda"), pool), torch.cuda.graph(graph, pool=pool):
        step()
    return graph.replay


def why_not(error: RuntimeError) -> str:
    """Of a step that cannot be captured: of a host read, say, or a copy from pageable memory inside it."""
    return f"cannot be captured: {str(error.__context__ or error).splitlines()[0]}"


def _refuse_waits(step: Call) -> None:
    """Raise where the host waits for the device, as a graph cannot: before a capture, which such a call would spoil."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
