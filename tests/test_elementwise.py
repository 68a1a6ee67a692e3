"""What an element-wise step promises to the wrappers that give it the numbers of some of its variables."""

from collections.abc import Sequence

import pytest
import torch
from registry import ENTRIES, Case, Entry, draw, jacobian
from torch import Tensor

from flowpost import Affine, Bijector, Chain, Inverse, Learned, Planar

ALL = {entry.name for entry in ENTRIES if entry.make(2, 0).elementwise}
ELEMENTWISE = [entry for entry in ENTRIES if entry.name in ALL and entry.make(2, 0).context_size]
"""Those that read a context."""
CASE = Case(dim=4, seed=3, push=1.0, context=2.0)


def columns(step: Bijector, z: Tensor, context: Tensor, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The points and the context of some of the variables."""
    return z[..., chosen], context.unflatten(-1, (-1, step.dim))[..., chosen].flatten(-2)


def one_case(entry: Entry) -> tuple[Bijector, Tensor, Tensor]:
    """A step, points of its domain and their context."""
    step, z, context = draw(entry, CASE, batch=(20,))
    assert context is not None
    return step, z, context


def test_who_is_element_wise() -> None:
    assert {"affine", "affine_log_var", "inverse_affine"} <= {entry.name for entry in ELEMENTWISE}
    assert {"sigmoid", "softplus", "tanh", "scale", "act_norm", "inverse_sigmoid"} <= ALL
    assert Learned(Affine(2)).elementwise
    for step in (Planar(2), Learned(Planar(2)), Chain(Affine(2), Affine(2)), Inverse(Planar(2))):
        assert not step.elementwise


@pytest.mark.parametrize("entry", ELEMENTWISE, ids=lambda entry: entry.name)
def test_a_variable_reads_itself_and_its_own_numbers(entry: Entry) -> None:
    step, z, context = one_case(entry)
    assert context.shape[-1] % step.dim == 0
    z, context = z.requires_grad_(), context.requires_grad_()
    image, _ = step._forward(z, context)
    slopes = jacobian(image, z)
    assert torch.equal(slopes, torch.diag_embed(slopes.diagonal(dim1=-2, dim2=-1)))
    of_numbers = jacobian(image, context).unflatten(-1, (-1, step.dim))  # (batch, variable, number, column)
    of_others = of_numbers * (1 - torch.eye(step.dim, dtype=torch.float64)).unsqueeze(-2)
    assert torch.equal(of_others, torch.zeros_like(of_others))
    assert of_numbers.diagonal(dim1=-3, dim2=-1).ne(0).any(dim=0).all()  # and every number is read


@pytest.mark.parametrize("chosen", [[0], [2], [3, 1]], ids=str)
@pytest.mark.parametrize("entry", ELEMENTWISE, ids=lambda entry: entry.name)
def test_some_of_the_variables_are_mapped_as_all_of_them(entry: Entry, chosen: list[int]) -> None:
    step, z, context = one_case(entry)
    image, log_det = step._forward(z, context)
    some, some_log_det = step._forward(*columns(step, z, context, chosen))
    torch.testing.assert_close(some, image[..., chosen], rtol=1e-12, atol=1e-12)
    rest = [i for i in range(step.dim) if i not in chosen]
    other_log_det = step._forward(*columns(step, z, context, rest))[1]
    torch.testing.assert_close(some_log_det + other_log_det, log_det, rtol=1e-12, atol=1e-12)
    for preimage in (None, z[..., chosen]):
        numbers = columns(step, image, context, chosen)
        back, back_log_det = step._inverse(*numbers, preimage)
        torch.testing.assert_close(back, z[..., chosen], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(back_log_det, -some_log_det, rtol=1e-9, atol=1e-9)
