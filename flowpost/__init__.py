"""Flexible posteriors for variational autoencoders: features in, z and log q(z|x) out, in one pass."""

from flowpost import calibration, evaluation, functional, gaps, importance, objectives, schedules, testing, vae
from flowpost.bijectors.actnorm import ActNorm
from flowpost.bijectors.affine import Affine, Scale, Shift
from flowpost.bijectors.autoregressive import Autoregressive, Masked
from flowpost.bijectors.base import Bijector
from flowpost.bijectors.chain import Chain, Shared
from flowpost.bijectors.convex import ConvexCombination
from flowpost.bijectors.coupling import Coupling
from flowpost.bijectors.deep_sigmoid import DeepSigmoid
from flowpost.bijectors.householder import Householder
from flowpost.bijectors.lu import LULinear
from flowpost.bijectors.permute import Permute, Reverse
from flowpost.bijectors.planar import Planar
from flowpost.bijectors.radial import Radial
from flowpost.bijectors.spline import Spline
from flowpost.bijectors.squash import Sigmoid, Softplus, Tanh
from flowpost.bijectors.sylvester import Sylvester
from flowpost.bijectors.triangular import UnitLowerTriangular
from flowpost.bijectors.wrappers import Conditioned, Inverse, Learned
from flowpost.checks import DomainError, IllConditionedWarning, InversionError, NonFiniteError, checking
from flowpost.density import Sample
from flowpost.distribution import FlowDistribution
from flowpost.files import CorruptFileError, load, save
from flowpost.posterior import FlowPosterior
from flowpost.recipes import (
    affine_iaf,
    cc_lin_iaf,
    diagonal,
    full_covariance,
    householder,
    householder_sylvester,
    iaf,
    maf,
    naf,
    nice,
    orthogonal_sylvester,
    planar,
    radial,
    realnvp,
    spline_autoregressive,
    spline_coupling,
    triangular_sylvester,
)
from flowpost.wrap import wrap

__version__ = "0.1.0"
__all__ = [
    "ActNorm",
    "Affine",
    "Autoregressive",
    "Bijector",
    "Chain",
    "Conditioned",
    "ConvexCombination",
    "CorruptFileError",
    "Coupling",
    "DeepSigmoid",
    "DomainError",
    "FlowDistribution",
    "FlowPosterior",
    "Householder",
    "IllConditionedWarning",
    "Inverse",
    "InversionError",
    "LULinear",
    "Learned",
    "Masked",
    "NonFiniteError",
    "Permute",
    "Planar",
    "Radial",
    "Reverse",
    "Sample",
    "Scale",
    "Shared",
    "Shift",
    "Sigmoid",
    "Softplus",
    "Spline",
    "Sylvester",
    "Tanh",
    "UnitLowerTriangular",
    "affine_iaf",
    "calibration",
    "cc_lin_iaf",
    "checking",
    "diagonal",
    "evaluation",
    "full_covariance",
    "functional",
    "gaps",
    "householder",
    "householder_sylvester",
    "iaf",
    "importance",
    "load",
    "maf",
    "naf",
    "nice",
    "objectives",
    "orthogonal_sylvester",
    "planar",
    "radial",
    "realnvp",
    "save",
    "schedules",
    "spline_autoregressive",
    "spline_coupling",
    "testing",
    "triangular_sylvester",
    "vae",
    "wrap",
]
