"""Encoders that people have, of torch and of public libraries: one line wraps each, and each mistake names its cure.

The libraries come with the extra `encoders` (`make test-encoders`); without them their encoders are skipped.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal

from benchmarks.encoders import libraries as lib
from benchmarks.encoders.collection import CASES, DIM, INPUTS, Case, Heads
from benchmarks.encoders.starts import FLOWS, call, start
from flowpost import Planar, wrap

SINGLE, DOUBLE = 1.5e-6, 1e-8
"""Of a z between 2 and 4, whose half last digit is 1.2e-7: two roundings in each of iaf's four gates, two in the affine
map. In float64 the soft bound of log_var is what is left."""


def marked(cases: tuple[Case, ...]) -> list[Any]:
    marks = {"torch.compile": [pytest.mark.compile]}
    return [pytest.param(case, id=case.name, marks=marks.get(case.name, [])) for case in cases]


def have(case: Case) -> None:
    need(case.library)


def need(library: str) -> None:
    pytest.importorskip(library, reason=f"{library} comes with the extra `encoders`")


@pytest.mark.parametrize("case", marked(tuple(case for case in CASES if case.own)))
def test_it_starts_at_the_encoder_s_own_gaussian(case: Case) -> None:
    have(case)
    found = start(case)
    assert found.single is not None
    assert found.single.keys() == set(FLOWS)
    assert max(found.single.values()) <= SINGLE
    assert (found.double is None) == case.half
    assert found.double is None or max(found.double.values()) <= DOUBLE


BY_HAND: dict[str, Callable[[Any], Tensor]] = {
    "GRU, last state": lambda out: out[0][:, -1],
    "LSTM, last state": lambda out: out[0][:, -1],
    "LSTM, every step": lambda out: out[0],
    "transformers ViT, first token": lambda out: out[0].select(1, 0),
    "transformers ViT, every token": lambda out: out[0],
    "transformers BERT, pooled": lambda out: out[1],
    "torchvision ResNet, features": lambda out: out,
    "timm ResNet, features": lambda out: out,
}


@pytest.mark.parametrize("case", marked(tuple(case for case in CASES if not case.own)))
@pytest.mark.parametrize("flow", FLOWS)
def test_features_are_the_encoder_s(case: Case, flow: str) -> None:
    have(case)
    encoder, inputs = case.make().eval(), case.inputs()
    wrapped = case.wrapped(encoder, inputs, flow)
    features = BY_HAND[case.name](call(encoder, inputs))
    sample = call(wrapped, inputs, sample_shape=(2,))
    expected = wrapped.posterior(features, (2,), sample.noise)
    assert torch.equal(sample.z, expected.z)
    assert torch.equal(sample.log_prob, expected.log_prob)
    assert sample.log_prob.shape == (2, *features.shape[:-1])


@pytest.mark.parametrize("case", marked(CASES))
def test_the_line_that_is_shown_wraps_and_trains(case: Case) -> None:
    have(case)
    with case.around():
        encoder, inputs = case.make(), case.inputs()
        here = {"wrap": wrap, "encoder": encoder, "x": inputs, "Normal": Normal}
        posterior = eval(case.line, here).train()
        z, log_q, _ = call(posterior, inputs)
        assert z.shape == (*log_q.shape, case.dim)
        (log_q - Normal(0.0, 1.0).log_prob(z).sum(-1) + z.sum(-1).sin()).mean().backward()
        assert all(each.grad is not None for each in posterior.posterior.parameters())
        gradients = [each.grad for each in encoder.parameters() if each.grad is not None]
        assert all(each.isfinite().all() for each in gradients)
        assert any((each != 0).any() for each in gradients) != case.name.startswith("frozen")


def test_a_wrapped_encoder_in_several_processes_has_the_same_gradients() -> None:
    case = next(case for case in CASES if case.name == "DistributedDataParallel")
    encoder, x = Heads().eval(), torch.randn(4, INPUTS)
    posterior, noise = wrap(encoder, DIM, example=x), torch.randn(4, DIM)
    with case.around():
        model = nn.parallel.DistributedDataParallel(posterior)
        found = torch.autograd.grad(model(x, noise=noise).log_prob.sum(), encoder.loc.weight)
    expected = torch.autograd.grad(posterior(x, noise=noise).log_prob.sum(), encoder.loc.weight)
    assert torch.equal(found[0], expected[0])


# ------------------------------------------------------------------------------------------------------------ mistakes


def feature_map() -> nn.Module:
    """A ResNet without its pooling and its last layer."""
    return nn.Sequential(*[*lib.torchvision_resnet().children()][:-2])


class Correlated(Heads):
    """An encoder that returns a full covariance."""

    def forward(self, x: Tensor) -> MultivariateNormal:
        loc, _ = super().forward(x)  # pyright: ignore[reportGeneralTypeIssues]
        return MultivariateNormal(loc, torch.eye(DIM) + 0.5)


def rows() -> Tensor:
    return torch.randn(5, INPUTS)


def grey() -> Tensor:
    return torch.rand(3, 1, 28, 28)


MISTAKES: dict[str, tuple[str, Callable[[], Any], Callable[[], Any], dict[str, Any], str]] = {
    "a feature map": ("torchvision", feature_map, lambda: torch.rand(2, 3, 64, 64), {},
        r"got shape \(2, 512, 2, 2\): pass read=lambda out: out.flatten\(1\) for one z an example, "
        r"or read=lambda out: out.movedim\(1, -1\) for one z a pixel"),
    "moments as channels": ("diffusers", lambda: lib.autoencoder_kl()[0], grey, {},
        r"got shape \(3, 4, 7, 7\): pass read=lambda out: out.flatten\(1\)"),
    "channels split on another axis": ("diffusers", lambda: lib.autoencoder_kl()[0], grey,
        {"read": lambda out: out.chunk(2, 1)}, r"got a tuple of .*; pass a read= that gives the pair"),
    "a ModelOutput": ("pythae", lib.pythae_mlp, grey, {},
        "got ModelOutput of embedding, log_covariance; pass read= a function from it"),
    "a ViT's output": ("transformers", lib.vit, grey, {},
        "got BaseModelOutputWithPooling of last_hidden_state, pooler_output; pass read= a function from it"),
    "another width": ("pythae", lambda: lib.pythae_mlp(dim=5), grey,
        {"read": lambda out: (out.embedding, out.log_covariance)}, "pass dim=5, or a read= that gives the pair"),
    "features with a pair": ("torch", Heads, rows, {"features": 8}, r"none with the pair .* got 8; leave it out"),
    "options with a bijector": ("torch", Heads, rows, {"flow": Planar(DIM), "steps": 2}, "got steps; make it with"),
    "an unknown option": ("torch", Heads, rows, {"depth": 2}, "iaf takes steps, hidden, .*; got depth"),
    "mean and std": ("torch", lambda: Heads(lambda loc, log_var: (loc, log_var.exp())), rows, {},
        r"looks like a standard deviation.*read=lambda out: torch.distributions.Normal\(\*out\)"),
    "twice as wide": ("torchvision", lambda: lib.torchvision_resnet(2 * DIM), lambda: torch.rand(2, 3, 32, 32), {},
        r"8 wide, twice dim.* pass read=lambda out: out.chunk\(2, -1\); features=8 says"),
    "a GRU": ("torch", lambda: nn.GRU(INPUTS, DIM, batch_first=True), lambda: torch.randn(1, 7, INPUTS), {},
        r"its outputs and its last state; pass read=lambda out: out\[1\]\[-1\] for one z a sequence"),
    "an LSTM": ("torch", lambda: nn.LSTM(INPUTS, DIM, batch_first=True), lambda: torch.randn(5, 7, INPUTS), {},
        r"; pass read=lambda out: out\[1\]\[0\]\[-1\] for one z a sequence, or read=lambda out: out\[0\] for one"),
    "a function": ("torch", lambda: torch.tanh, rows, {}, "write a torch.nn.Module whose forward calls it"),
    "a method": ("diffusers", lambda: kl_model().encode, grey, {},
        "pass the AutoencoderKL itself, or a module of your own whose forward calls encode"),
    "correlations": ("torch", Correlated, rows, {},
        r"read=lambda out: \(out.mean, out.variance.log\(\)\), and flow='full_covariance' learns correlations again"),
}  # fmt: skip


def kl_model() -> Any:  # noqa: ANN401
    from diffusers import AutoencoderKL  # pyright: ignore

    return AutoencoderKL()


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_names_its_cure(name: str) -> None:
    library, make, inputs, options, cure = MISTAKES[name]
    need(library)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # so that a warning raises
        with pytest.raises((TypeError, ValueError, UserWarning), match=cure):
            wrap(make(), DIM, example=inputs(), **options)
