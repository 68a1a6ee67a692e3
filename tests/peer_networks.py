"""For `peer_worker`: networks of the public libraries with flowpost's weights, and the autoregressive maps on them."""

# ruff: noqa: ANN401 - the libraries are imported by name where they are installed, so they have no types here.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peer_steps import Arrays, Map, of_transform
from torch import Tensor, nn

from benchmarks.peers import Pair, module, nflows, pyro


def layers(a: Arrays) -> list[Arrays]:
    """Weight, bias and mask of each layer, numbered in the arrays' names."""
    count = sum(name.startswith("weight") for name in a)
    return [{key: a[f"{key}{i}"] for key in ("weight", "bias", "mask") if f"{key}{i}" in a} for i in range(count)]


def give(linear: Any, layer: Arrays) -> None:
    """Put weights, and degrees as a mask, into a library's layer."""
    linear.weight.data, linear.bias.data = layer["weight"], layer["bias"]
    if "mask" in layer:
        linear.mask.copy_(layer["mask"])


def nflows_network(a: Arrays, outputs: int) -> Any:
    """nflows' MADE with two hidden layers, no context; its outputs lie variable by variable."""
    dim, parts = a["z"].shape[-1], layers(a)
    made = module("nflows.transforms.made").MADE(
        dim,
        len(parts[0]["bias"]),
        num_blocks=1,
        output_multiplier=outputs,
        use_residual_blocks=False,
        activation=F.elu,
    )
    last = {key: value.unflatten(0, (outputs, dim)).transpose(0, 1).flatten(0, 1) for key, value in parts[2].items()}
    for linear, layer in zip(
        (made.initial_layer, made.blocks[0].linear, made.final_layer), (*parts[:2], last), strict=True
    ):
        give(linear, layer)
    return lambda z: made(z).unflatten(-1, (dim, outputs)).mT


def pyro_network(a: Arrays, outputs: int) -> Any:
    """pyro's, with or without a context, which stands in front of the variables."""
    dim, parts = a["z"].shape[-1], layers(a)
    options = {"param_dims": [1] * outputs, "permutation": a["order"].long(), "nonlinearity": nn.ELU()}
    given = (a["h"],) if "h" in a else ()
    net = pyro.network(dim, sum(h.shape[-1] for h in given), [len(p["bias"]) for p in parts[:-1]], **options)
    for linear, layer in zip(net.layers, parts, strict=True):
        give(linear, layer)
    return lambda z: torch.stack(net(z, *given), -2)


def perceptron(a: Arrays) -> nn.Module:
    """torch's own, of the coupling's weights."""
    parts: list[nn.Module] = []
    for layer in layers(a):
        outputs, inputs = layer["weight"].shape
        linear = nn.Linear(inputs, outputs)
        give(linear, layer)
        parts += [linear, nn.ELU()]
    return nn.Sequential(*parts[:-1])


class Bounded(nn.Module):
    """A network between whose outputs and the library's step stands what undoes the one's bounds and does the other's.

    Args:
        network: outputs ``(*batch, numbers, dim)``.
        convert: of the outputs.
        order: of the variables, which pyro's inverses ask for.
    """

    def __init__(self, network: Any, convert: Callable[[Tensor], Any], order: Tensor) -> None:
        super().__init__()
        self.network, self.convert, self.permutation = network, convert, order.long()

    def forward(self, z: Tensor, context: Tensor | None = None) -> Any:
        return self.convert(self.network(z))


def soft(raw: Tensor, bound: float) -> Tensor:
    """flowpost's soft bound of a network's output."""
    return bound * torch.tanh(raw / bound)


def inverse_softplus(value: Tensor) -> Tensor:
    return value + torch.log(-torch.expm1(-value))


def pyro_gate(network: Callable[[Arrays, int], Any]) -> Map:
    """`AffineAutoregressive(stable=True)`: the paper's gate, with the bias 2."""

    def convert(outputs: Tensor) -> Pair:
        raw, mean = outputs.unbind(-2)
        return soft(mean, 1e3), soft(raw, 4.0)

    def run(a: Arrays, *, inverse: bool) -> Pair:
        kind = module("pyro.distributions.transforms").AffineAutoregressive
        step = kind(Bounded(network(a, 2), convert, a["order"]), stable=True, sigmoid_bias=2.0)
        return of_transform(step, a["z"], inverse=inverse)

    return run


def pyro_affine(a: Arrays, *, inverse: bool) -> Pair:
    """`AffineAutoregressive`, its clips of the log-scale out of the way."""

    def convert(outputs: Tensor) -> Pair:
        loc, raw = outputs.unbind(-2)
        return loc, soft(raw, 4.0)

    kind = module("pyro.distributions.transforms").AffineAutoregressive
    network = Bounded(pyro_network(a, 2), convert, a["order"])
    return of_transform(kind(network, log_scale_min_clip=-9.0, log_scale_max_clip=9.0), a["z"], inverse=inverse)


def nflows_maf(a: Arrays, *, inverse: bool) -> Pair:
    """`MaskedAffineAutoregressiveTransform`, scale ``softplus(raw) + 1e-3``, from z to noise."""

    def convert(outputs: Tensor) -> Tensor:
        loc, raw = outputs.unbind(-2)
        scale = torch.exp(-soft(raw, 4.0))
        return torch.stack([inverse_softplus(scale - 1e-3), -loc * scale], -1)

    kind = module("nflows.transforms").MaskedAffineAutoregressiveTransform
    step = kind(a["z"].shape[-1], 8)
    step.autoregressive_net = Bounded(nflows_network(a, 2), convert, a["order"])
    return nflows.call(step, a["z"], inverse=inverse)


def pyro_naf(a: Arrays, *, inverse: bool) -> Pair:
    """`NeuralAutoregressive` of sigmoids, its numbers given: no network."""
    numbers = inverse_softplus(a["scale"]), a["log_weight"], a["shift"]
    step = module("pyro.distributions.transforms").NeuralAutoregressive(lambda _: numbers, a["scale"].shape[-2])
    return of_transform(step, a["z"], inverse=inverse)


MAPS: dict[str, Map] = {
    "pyro gate, pyro network": pyro_gate(pyro_network),
    "pyro gate, nflows network": pyro_gate(nflows_network),
    "pyro affine": pyro_affine,
    "nflows maf": nflows_maf,
    "pyro naf": pyro_naf,
}
