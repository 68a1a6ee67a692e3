"""The public libraries as contestants: the same sizes, each called as its documentation calls it."""

# ruff: noqa: ANN401 - the libraries are imported by name where they are installed, so they have no types here.

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Distribution

from benchmarks.speed.flows import Flow
from benchmarks.speed.sizes import Size
from benchmarks.speed.work import UnequalWork


def library(name: str) -> Any:
    """A module of a library; torch's validation of distributions stays as it was, which zuko turns off on import."""
    before = Distribution._validate_args  # pyright: ignore[reportAttributeAccessIssue]
    module = importlib.import_module(name)
    Distribution.set_default_validate_args(before)
    return module


def _orders(size: Size) -> list[Tensor]:
    """The variables' order of each step, reversed from one to the next, for libraries that take it as an argument."""
    order = torch.arange(size.dim)
    return [order if step % 2 == 0 else order.flip(0) for step in range(size.steps)]


class Zuko(Flow):
    """`MaskedAutoregressiveTransform`s in their direction of one pass, which is from noise to z here."""

    def __init__(self, size: Size) -> None:
        super().__init__(size)
        made = library("zuko.flows").MaskedAutoregressiveTransform
        compose = library("zuko.lazy").LazyComposedTransform
        hidden = {"hidden_features": (size.hidden, size.hidden), "activation": nn.ReLU}
        self.flow: Any = compose(*(made(size.dim, size.context, order=order, **hidden) for order in _orders(size)))

    def activations(self) -> Sequence[object]:
        """The modules between the masked layers."""
        return [module for step in self.flow.transforms for module in list(step.hyper)[1::2]]

    def push(self, noise: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """The call that returns both outputs at once."""
        return self.flow(h).call_and_ladj(noise)

    def pull(self, z: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """The same, of the inverse."""
        return self.flow(h).inv.call_and_ladj(z)


class Nflows(Flow):
    """`MaskedAffineAutoregressiveTransform`s, reversals between them; h is expanded to z's rows, as it has to be."""

    def __init__(self, size: Size) -> None:
        super().__init__(size)
        transforms = library("nflows.transforms")
        options = {"context_features": size.context, "num_blocks": 1, "use_residual_blocks": False}
        steps = [
            transforms.MaskedAffineAutoregressiveTransform(size.dim, size.hidden, activation=F.relu, **options)
            for _ in range(size.steps)
        ]
        chain = [part for step in steps for part in (transforms.ReversePermutation(size.dim), step)][1:]
        self.steps, self.flow = steps, transforms.CompositeTransform(chain)

    def activations(self) -> Sequence[object]:
        """Of the first layer and of the block after it."""
        nets = [step.autoregressive_net for step in self.steps]
        return [activation for net in nets for activation in (net.activation, *(b.activation for b in net.blocks))]

    def push(self, noise: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Both outputs at once."""
        rows = h.expand(*noise.shape[:-1], h.shape[-1]).flatten(0, -2)
        z, log_det = self.flow(noise.flatten(0, -2), rows)
        return z.view(noise.shape), log_det.view(noise.shape[:-1])

    def pull(self, z: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse, both outputs at once."""
        return self.flow.inverse(z, h)


class Pyro(Flow):
    """`ConditionalAffineAutoregressive`s with `stable=True`, the paper's gate; orders reversed by its permutation."""

    def __init__(self, size: Size) -> None:
        super().__init__(size)
        transforms = library("pyro.distributions.transforms")
        made = library("pyro.nn").ConditionalAutoRegressiveNN
        compose = library("pyro.distributions.conditional").ConditionalComposeTransformModule
        hidden = [size.hidden, size.hidden]
        self.nets: list[Any] = [
            made(size.dim, size.context, hidden, permutation=order, nonlinearity=nn.ReLU()) for order in _orders(size)
        ]
        self.flow: Any = compose(
            [transforms.ConditionalAffineAutoregressive(net, stable=True) for net in self.nets], cache_size=1
        )

    def activations(self) -> Sequence[object]:
        """Each network's, after all but its last layer."""
        return [net.f for net in self.nets for _ in net.layers[:-1]]

    def push(self, noise: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """The map, which keeps its log-det for who asks next; conditioned anew, it knows nothing of the last call."""
        flow = self.flow.condition(h)
        z = flow(noise)
        return z, flow.log_abs_det_jacobian(noise, z)

    def pull(self, z: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """The same, of the inverse."""
        flow = self.flow.condition(h).inv
        noise = flow(z)
        return noise, flow.log_abs_det_jacobian(z, noise)


class Normflows(Flow):
    """`MaskedAffineAutoregressive`s, in a version that has them with a context and two plain hidden layers."""

    def __init__(self, size: Size) -> None:
        super().__init__(size)
        flows = library("normflows.flows")
        options = {"context_features": size.context, "num_blocks": 1, "use_residual_blocks": False}
        try:
            steps = [
                flows.MaskedAffineAutoregressive(size.dim, size.hidden, activation=F.relu, **options)
                for _ in range(size.steps)
            ]
        except NotImplementedError as error:
            raise UnequalWork(
                "normflows: its feed-forward MADE refuses a context, and one residual block has a third hidden layer"
            ) from error
        self.steps, self.flow = steps, nn.ModuleList(steps)

    def activations(self) -> Sequence[object]:
        """Of every block."""
        return [block.activation for step in self.steps for block in step.autoregressive_net.blocks]

    def push(self, noise: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Step by step, log-dets added in their own dtype."""
        return self._run(self.steps, noise, h)

    def pull(self, z: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse, step by step."""
        return self._run([step.inverse for step in self.steps[::-1]], z, h)

    @staticmethod
    def _run(calls: list[Any], z: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        total = z.new_zeros(())
        for call in calls:
            z, log_det = call(z, h)
            total = total + log_det
        return z, total


PEERS: dict[str, type[Flow]] = {"zuko": Zuko, "nflows": Nflows, "pyro": Pyro, "normflows": Normflows}
"""By import name."""
