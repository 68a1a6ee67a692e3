"""The encoders that people have, each with random weights, an input, and the one line that wraps it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributions import Normal

from benchmarks.encoders import libraries as lib
from benchmarks.peers import here
from flowpost import wrap
from flowpost.wrapped import WrappedPosterior

DIM = 4
INPUTS = 6
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """One encoder and what there is to know of it.

    Args:
        name: in the table.
        make: the encoder, with random weights.
        inputs: of the encoder, as `wrap` takes an example: a tensor, or a dict for keywords.
        read: the source of the function that is `wrap`'s ``read=``; empty where none is needed.
        own: from its output to mean and standard deviation of its own Gaussian, by other means than `read`; None for an
            encoder of features.
        library: that has to be installed.
        dim: size of z.
        around: what the encoder runs inside.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    read: str = ""
    own: Callable[[Any], Pair] | None = None
    library: str = "torch"
    dim: int = DIM
    around: Callable[[], AbstractContextManager[None]] = nullcontext

    @property
    def half(self) -> bool:
        """Whether the encoder is of half precision."""
        return self.name in ("bfloat16", "float16")

    @property
    def line(self) -> str:
        """The line that wraps it."""
        return f"wrap(encoder, {self.dim}, example=x{self.read and ', read=' + self.read})"

    def wrapped(self, encoder: nn.Module, inputs: object, flow: str) -> WrappedPosterior:
        """What the line makes, with a flow."""
        read = eval(self.read) if self.read else None  # what is shown is what is run
        return wrap(encoder, self.dim, example=inputs, read=read, flow=flow)

    def missing(self) -> bool:
        """Whether its library is not installed."""
        return not here(self.library)


class Heads(nn.Module):
    """The usual VAE encoder, with whatever it has between; it returns the pair in the form that is wanted."""

    def __init__(self, form: Callable[[Tensor, Tensor], object] = lambda loc, log_var: (loc, log_var)) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(INPUTS, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.2))
        self.loc, self.log_var = nn.Linear(16, DIM), nn.Linear(16, DIM)
        self.form = form

    def forward(self, x: Tensor) -> object:
        """The pair, in its form."""
        hidden = self.body(x)
        return self.form(self.loc(hidden), self.log_var(hidden))


class Named(NamedTuple):
    """A pair with names."""

    loc: Tensor
    log_var: Tensor


class Triple(NamedTuple):
    """What many models return beside their pair."""

    hidden: Tensor
    mean: Tensor
    log_variance: Tensor


@dataclass
class Moments:
    """A dataclass, as many models return one."""

    mean: Tensor
    log_variance: Tensor


def _normal(loc: Tensor, log_var: Tensor) -> Normal:
    return Normal(loc, (0.5 * log_var).exp())


def _of_pair(out: Any) -> Pair:  # noqa: ANN401
    loc, log_var = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in out)
    return loc, (0.5 * log_var).exp()


def _of_names(out: Any) -> Pair:  # noqa: ANN401
    return _of_pair((out.mean, out.log_variance))


def _of_dict(mean: str, log_var: str) -> Callable[[Mapping[str, Tensor]], Pair]:
    return lambda out: _of_pair((out[mean], out[log_var]))


