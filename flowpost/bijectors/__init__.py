"""Invertible maps with exact log-determinants, one family a file."""

from flowpost.bijectors.actnorm import ActNorm
from flowpost.bijectors.affine import Affine, Shift
from flowpost.bijectors.autoregressive import Autoregressive, Masked
from flowpost.bijectors.base import Bijector
from flowpost.bijectors.chain import Chain, Shared
from flowpost.bijectors.convex import ConvexCombination
from flowpost.bijectors.coupling import Coupling
from flowpost.bijectors.deep_sigmoid import DeepSigmoid
from flowpost.bijectors.gate import Gate
from flowpost.bijectors.householder import Householder
from flowpost.bijectors.lu import LULinear
from flowpost.bijectors.permute import Permute, Reverse
from flowpost.bijectors.planar import Planar
from flowpost.bijectors.radial import Radial
from flowpost.bijectors.scale import Scale, Scaling
from flowpost.bijectors.spline import Spline
from flowpost.bijectors.squash import Sigmoid, Softplus, Tanh
from flowpost.bijectors.sylvester import Sylvester
from flowpost.bijectors.triangular import UnitLowerTriangular
from flowpost.bijectors.wrappers import Conditioned, Inverse, Learned

__all__ = [
    "ActNorm",
    "Affine",
    "Autoregressive",
    "Bijector",
    "Chain",
    "Conditioned",
    "ConvexCombination",
    "Coupling",
    "DeepSigmoid",
    "Gate",
    "Householder",
    "Inverse",
    "LULinear",
    "Learned",
    "Masked",
    "Permute",
    "Planar",
    "Radial",
    "Reverse",
    "Scale",
    "Scaling",
    "Shared",
    "Shift",
    "Sigmoid",
    "Softplus",
    "Spline",
    "Sylvester",
    "Tanh",
    "UnitLowerTriangular",
]
