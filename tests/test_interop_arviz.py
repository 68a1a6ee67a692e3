"""Draws of chosen examples as a `DataTree` of ArviZ 1."""

import math
from collections.abc import Callable

import numpy
import pytest
import torch
from small import DIM, FEATURES, small

pytest.importorskip("arviz_base", reason="ArviZ comes with the extra flowpost[arviz]")

from flowpost.interop.arviz import draws_to_datatree, to_datatree  # noqa: E402

CHOSEN = [3, 17]


def features() -> torch.Tensor:
    return torch.randn(20, FEATURES, dtype=torch.float64)


def test_the_draws_are_the_chosen_examples_own() -> None:
    posterior, h = small("iaf"), features()
    torch.manual_seed(1)
    tree = to_datatree(posterior.at(h[CHOSEN]), 50, chains=2, examples=CHOSEN)
    torch.manual_seed(1)
    z, log_q, _ = posterior(h[CHOSEN], (2, 50))
    draws, scores = tree["posterior"]["z"], tree["sample_stats"]["log_q"]
    assert draws.dims == ("chain", "draw", "example", "latent")
    assert scores.dims == ("chain", "draw", "example")
    assert draws.coords["example"].values.tolist() == CHOSEN
    for i, label in enumerate(CHOSEN):
        assert (draws.sel(example=label).values == z[:, :, i].detach().numpy()).all()
        assert (scores.sel(example=label).values == log_q[:, :, i].detach().numpy()).all()
    assert tree.attrs["inference_library"] == "flowpost"


@pytest.mark.parametrize("examples", [numpy.array(CHOSEN), torch.tensor(CHOSEN)], ids=["array", "tensor"])
def test_labels_may_be_an_array_or_a_tensor(examples: numpy.ndarray | torch.Tensor) -> None:
    tree = to_datatree(small("iaf").at(features()[CHOSEN]), 5, examples=examples)
    assert tree["posterior"]["z"].coords["example"].values.tolist() == CHOSEN
    assert tree["posterior"]["z"].sel(example=17).shape == (1, 5, DIM)


def test_moments_of_a_gaussian() -> None:
    q = small("full_covariance").at(features()[:1])
    draws = to_datatree(q, 4000, name="theta")["posterior"]["theta"].squeeze()
    assert draws.shape == (4000, DIM)
    error = (draws.mean("draw").values - q.mean[0].detach().numpy()) / q.stddev[0].detach().numpy()
    assert abs(error).max() < 4 / math.sqrt(4000)


def test_a_posterior_without_examples() -> None:
    tree = to_datatree(small("planar", features=0).at(), 5)
    assert tree["posterior"]["z"].shape == (1, 5, DIM)
    assert tree["sample_stats"]["log_q"].dims == ("chain", "draw")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda q: to_datatree(small("iaf")), TypeError, "^q: expected a FlowDistribution"),  # pyright: ignore
        (lambda q: to_datatree(q.expand((2, 20))), ValueError, r"^q: expected batch shape \(examples,\)"),
        (lambda q: to_datatree(q, examples=CHOSEN), ValueError, "^examples: expected 20 labels, one for each .* got 2"),
        (
            lambda q: to_datatree(small("iaf", 0).at(), examples=[3]),
            ValueError,
            "^examples: expected 0 labels, .* got 1",
        ),
        (lambda q: to_datatree(q, name="log_q"), ValueError, "^name: expected another one than .* got 'log_q'"),
        (lambda q: to_datatree(q, name="draw"), ValueError, "^name: expected another one than .* got 'draw'"),
        (lambda q: to_datatree(q, name="latent"), ValueError, "^name: expected another one than .* got 'latent'"),
        (
            lambda q: draws_to_datatree({"chain": torch.zeros(4)}, {}),
            ValueError,
            "^values: expected names other than ArviZ's axes, chain and draw, got 'chain'",
        ),
        (lambda q: to_datatree(q, 0), ValueError, "^draws: expected an int >= 1"),
        (lambda q: to_datatree(q, chains=0), ValueError, "^chains: expected an int >= 1"),
    ],
)
def test_bad_input_is_named(call: Callable[[object], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(small("iaf").at(features()))
