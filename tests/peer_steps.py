"""For `peer_worker`: maps of the public libraries whose numbers are given, from planar to linear ones."""

# ruff: noqa: ANN401 - the libraries are imported by name where they are installed, so they have no types here.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from benchmarks.peers import Pair, module, nflows, normflows, pyro

Arrays = dict[str, Tensor]
Map = Callable[..., Pair]
"""The numbers, and whether the inverse is asked for, to the image and the log-det of that direction."""


def of_transform(transform: Any, z: Tensor, *, inverse: bool) -> Pair:
    """A `torch.distributions` transform, whose log-dets are of one variable each where it is element-wise."""
    image, log_det = pyro.call(transform, z, inverse=inverse)
    return image, log_det.sum(-1) if log_det.ndim == z.ndim else log_det


def pyro_planar(a: Arrays, *, inverse: bool) -> Pair:
    planar = module("pyro.distributions.transforms.planar").ConditionedPlanar
    return of_transform(planar((a["b"], a["u"], a["w"])), a["z"], inverse=inverse)


def normflows_planar(a: Arrays, *, inverse: bool) -> Pair:
    """One set of numbers for all points."""
    flow = module("normflows.flows").Planar(a["w"].shape, u=a["u"][None], w=a["w"][None], b=a["b"])
    return normflows.call(flow, a["z"])


def pyro_radial(a: Arrays, *, inverse: bool) -> Pair:
    radial = module("pyro.distributions.transforms.radial").ConditionedRadial
    return of_transform(radial((a["center"], a["alpha"], a["beta"])), a["z"], inverse=inverse)


def normflows_radial(a: Arrays, *, inverse: bool) -> Pair:
    """One set of numbers for all points."""
    flow = module("normflows.flows").Radial(a["center"].shape, z_0=a["center"][None])
    flow.alpha.data, flow.beta.data = a["alpha"], a["beta"]
    return normflows.call(flow, a["z"])


def pyro_householder(a: Arrays, *, inverse: bool) -> Pair:
    householder = module("pyro.distributions.transforms.householder").ConditionedHouseholder
    return of_transform(householder(a["v"]), a["z"], inverse=inverse)


def pyro_sylvester(a: Arrays, *, inverse: bool) -> Pair:
    """Its map with Q the product of reflections, R and S as they are given."""
    flow = module("pyro.distributions.transforms.sylvester").Sylvester(a["z"].shape[-1], len(a["v"]))
    flow.u_unnormed.data, flow.b.data = a["v"], a["b"]
    flow.R, flow.S = lambda: a["R"], lambda: a["S"]
    return of_transform(flow, a["z"], inverse=inverse)


def nflows_lu(a: Arrays, *, inverse: bool) -> Pair:
    """One matrix for all points. Its inverse calls what torch no longer has."""
    step = module("nflows.transforms").LULinear(a["z"].shape[-1])
    step.lower_entries.data, step.upper_entries.data = a["lower"], a["upper"]
    step.unconstrained_upper_diag.data, step.bias.data = a["diagonal"], a["shift"]
    return nflows.call(step, a["z"])


def nflows_act_norm(a: Arrays, *, inverse: bool) -> Pair:
    """One scale and shift for all points; it is told that a batch has set them."""
    step = module("nflows.transforms").ActNorm(a["z"].shape[-1])
    step.log_scale.data, step.shift.data = a["log_scale"], a["shift"]
    step.eval()
    return nflows.call(step, a["z"], inverse=inverse)


MAPS: dict[str, Map] = {
    "pyro planar": pyro_planar,
    "normflows planar": normflows_planar,
    "pyro radial": pyro_radial,
    "normflows radial": normflows_radial,
    "pyro householder": pyro_householder,
    "pyro sylvester": pyro_sylvester,
    "nflows lu": nflows_lu,
    "nflows act norm": nflows_act_norm,
}
