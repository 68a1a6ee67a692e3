"""`flowpost.checking`: what passes in silence by default is named, row by row, when value checks are on."""

import threading
import warnings

import pytest
import torch
from small import DIM, FEATURES, small
from torch import Tensor, nn

import flowpost
from flowpost import Affine, Bijector, Planar
from flowpost.checks import active


class Wrong(Bijector):
    """Its inverse misses by 0.82 in the second row."""

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return 2 * z, z.new_full(z.shape[:-1], self.dim * 0.6931471805599453)

    def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
        miss = torch.zeros_like(z)
        miss[1, 0] = 0.41
        return z / 2 + miss, z.new_full(z.shape[:-1], -self.dim * 0.6931471805599453)


class Steep(Bijector):
    """Exact, and so steep that rounding z in the float it comes in moves log q by nats."""

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return z * 1e-9 + 1, torch.log(z.new_full(z.shape[:-1], 1e-9)) * self.dim

    def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
        return (z - 1) * 1e9, -torch.log(z.new_full(z.shape[:-1], 1e-9)) * self.dim


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_non_finite_rows_are_named(direction: str) -> None:
    z = torch.zeros(256, 4)
    z[17, 2] = z[20] = z[30, 0] = torch.nan
    call = getattr(Affine(4), direction)
    assert call(z, torch.zeros(8))[0][17, 2].isnan()
    with flowpost.checking(), pytest.raises(flowpost.NonFiniteError) as error:
        call(z, torch.zeros(8))
    assert str(error.value) == "z: 3 of 256 rows are not finite (first: row 17, feature 2 = nan)"
    context = torch.zeros(256, 8)
    context[3, 7] = -torch.inf
    with flowpost.checking(), pytest.raises(flowpost.NonFiniteError, match="context: 1 of 256 rows .* = -inf"):
        call(torch.zeros(256, 4), context)


@pytest.mark.parametrize("name", ["full_covariance", "planar", "maf"])
def test_values_are_not_asked_for_within_vmap(name: str) -> None:
    """Which has none to give: gradients of each example, and `inference_gaps`, raised."""
    posterior = small(name)
    h, z = torch.randn(5, FEATURES, dtype=torch.float64), torch.randn(5, DIM, dtype=torch.float64)

    def score(h: Tensor, z: Tensor) -> Tensor:
        return posterior(h, noise=z).log_prob + posterior.log_prob(z, h)

    with flowpost.checking():
        found = torch.func.vmap(torch.func.grad(score))(h, z)
    leaf = h.requires_grad_()
    score(leaf, z).sum().backward()
    torch.testing.assert_close(found, leaf.grad)


def test_non_finite_features_are_blamed_on_the_encoder() -> None:
    h = torch.zeros(5, 3)
    h[4, 1] = torch.inf
    posterior = flowpost.planar(3, dim=2)
    log_q = posterior(h).log_prob
    assert log_q[4].isnan()
    assert log_q[:4].isfinite().all()
    with flowpost.checking(), pytest.raises(flowpost.NonFiniteError, match="^h: 1 of 5 .*encoder's output is not fin"):
        posterior(h)

    class Log(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.log(x)

    wrapped = flowpost.wrap(Log(), 2, features=3, flow="planar")
    with flowpost.checking(), pytest.raises(flowpost.NonFiniteError, match="^context: .*its input was finite$"):
        wrapped(torch.zeros(5, 3))


def test_an_inaccurate_inverse_is_named() -> None:
    y = torch.ones(32, 2)
    Wrong(2).inverse(y)
    with flowpost.checking(), pytest.raises(flowpost.InversionError) as error:
        Wrong(2).inverse(y)
    assert str(error.value).startswith("inverse: residual 0.82 > ")
    assert "in 1 of 32 rows; the flow is too ill-conditioned for float32 here (worst scale product 2e-01)" in str(
        error.value
    )


def test_an_ill_conditioned_log_prob_warns() -> None:
    posterior = flowpost.FlowPosterior(0, Steep(1))
    z = torch.tensor([[1.0], [1.0 + 2**-20]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior.log_prob(z)
    match = "log_prob: moves by .* nats when z moves by 4 ulp in 2 of 2 rows; use the log q returned by sample"
    with flowpost.checking(), pytest.warns(flowpost.IllConditionedWarning, match=match):
        posterior.log_prob(z)


def test_good_flows_pass_and_results_are_the_same() -> None:
    posterior, h = flowpost.iaf(3, dim=4, hidden=(16,)), torch.randn(6, 3)
    sample = posterior(h, sample_shape=(2,))
    with flowpost.checking():
        assert torch.equal(posterior(h, sample_shape=(2,), noise=sample.noise).z, sample.z)
        torch.testing.assert_close(posterior.log_prob(sample.z, h), sample.log_prob, rtol=1e-5, atol=1e-5)


def test_a_sample_of_other_features_is_not_one_s_own() -> None:
    posterior, h = flowpost.planar(3, dim=4), torch.randn(6, 3)
    sample = posterior(h, (2,))
    other = torch.cat([h[:4], h[4:] + 1])
    posterior.path_log_prob(sample, other)
    with flowpost.checking():
        assert torch.equal(posterior.path_log_prob(sample, h), sample.log_prob)
        with pytest.raises(
            ValueError, match=r"^sample: expected one that this posterior drew for this h, got 4 of 12 "
        ):
            posterior.path_log_prob(sample, other)


def test_the_switch_is_local_to_its_block_and_thread() -> None:
    seen = []
    with flowpost.checking():
        thread = threading.Thread(target=lambda: seen.append(active()))
        thread.start()
        thread.join()
        assert active()
    assert not active()
    assert seen == [False]


def test_compiled_code_does_not_look() -> None:
    step = torch.compile(Planar(2), backend="eager", fullgraph=True)
    z = torch.full((3, 2), torch.nan)
    with flowpost.checking():
        assert step(z, torch.ones(5))[0].isnan().all()