def _of_library(out: Tensor) -> Pair:
    """Mean and standard deviation as diffusers has them, for one z an image."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution  # pyright: ignore

    own = DiagonalGaussianDistribution(out)
    return own.mean.flatten(1), own.std.flatten(1)


def _of_library_by_pixel(out: Tensor) -> Pair:
    loc, std = (part.unflatten(1, (2, 7, 7)).movedim(1, -1) for part in _of_library(out))
    return loc, std


def _moments_of_images() -> nn.Module:
    return lib.autoencoder_kl()[0]


def _frozen() -> nn.Module:
    return Heads().requires_grad_(requires_grad=False).eval()


def _compiled() -> nn.Module:
    return cast(nn.Module, torch.compile(Heads(), backend="aot_eager"))


@contextmanager
def _one_process() -> Iterator[None]:
    """A process group of one."""
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield
        finally:
            torch.distributed.destroy_process_group()


def _rows() -> Tensor:
    return torch.randn(5, INPUTS)


def _sequences() -> Tensor:
    return torch.randn(5, 7, INPUTS)


def _images() -> Tensor:
    return torch.rand(3, 1, 28, 28)


def _names(mean: str, log_variance: str) -> str:
    return f"lambda out: (out.{mean}, out.{log_variance})"


CASES = (
    Case("a pair", Heads, _rows, own=_of_pair),
    Case("NamedTuple, a pair", lambda: Heads(Named), _rows, own=_of_pair),
    Case(
        "NamedTuple of three",
        lambda: Heads(lambda loc, log_var: Triple(loc, loc, log_var)),
        _rows,
        "lambda out: out[1:]",
        _of_names,
    ),
    Case(
        "dict",
        lambda: Heads(lambda loc, log_var: {"mu": loc, "logvar": log_var}),
        _rows,
        'lambda out: (out["mu"], out["logvar"])',
        _of_dict("mu", "logvar"),
    ),
    Case("dataclass", lambda: Heads(Moments), _rows, _names("mean", "log_variance"), _of_names),
    Case("Normal", lambda: Heads(_normal), _rows, own=lambda out: (out.mean, out.stddev)),
    Case(
        "mean and std",
        lambda: Heads(lambda loc, log_var: (loc, (0.5 * log_var).exp())),
        _rows,
        "lambda out: Normal(*out)",
        own=lambda out: out,
    ),
    Case("bfloat16", lambda: Heads().bfloat16(), lambda: _rows().bfloat16(), own=_of_pair),
    Case("float16", lambda: Heads().half(), lambda: _rows().half(), own=_of_pair),
    Case("frozen, with BatchNorm and dropout", _frozen, _rows, own=_of_pair),
    Case("torch.compile", _compiled, _rows, own=_of_pair),
    Case(
        "DistributedDataParallel",
        lambda: nn.parallel.DistributedDataParallel(Heads()),
        _rows,
        own=_of_pair,
        around=_one_process,
    ),
    Case("GRU, last state", lambda: nn.GRU(INPUTS, 16, batch_first=True), _sequences, "lambda out: out[1][-1]"),
    Case("LSTM, last state", lambda: nn.LSTM(INPUTS, 16, batch_first=True), _sequences, "lambda out: out[1][0][-1]"),
    Case("LSTM, every step", lambda: nn.LSTM(INPUTS, 16, batch_first=True), _sequences, "lambda out: out[0]"),
    Case(
        "pythae MLP",
        lib.pythae_mlp,
        _images,
        _names("embedding", "log_covariance"),
        _of_dict("embedding", "log_covariance"),
        "pythae",
    ),
    Case(
        "pythae convolutions",
        lib.pythae_conv,
        _images,
        _names("embedding", "log_covariance"),
        _of_dict("embedding", "log_covariance"),
        "pythae",
    ),
    Case(
        "diffusers AutoencoderKL, one z an image",
        _moments_of_images,
        _images,
        "lambda out: [part.flatten(1) for part in out.chunk(2, 1)]",
        _of_library,
        "diffusers",
        dim=2 * 7 * 7,
    ),
    Case(
        "diffusers AutoencoderKL, one z a pixel",
        _moments_of_images,
        _images,
        "lambda out: out.movedim(1, -1).chunk(2, -1)",
        _of_library_by_pixel,
        "diffusers",
        dim=2,
    ),
    Case(
        "transformers ViT, first token",
        lib.vit,
        _images,
        "lambda out: out.last_hidden_state[:, 0]",
        library="transformers",
    ),
    Case(
        "transformers ViT, every token", lib.vit, _images, "lambda out: out.last_hidden_state", library="transformers"
    ),
    Case("transformers BERT, pooled", lib.bert, lib.words, "lambda out: out.pooler_output", library="transformers"),
    Case(
        "torchvision ResNet, features",
        lambda: lib.torchvision_resnet(None),
        lambda: torch.rand(3, 3, 32, 32),
        library="torchvision",
    ),
    Case(
        "torchvision ResNet, loc and log_var",
        lambda: lib.torchvision_resnet(2 * DIM),
        lambda: torch.rand(3, 3, 32, 32),
        "lambda out: out.chunk(2, -1)",
        lambda out: _of_pair((out[:, :DIM], out[:, DIM:])),
        "torchvision",
    ),
    Case("timm ResNet, features", lib.timm_resnet, _images, library="timm"),
)
