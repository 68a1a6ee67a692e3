"""The Householder flow against its formula, and what a product of reflections is."""

import math

import pytest
import torch
from torch import Tensor

import flowpost
from flowpost import Chain, Householder, Scaling, Shift


def matrix_by_the_book(v: torch.Tensor) -> torch.Tensor:
    """``I - 2 v v^T / |v|^2``, entry by entry."""
    square = sum(float(x) ** 2 for x in v)
    size = range(len(v))
    rows = [[float(i == j) - 2 * float(v[i]) * float(v[j]) / square for j in size] for i in size]
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("length", [1e-150, 1.0, 1e150])
def test_it_is_the_paper_s_whatever_the_length_of_v(length: float) -> None:
    z, v = torch.randn(50, 4, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    image, log_det = Householder(5)(z, length * v)
    assert (log_det == 0).all()
    for i in range(4):
        matrix = matrix_by_the_book(v[i])
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(5, dtype=torch.float64))
        torch.testing.assert_close(image[:, i], z[:, i] @ matrix.T, rtol=1e-12, atol=1e-12)


def test_it_undoes_itself_and_keeps_lengths() -> None:
    step, z, v = Householder(6), torch.randn(9, 6, dtype=torch.float64), torch.randn(9, 6, dtype=torch.float64)
    image, _ = step(z, v)
    torch.testing.assert_close(step(image, v)[0], z)
    torch.testing.assert_close(image.norm(dim=-1), z.norm(dim=-1))
    torch.testing.assert_close((image * v).sum(-1), -(z * v).sum(-1))
    assert (torch.linalg.det(torch.stack([matrix_by_the_book(row) for row in v])) < 0).all()


def test_one_dimension_is_a_change_of_sign() -> None:
    step, z = Householder(1), torch.randn(4, 1)
    assert step.context_size == 0
    assert torch.equal(step(z)[0], -z)


def test_a_direction_that_is_none_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^direction: expected a torch\.Tensor, got int$"):
        Householder(3, 2)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"^direction: expected shape \(3,\), got \(2,\)$"):
        Householder(3, torch.ones(2))


def test_at_zero_the_first_axis_stands_in_and_gradients_are_finite() -> None:
    v = torch.zeros(3, requires_grad=True)
    image, _ = Householder(3)(torch.tensor([1.0, 2.0, 3.0]), v)
    assert image.tolist() == [-1.0, 2.0, 3.0]
    assert torch.autograd.grad(image.sum(), v)[0].isfinite().all()


def test_pairs_start_as_the_identity_and_in_directions_of_their_own() -> None:
    flow = flowpost.householder(3, 4, steps=4).flow
    assert isinstance(flow, Chain)
    assert [type(step) for step in flow] == [Scaling, *[Householder] * 4, Shift]
    start = flow.initial_context()[4:-4].view(4, 4)
    torch.testing.assert_close(start.norm(dim=1), torch.full((4,), 8.0))
    assert torch.equal(start[0], start[1])
    assert not torch.equal(start[1], start[2])
    z, context = torch.randn(5, 4), flow.initial_context().requires_grad_()
    image, _ = flow(z, context)
    torch.testing.assert_close(image, z)
    (gradient,) = torch.autograd.grad((image * torch.randn(5, 4)).sum(), context)
    assert (gradient[4:-4] != 0).all()


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_posterior_is_a_gaussian_turned(steps: int) -> None:
    """Mean loc and covariance ``Q diag(scale^2) Q^T``, Q the product of the reflections, the last one leftmost."""
    posterior = flowpost.householder(3, 4, steps=steps).double()
    for parameter in posterior.parameters():
        torch.nn.init.normal_(parameter)
    h = torch.randn(6, 3, dtype=torch.float64)
    sample, context = posterior(h, (7,)), posterior.context(h)
    assert context is not None
    for i, numbers in enumerate(context.detach()):
        scale, loc = flowpost.functional.softplus_scale(numbers[:4]), numbers[-4:]
        product = torch.eye(4, dtype=torch.float64)
        for v in numbers[4:-4].view(steps, 4):
            product = matrix_by_the_book(v) @ product
        covariance = product @ torch.diag(scale**2) @ product.T
        normal = torch.distributions.MultivariateNormal(loc, covariance)
        torch.testing.assert_close(sample.log_prob[:, i], normal.log_prob(sample.z[:, i]), rtol=1e-9, atol=1e-9)


class Tripled(Householder):
    """As `Householder`, and three times as far."""

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        image, log_det = super()._forward(z, context)
        return 3 * image, log_det + self.dim * math.log(3)

    def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
        found, log_det = super()._inverse(z / 3, context, preimage)
        return found, log_det - self.dim * math.log(3)


def test_a_subclass_may_build_on_the_inverse() -> None:
    """It called the subclass's own ``_forward``."""
    step, z, context = Tripled(3), torch.randn(5, 3), torch.randn(3)
    torch.testing.assert_close(step.inverse(step(z, context)[0], context)[0], z)


def test_a_subclass_with_an_inverse_of_its_own_is_not_joined() -> None:
    """As of planar steps; the run's inverse passed it by."""

    class Back(Householder):
        def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
            return z, z.new_zeros(())

    z, context = torch.randn(4, 3), torch.randn(4, 6)
    assert torch.equal(Chain(Back(3), Back(3)).inverse(z, context)[0], z)
