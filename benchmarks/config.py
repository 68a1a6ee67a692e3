"""What decides a job's figures: the options, their ranges, and what they are for each data set if nothing is said."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import PurePath
from typing import Any

import torch

from benchmarks.data import NAMES
from benchmarks.errors import ConfigError as ConfigError
from benchmarks.errors import check_choice, check_limit, check_range, tuples
from benchmarks.flows import LARGE_FLOWS, SMALL_FLOWS, parse_prior, try_options
from benchmarks.models import POSTERIORS
from benchmarks.optimizers import RATES, Optimization
from benchmarks.own.networks import find, source_hash
from benchmarks.own.values import parse

BASIC = ("diagonal", "full_covariance", "planar", "iaf")  # the posteriors of a job, if nothing is said
ALL = "all"  # stands for every posterior
OBJECTIVES = ("elbo", "iwae", "renyi")
LOGS = ("", "csv", "tensorboard")
GRADIENTS = ("standard", "stl", "dreg")
# What an objective has if nothing is said: samples of z for each image in a training step, and the order alpha.
USUAL = {"elbo": {}, "iwae": {"train_samples": 5}, "renyi": {"train_samples": 5, "alpha": 0.5}}


def is_file(data: str) -> bool:
    """Whether a data set's name is that of a file of one's own."""
    return data.endswith(".npz")


def posterior_names(given: Iterable[str]) -> tuple[str, ...]:
    """The posteriors asked for, once each: an element is a name, several with commas between them, or `ALL`.

    Raises:
        ConfigError: there is no such posterior.
    """
    names = [name.strip() for part in given for name in part.split(",")]
    for name in names:
        check_choice("posterior", name, (*POSTERIORS, ALL))
    return tuple(dict.fromkeys(each for name in names for each in (POSTERIORS if name == ALL else (name,))))


@dataclass(frozen=True)
class Config:
    """Everything but the seed that decides a run's figures; the same for every posterior but for `flows`.

    Raises:
        ConfigError: a value is out of range, said in one line.
    """

    data: str = "digits"
    posteriors: tuple[str, ...] = BASIC
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 150  # at most; early stopping ends most runs before
    patience: int = 30  # epochs without a better validation -ELBO, after the warm-up, that end a run
    kl_warmup: int = 20  # epochs over which the KL's weight rises linearly to 1
    dim: int = 16  # of z
    width: int = 256  # of the two hidden layers of encoder and decoder
    encoder_width: int = 0  # of the encoder's, where they are not `width`
    networks: str = ""  # module:function that makes other ones
    decoder_of: str = ""  # folder of a finished job whose decoder is taken and stays as it is
    prior: str = ""  # a learned p(z), NAME or NAME:STEPS, one of `PRIORS`; N(0, I) if there is none
    batch: int = 128  # images a step
    lr: float = 3e-3  # Adam's, at the start: it falls linearly towards 0 at the last epoch
    dropout: float = 0.0  # share of hidden units dropped in training
    objective: str = "elbo"
    alpha: float = 0.0  # order of the renyi bound, between iwae at 0 and elbo at 1
    train_samples: int = 1  # of z for each image in a training step: K of iwae and renyi
    gradient: str = "standard"  # how the objective is differentiated
    free_bits: float = 0.0  # nats of the KL, of all latents together, that cost nothing
    gaps: bool = False  # whether posteriors are fitted to single test images, to split the gap
    gap_images: int = 100  # of the test part, from its start
    gap_steps: int = 500  # of each of these fits
    trusted_images: int = 50  # of the test part, from its start, whose NLL is annealed too, for the first seed
    samples: int = 5000  # importance samples for each test image behind NLL
    pairs: int = 4000  # (sample, image) pairs evaluated at once: memory
    threads: int = 1  # of PyTorch on the CPU; these nets are too small to gain from more
    device: str = "cpu"
    eager: bool = False  # on a GPU: operation by operation, every step read, and not as one CUDA graph
    flows: Mapping[str, Mapping[str, object]] = field(default_factory=dict)  # the recipes' options
    options: Mapping[str, Mapping[str, object]] = field(default_factory=dict)  # those asked for, which go before
    likelihood: str = ""  # of the values of a file; a data set of `NAMES` has its own
    data_hash: str = ""  # SHA-256 of a file of one's own
    networks_hash: str = ""  # and of the file that the networks stand in
    optimization: Optimization = field(default_factory=Optimization)  # its learning rate aside
    preset: str = ""  # of `benchmarks images`
    encoder: Mapping[str, object] = field(default_factory=dict)  # a preset's: kind and sizes
    decoder: Mapping[str, object] = field(default_factory=dict)
    minutes: float = 0.0  # of training, after which the epoch in hand is the last one; 0 for no limit
    valid_draws: int = 4  # of z for each validation image, the same noise in every epoch; iwae and renyi have their K
    valid_samples: int = 0  # importance samples for each validation image, behind its NLL; 0 for none
    information: int = 1000  # test images of the mutual information, which takes the square of them; 0 for none
    log: str = ""  # of each epoch: csv or tensorboard, or nothing
    images: int = 0  # the first ones of the test part, and of validation's NLL, that are evaluated; 0 for all

    def __post_init__(self) -> None:
        self._check_data()
        for name in self.posteriors:
            check_choice("posterior", name, POSTERIORS)
        positive = ("epochs", "patience", "dim", "width", "batch", "samples", "pairs", "threads", "train_samples")
        for name in (*positive, "valid_draws"):
            check_range(name.replace("_", "-"), getattr(self, name), 1)
        check_range("seeds", len(self.seeds), 1)
        for name in ("kl_warmup", "trusted_images", "valid_samples", "images", "information"):
            check_range(name.replace("_", "-"), getattr(self, name), 0)
        check_limit("minutes", self.minutes)
        if not 0 < self.lr < math.inf:
            raise ConfigError(f"lr: expected a positive number, got {self.lr}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout: expected a share in [0, 1), got {self.dropout}")
        check_range("encoder-width", self.encoder_width, 0)
        parse_prior(self.prior)
        if self.decoder_of and self.prior:
            raise ConfigError(
                f"prior: expected none beside decoder-of, which was trained for N(0, I), got {self.prior}"
            )
        for name, options in self.options.items():
            try_options(name, self.dim, options)
        check_choice("log", self.log, LOGS)
        check_choice("device", self.device.partition(":")[0], ("cpu", "cuda"))
        self._check_objective()

    @property
    def name(self) -> str:
        """The data set's name, without the folder of a file."""
        return PurePath(self.data).name

    @property
    def unit(self) -> str:
        """What one x is called."""
        return "example" if is_file(self.data) else "image"

    @property
    def captured(self) -> bool:
        """Whether a training step is one CUDA graph."""
        return self.device.startswith("cuda") and not self.eager

    def rate(self, epoch: int) -> float:
        """The learning rate after so many epochs."""
        return self.lr * RATES[self.optimization.decay](epoch, self.epochs)

    def model(self, posterior: str) -> dict[str, Any]:
        """What `benchmarks.models.build` is told of a posterior's model, besides its name."""
        prior, options = parse_prior(self.prior)
        return {
            "dim": self.dim,
            "width": self.width,
            "dropout": self.dropout,
            "options": self.options_of(posterior),
            "encoder_width": self.encoder_width,
            "prior": prior,
            "prior_options": {**self.options_of(prior), **options},
            "networks": find(self.networks) if self.networks else None,
        }

    def options_of(self, posterior: str) -> dict[str, object]:
        """What a posterior's recipe is told."""
        return {**self.flows.get(posterior, {}), **self.options.get(posterior, {})}

    def _check_data(self) -> None:
        if not is_file(self.data):
            check_choice("data", self.data, NAMES, "; a file of your own ends in .npz")
            if self.likelihood:
                got = f"got {self.likelihood!r}"
                raise ConfigError(f"likelihood: expected none for {self.data}, which has one of its own, {got}")
        elif self.likelihood:
            parse(self.likelihood)

    def _check_objective(self) -> None:
        """Refuse what would be biased or mean nothing, before anything runs."""
        check_choice("objective", self.objective, OBJECTIVES)
        check_choice("gradient", self.gradient, GRADIENTS)
        if not 0 <= self.alpha < 1:
            raise ConfigError(f"alpha: expected a number in [0, 1), got {self.alpha}; at 1 it is the elbo")
        if self.alpha and self.objective != "renyi":
            raise ConfigError(f"alpha: expected none for {self.objective}, only renyi has one, got {self.alpha}")
        if self.gradient == "dreg" and self.objective == "elbo":
            raise ConfigError(
                "gradient: expected standard or stl for the elbo, whose samples have no weights, got dreg"
            )
        if self.gradient == "stl" and self.objective != "elbo" and self.train_samples > 1:
            got = f"got stl with train-samples {self.train_samples}"
            raise ConfigError(f"gradient: expected standard or dreg for {self.objective}, where stl is biased, {got}")
        if not 0 <= self.free_bits < math.inf:
            raise ConfigError(f"free-bits: expected a finite number of nats >= 0, got {self.free_bits}")
        if self.free_bits and self.objective != "elbo":
            got = f"got {self.free_bits}"
            raise ConfigError(f"free-bits: expected 0 for {self.objective}, which has no KL to spare, {got}")


