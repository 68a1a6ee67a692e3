"""Several z an example, in a loss of one's own: tokens with a mask, pixels, and groups of latents."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal

import flowpost
from flowpost import FlowPosterior, wrap
from flowpost.objectives import elbo
from flowpost.wrapped import WrappedPosterior

BATCH, TOKENS, WORDS, WIDTH, DIM = 4, 6, 11, 8, 3
FLOWS = ("diagonal", "full_covariance", "planar", "iaf", "realnvp")
STANDARD = Normal(0.0, 1.0)


class Transformer(nn.Module):
    """A transformer with attention to the tokens that are there."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.body(self.embed(tokens), src_key_padding_mask=~mask)


class Language(nn.Module):
    """One z a token, and a decoder with attention, which has the mask too."""

    def __init__(self, flow: str) -> None:
        super().__init__()
        example = {"tokens": torch.zeros(1, 2, dtype=torch.long), "mask": torch.ones(1, 2, dtype=torch.bool)}
        self.posterior: WrappedPosterior = wrap(Transformer(), DIM, example=example, flow=flow)
        self.read = nn.Linear(DIM, WIDTH)
        self.body = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True)
        self.word = nn.Linear(WIDTH, WORDS)

    def forward(self, tokens: Tensor, mask: Tensor, noise: Tensor) -> Tensor:
        """The ELBO of each example."""
        sample = self.posterior(tokens, mask, noise=noise)
        log_q = (sample.log_prob * mask).sum(-1)
        log_prior = (STANDARD.log_prob(sample.z).sum(-1) * mask).sum(-1)
        logits = self.word(self.body(self.read(sample.z), src_key_padding_mask=~mask))
        log_words = logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        return elbo((log_words * mask).sum(-1), log_prior, log_q)


class Batch(NamedTuple):
    """Tokens, which of them are there, and the noise."""

    tokens: Tensor
    mask: Tensor
    noise: Tensor


def batch() -> Batch:
    mask = torch.arange(TOKENS) < torch.tensor([6, 4, 1, 3]).unsqueeze(-1)
    return Batch(torch.randint(WORDS, (BATCH, TOKENS)), mask, torch.randn(BATCH, TOKENS, DIM))


def values_and_gradients(model: Language, given: Batch) -> tuple[Tensor, list[Tensor]]:
    bound = model(*given)
    return bound, list(torch.autograd.grad(bound.sum(), list(model.parameters())))


@pytest.mark.parametrize("flow", FLOWS)
def test_masked_tokens_count_exactly_nothing(flow: str) -> None:
    """Neither words nor noise of the padding move a bit of the ELBO, or of any gradient."""
    model, given = Language(flow), batch()
    bound, gradients = values_and_gradients(model, given)
    there = given.mask
    other = given._replace(
        tokens=torch.where(there, given.tokens, (given.tokens + 5) % WORDS),
        noise=torch.where(there.unsqueeze(-1), given.noise, 3.0),
    )
    again, others = values_and_gradients(model, other)
    assert torch.equal(bound, again)
    for (name, _), first, second in zip(model.named_parameters(), gradients, others, strict=True):
        assert torch.equal(first, second), name
    moved = given._replace(noise=given.noise + 0.1 * there.unsqueeze(-1))
    assert (values_and_gradients(model, moved)[0] != bound).all()


