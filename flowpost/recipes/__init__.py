"""The named posteriors of the literature: plain functions that assemble steps into a `FlowPosterior`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from flowpost.posterior import FlowPosterior
from flowpost.recipes.amortized import (
    cc_lin_iaf,
    diagonal,
    full_covariance,
    householder,
    householder_sylvester,
    orthogonal_sylvester,
    planar,
    radial,
    triangular_sylvester,
)
from flowpost.recipes.networks import affine_iaf, iaf, maf, naf, nice, realnvp, spline_autoregressive, spline_coupling

RECIPES: Mapping[str, Callable[..., FlowPosterior]] = {
    "diagonal": diagonal,
    "full_covariance": full_covariance,
    "planar": planar,
    "radial": radial,
    "householder": householder,
    "cc_lin_iaf": cc_lin_iaf,
    "orthogonal_sylvester": orthogonal_sylvester,
    "householder_sylvester": householder_sylvester,
    "triangular_sylvester": triangular_sylvester,
    "iaf": iaf,
    "affine_iaf": affine_iaf,
    "maf": maf,
    "nice": nice,
    "realnvp": realnvp,
    "spline_autoregressive": spline_autoregressive,
    "spline_coupling": spline_coupling,
    "naf": naf,
}
"""Every recipe by its name; each takes ``(features, dim, **options)``."""
