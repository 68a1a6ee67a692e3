"""From real coordinates to lower-triangular matrices that a constraint allows, with the log-det."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from flowpost.numerics.constants import Constant
from flowpost.numerics.sums import cumulated
from flowpost.numerics.triangles import places, strict_tril, written
from flowpost.variational.maps import Map, Shape, positive_exp


class LowerCholesky(Map):
    """Lower triangular with a positive diagonal: the entries row by row, on the diagonal ``exp(u)``.

    ``log|det|`` is the sum of the diagonal's coordinates.
    """

    def __init__(self, shape: Shape) -> None:
        self._places = places(shape[-1], 0)
        super().__init__(shape, (*shape[:-2], len(self._places.value)))

    def _forward(self, free: Tensor) -> tuple[Tensor, Tensor]:
        matrix = written(free.new_zeros(self.shape[-2:]), free, self._places)
        logs = matrix.diagonal(dim1=-2, dim2=-1)
        return matrix.tril(-1) + torch.diag_embed(logs.exp()), logs

    def _inverse(self, values: Tensor) -> Tensor:
        logs = values.diagonal(dim1=-2, dim2=-1).log()
        matrix = values.tril(-1) + torch.diag_embed(logs)
        return matrix.flatten(-2).index_select(-1, self._places.on(values))


class CorrCholesky(Map):
    """Cholesky factors of correlation matrices: in row i ``x_ij = tanh(u_ij) prod_{k<j} sech(u_ik)``, all lengths 1.

    The diagonal is what is left, ``prod_{k<i} sech(u_ik)``. ``log|det| = sum_ij (i + 1 - j) log sech(u_ij)``, rows and
    columns counted from 0, of the entries below the diagonal.

    Reference:
        Stan Development Team, Stan Reference Manual, chapter on constraint transforms, correlation matrices.
    """

    def __init__(self, shape: Shape) -> None:
        self._places = places(shape[-1])
        row, column = torch.tril_indices(shape[-1], shape[-1], -1, device="cpu")
        self._weights = Constant((row + 1 - column).double())
        super().__init__(shape, (*shape[:-2], len(self._places.value)))

    def _forward(self, free: Tensor) -> tuple[Tensor, Tensor]:
        n, log_sech = self.shape[-1], math.log(2) - free + F.logsigmoid(2 * free)
        before = F.pad(cumulated(strict_tril(log_sech, n, self._places), -1)[..., :-1], (1, 0))
        shares = written(torch.eye(n, dtype=free.dtype, device=free.device), free.tanh(), self._places)
        return shares * positive_exp(before), log_sech * self._weights.on(free)

    def _inverse(self, values: Tensor) -> Tensor:
        tails = cumulated(values.square().flip(-1), -1).flip(-1)
        rest = F.pad(tails[..., 1:], (0, 1)).sqrt()
        entries, rest = (each.flatten(-2).index_select(-1, self._places.on(values)) for each in (values, rest))
        return (entries / rest).asinh()