@pytest.mark.parametrize("flow", FLOWS)
def test_padding_is_as_if_it_were_cut_off(flow: str) -> None:
    model, given = Language(flow).double(), batch()
    noise = given.noise.double()
    bound = model(given.tokens, given.mask, noise)
    for row, length in enumerate(given.mask.sum(-1).tolist()):
        cut = slice(row, row + 1), slice(0, length)
        alone = model(given.tokens[cut], given.mask[cut], noise[cut])
        torch.testing.assert_close(bound[row : row + 1], alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("flow", FLOWS)
def test_pixels_are_as_many_vectors(flow: str) -> None:
    """One z a pixel by a convolution of 1 x 1 is what the same numbers give in rows; log q's of an image add up."""
    encoder, x = nn.Conv2d(5, 2 * DIM, 1).double(), torch.randn(2, 5, 3, 4, dtype=torch.float64)
    posterior = wrap(encoder, DIM, example=x, read=lambda out: out.movedim(1, -1).chunk(2, -1), flow=flow)
    noise = torch.randn(2, 3, 4, DIM, dtype=torch.float64)
    sample = posterior(x, noise=noise)
    assert sample.log_prob.shape == (2, 3, 4)
    rows = posterior(x.movedim(1, -1).reshape(-1, 5, 1, 1), noise=noise.reshape(-1, 1, 1, DIM))
    torch.testing.assert_close(sample.z.reshape(-1, DIM), rows.z.reshape(-1, DIM), rtol=1e-12, atol=1e-12)
    total = rows.log_prob.reshape(2, 12).sum(-1)
    torch.testing.assert_close(sample.log_prob.sum((-2, -1)), total, rtol=1e-12, atol=1e-12)


def test_the_elbo_of_pixels_is_that_of_the_flat_gaussian() -> None:
    """Where the posterior is the encoder's own Gaussian, one z a pixel and one z an image are one and the same."""
    encoder, x = nn.Conv2d(1, 2 * DIM, 3, padding=1).double(), torch.randn(2, 1, 3, 4, dtype=torch.float64)
    each = wrap(encoder, DIM, example=x, read=lambda out: out.movedim(1, -1).chunk(2, -1), flow="diagonal")
    size = DIM * 12
    flat = wrap(
        encoder, size, example=x, read=lambda out: [part.flatten(1) for part in out.chunk(2, 1)], flow="diagonal"
    )
    noise = torch.randn(2, DIM, 3, 4, dtype=torch.float64)
    pixels, image = each(x, noise=noise.movedim(1, -1)), flat(x, noise=noise.flatten(1))
    torch.testing.assert_close(pixels.z.movedim(-1, 1).flatten(1), image.z, rtol=1e-12, atol=1e-12)
    found = elbo(
        -pixels.z.square().sum((-3, -2, -1)),
        STANDARD.log_prob(pixels.z).sum((-3, -2, -1)),
        pixels.log_prob.sum((-2, -1)),
    )
    expected = elbo(-image.z.square().sum(-1), STANDARD.log_prob(image.z).sum(-1), image.log_prob)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="sum over tokens"):
        elbo(-pixels.z.square().sum((-3, -2, -1)), STANDARD.log_prob(pixels.z).sum(-1), pixels.log_prob)


def test_log_q_of_two_groups_is_that_of_the_joint_gaussian() -> None:
    """The second group is linear in the first, so that the two are jointly Gaussian, with a density that is known."""
    top, bottom = flowpost.diagonal(0, 1).double(), flowpost.diagonal(1, 1).double()
    loc, scale = (part.item() for part in group(top))
    slope = 0.7
    with torch.no_grad():
        bottom.head.weight.copy_(torch.tensor([[slope], [0.0]], dtype=torch.float64))  # pyright: ignore
        bottom.head.bias[0] = 0.3  # pyright: ignore
    first = top(sample_shape=(50,))
    second = bottom(first.z)
    width = (second.z - slope * first.z - 0.3)[0] / second.noise[0]
    mean = torch.tensor([loc, slope * loc + 0.3], dtype=torch.float64)
    tril = torch.tensor([[scale, 0.0], [slope * scale, width.item()]], dtype=torch.float64)
    joint = torch.distributions.MultivariateNormal(mean, scale_tril=tril)
    expected = joint.log_prob(torch.cat([first.z, second.z], -1))
    torch.testing.assert_close(first.log_prob + second.log_prob, expected, rtol=1e-10, atol=1e-10)


def group(posterior: FlowPosterior) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a Gaussian of one variable."""
    loc, tril = posterior.at().gaussian()
    return loc.detach().squeeze(), tril.detach().squeeze()
