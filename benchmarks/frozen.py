"""A decoder that is trained already and stays as it is: what a posterior makes of it from a cold start."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from benchmarks.config import Config, ConfigError
from flowpost.vae import VAE

_BEFORE = "decoder."  # in the names of a model's tensors
_UNFIT = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError)


def take_decoder(vae: VAE, config: Config) -> None:
    """Put the decoder of a finished job's first model in the place of this one's, and keep it from training.

    Raises:
        ConfigError: there is no such model, or its decoder is of other sizes, data or another prior.
    """
    folder = Path(config.decoder_of)
    try:
        report = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        first = next(run for run in report["runs"] if run["error"] is None)
        then = report["configuration"]
        prior, data = then.get("prior", ""), (then.get("data_hash") or then["data"], then.get("likelihood", ""))
        tensors = load_file(folder / "models" / f"{first['posterior']}-{first['seed']}.safetensors")
        own = [name for name in tensors if name.startswith(_BEFORE)]
        vae.decoder.load_state_dict({name.removeprefix(_BEFORE): tensors[name] for name in own})
    except (*_UNFIT, StopIteration, SafetensorError) as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(
            f"decoder-of: expected the folder of a job with a model of these sizes, got {folder}: {what}"
        ) from error
    if prior:
        raise ConfigError(f"decoder-of: expected a decoder that was trained for N(0, I), got one for prior {prior}")
    ours = config.data_hash or config.data, config.likelihood
    if data != ours:
        wanted, got = (", ".join(filter(None, each)) for each in (ours, data))
        raise ConfigError(f"decoder-of: expected a decoder that was trained on the same data, {wanted}, got {got}")
    vae.decoder.requires_grad_(requires_grad=False)