_DIGITS = Config(flows=SMALL_FLOWS)
_LARGE = Config(
    epochs=100,
    patience=10,
    kl_warmup=10,
    dim=32,
    width=400,
    lr=1e-3,
    samples=500,
    threads=2,
    flows=LARGE_FLOWS,
)
_FREY = replace(_LARGE, epochs=300, patience=30, kl_warmup=20, width=256, batch=64, pairs=400)
DEFAULTS: dict[str, Config] = {name: replace(_LARGE, data=name) for name in NAMES}
DEFAULTS |= {"digits": _DIGITS, "freyfaces": replace(_FREY, data="freyfaces")}
QUICK = {
    "epochs": 40,
    "patience": 20,
    "kl_warmup": 5,
    "samples": 500,
    "trusted_images": 0,
    "seeds": (0,),
    "gap_images": 50,
    "gap_steps": 200,
}


def configure(data: str = "digits", *, quick: bool = False, **given: object) -> Config:
    """The data set's defaults, then those of `quick`, then what was given and is not None.

    Raises:
        ConfigError: a value is out of range, said in one line.
    """
    check_choice("data", data, NAMES, "; a file of your own ends in .npz")
    return settle(DEFAULTS[data], QUICK if quick else {}, given)


def settle(base: Config, quick: Mapping[str, object], given: Mapping[str, object]) -> Config:
    """A data set's defaults, then those of a first look, then what was given and is not None."""
    values = {name: value for name, value in given.items() if value is not None}
    changes = {**USUAL.get(str(values.get("objective")), {}), **quick, **values}
    if networks := values.get("networks"):
        for name in values.keys() & {"width", "encoder_width", "dropout"}:
            option = name.replace("_", "-")
            raise ConfigError(f"{option}: expected none beside networks of your own, got {values[name]}")
        find(str(networks))
        changes["networks_hash"] = source_hash(str(networks))
    return check_device(check_options(replace(base, **changes)))  # pyright: ignore[reportArgumentType]


def check_options(config: Config) -> Config:
    """The configuration, where the job has the recipes whose options are given; of others they would change nothing.

    Raises:
        ConfigError: one is not, said in one line.
    """
    recipes = filter(None, (*config.posteriors, parse_prior(config.prior)[0]))
    for name in config.options.keys() - {*recipes}:
        expected = f"expected those of the job's posteriors ({', '.join(config.posteriors)}) or of its prior"
        raise ConfigError(f"option: {expected}, got {name}")
    return config


def check_device(config: Config) -> Config:
    """The configuration, where its device is there.

    Raises:
        ConfigError: it is not, said in one line.
    """
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError("device: cuda is asked for, but PyTorch finds no CUDA device here; use cpu")
    return config


def from_json(values: Mapping[str, object]) -> Config:
    """The configuration that `dataclasses.asdict` and JSON made of one, or of an earlier version's."""
    names = {item.name for item in fields(Config)} - {"optimization"}
    given: dict = {name: tuples(value) for name, value in values.items() if name in names}
    return Config(**given, optimization=Optimization(**tuples(values.get("optimization", {}))))
