"""Encoders and decoders of published tables, by kind: what the files of `benchmarks.images` name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from benchmarks.data import Data
from benchmarks.errors import ConfigError
from benchmarks.networks import gated, mlp, residual
from benchmarks.networks.pixels import Features, Grey, start_at_mean

if TYPE_CHECKING:
    from benchmarks.config import Config
    from benchmarks.models import Networks

ENCODERS: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp.encoder,
    "gated": gated.encoder,
    "residual": residual.encoder,
}
"""Each from x's shape and options to a network of ``(B, *event)`` that gives features ``(B, features)``."""
DECODERS: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp.decoder,
    "gated": gated.decoder,
    "residual": residual.decoder,
}
"""Each from z's size, x's shape, the likelihood's numbers and options to a network of ``(B, dim)``."""


def model_of(config: Config, data: Data, posterior: str) -> dict[str, Any]:
    """What `benchmarks.models.build` is told of a posterior's model, besides data and name."""
    networks = networks_of(config, data)
    return config.model(posterior) | ({} if networks is None else {"networks": networks})


def networks_of(config: Config, data: Data) -> Networks | None:
    """What makes a preset's encoder and decoder, the encoder first; None where it is no preset's.

    Raises:
        ConfigError: there is no such kind, or it has no such option.
    """
    if not config.encoder:
        return None

    def make(shape: torch.Size, dim: int, numbers: int) -> tuple[nn.Module, nn.Module]:
        layers = _made("encoder", ENCODERS, config.encoder, shape)
        encoder = Features(Grey(data, centre=bool(config.encoder.get("centre"))), layers, data.train[:1])
        decoder = _made("decoder", DECODERS, config.decoder, dim, shape, numbers)
        if config.decoder.get("start") == "mean":
            start_at_mean(decoder, data)
        return encoder, decoder

    return make


def _made(
    what: str, kinds: Mapping[str, Callable[..., nn.Module]], given: Mapping[str, object], *sizes: object
) -> nn.Module:
    """A network of the kind that is given, with the options that are not for the pixels."""
    options = {key: value for key, value in given.items() if key not in ("kind", "centre", "start")}
    kind = str(given.get("kind"))
    if kind not in kinds:
        raise ConfigError(f"{what}: expected one of {', '.join(kinds)}, got {kind!r}")
    known = inspect.signature(kinds[kind]).parameters
    unknown = [key for key in options if key not in known]
    if unknown:
        raise ConfigError(f"{what}: expected options of {kind} ({', '.join(known)}), got {', '.join(unknown)}")
    return kinds[kind](*sizes, **options)
