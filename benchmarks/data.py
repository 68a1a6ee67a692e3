"""The image data sets of the benchmarks, each with its fixed split: `load("digits")`.

`digits` ships beside this module. The others are looked for in the folder that the environment variable `FLOWPOST_DATA`
names; MNIST and its static binarization are else downloaded. Every array is verified (see `benchmarks.download`).
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.download import DataError, Source, fetch, read, wanted
from benchmarks.split import permuted_parts

__all__ = ["NAMES", "SOURCES", "Data", "DataError", "binarize", "load"]

MNIST = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/")
LAROCHELLE = ("http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/",)


def _idx(name: str, shape: tuple[int, ...], digest: str) -> Source:
    return Source((f"mnist/{name}.gz", f"mnist/{name}"), name, shape, digest, MNIST)


def _static(part: str, rows: int, digest: str) -> Source:
    text = f"binarized_mnist/binarized_mnist_{part}.amat"
    files = (text, f"{text}.gz", "binarized_mnist/binarized_mnist.npz")
    return Source(files, part, (rows, 28, 28), digest, LAROCHELLE)


def _npz(file: str, key: str, shape: tuple[int, ...], digest: str) -> Source:
    return Source((file,), key, shape, digest)


_CALTECH = "caltech101_silhouettes/caltech101_silhouettes_28.npz"

SOURCES: dict[str, tuple[Source, ...]] = {
    "digits": (
        _npz("digits.npz", "images", (1797, 8, 8), "4ea96df301d7ae7643badc08d8a01d7857e9e35b51636624666c747dad2254cb"),
        _npz("digits.npz", "labels", (1797,), "0fcc5d537c18bb5bc677c52c67381655f48f9e29813520fcc69494daf7d836b5"),
    ),
    "mnist-static": (
        _static("train", 50000, "024dda6409e765e3c3535bcc98de622591af85bf90ece3eef550afdb8da14403"),
        _static("valid", 10000, "82b24e09572e846a380477341a5061267bdeec8987da5403c5e0b51ea5b5ef04"),
        _static("test", 10000, "c42a7113f7e5532ddfdd0e45ef157b0ada83f0a1411748f96abfdbfb86988c8d"),
    ),
    "mnist": (
        _idx(
            "train-images-idx3-ubyte",
            (60000, 28, 28),
            "783b1c0807cfc66ca1ef125e96f8a41ab816d75b1d8d28920718b6428b08cb9e",
        ),
        _idx(
            "t10k-images-idx3-ubyte",
            (10000, 28, 28),
            "010c0c13f96d5658bae4c04d605aa85a9ac8bc6ce619f5cb5f05aeb402f41514",
        ),
        _idx("t10k-labels-idx1-ubyte", (10000,), "b3b5727c195d9df958a13e9da4e1717a11307903ed50d26abca19d49bb33a8cb"),
    ),
    "freyfaces": (
        _npz(
            "freyfaces/freyfaces.npz",
            "images",
            (1965, 28, 20),
            "427e7802ebf7810587e63d6b70697745b1f0c168edf80676ad5292f97bb0de1f",
        ),
    ),
    "omniglot": (
        _npz(
            "omniglot28/omniglot28.npz",
            "images",
            (1623, 20, 28, 28),
            "1a55f5d844fddb2185b71435ed8f0233accc3862c42fe256c57edd078ca5cb6b",
        ),
    ),
    "caltech": (
        _npz(_CALTECH, "images", (8671, 28, 28), "49daf7466c67b54406eac13b81af5cb9a91eddb65e131f4d408c73250b5cbf03"),
        _npz(_CALTECH, "labels", (8671,), "25bd817993fb119ec6e8ae571d7e30395627dba82eba0feac961c94f7d553364"),
        _npz(_CALTECH, "split", (8671,), "2877361138affcb270a3eb9f4e83acfed0d669a4b477d067c4e503997278d9ac"),
    ),
}


@dataclass(frozen=True, eq=False)
class Data:
    """A data set, split.

    Args:
        name: one of `NAMES`, or the name of a file.
        train: float32, (N, H, W): counts, zeros and ones, or, of a dynamic data set, probabilities. Of a file of one's
            own, (N, *event) and any values.
        valid: as `train`, but binary in a dynamic data set.
        test: as `valid`.
        levels: the largest value a pixel of the likelihood takes: n of the binomial, 1 for binary pixels, 255.
        likelihood: `"binomial"`, `"bernoulli"` or `"categorical"` (over `levels + 1` grey levels); of a file of one's
            own, any of `benchmarks.own.values.KINDS`.
        dynamic: whether `train` holds probabilities, to be drawn afresh at each use by `binarize`.
        labels: int64, the class of each test image, where there are classes.
        scale: of a `"gaussian"` whose scale is not learned.
        unit: what one x is called.
    """

    name: str
    train: Tensor
    valid: Tensor
    test: Tensor
    levels: int
    likelihood: str
    dynamic: bool = False
    labels: Tensor | None = None
    scale: float | None = None
    unit: str = "image"


def load(name: str, *, seed: int = 0) -> Data:
    """A data set by name. The splits never depend on `seed` nor on any global random state.

    Args:
        name: one of `NAMES`.
        seed: of the one draw that makes the valid and test parts of a dynamic data set binary; results are comparable
            at equal seeds only, so leave it alone unless that draw is itself what you study.

    Raises:
        ValueError: the name is unknown.
        DataError: a file is missing, damaged or not the expected one.
    """
    if name not in _LOADERS:
        raise ValueError(f"`name` must be one of {', '.join(NAMES)}; got {name!r}")
    data = _LOADERS[name]()
    return _settle_evaluation(data, torch.Generator().manual_seed(seed)) if data.dynamic else data


def binarize(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Zeros and ones, each 1 with the probability that `x` holds; shape, dtype and device of `x`."""
    # Not torch.bernoulli, whose stream differs between builds with and without MKL.
    return (torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device) < x).to(x.dtype)


def _settle_evaluation(data: Data, generator: torch.Generator) -> Data:
    """Draw valid, then test, once and for all: every evaluation sees the same pixels."""
    valid = binarize(data.valid, generator)
    return replace(data, valid=valid, test=binarize(data.test, generator))


def _digits() -> Data:
    """1197/300/300 of a fixed permutation."""
    images, labels = (read(Path(__file__).with_name("digits.npz"), s) for s in SOURCES["digits"])
    parts = permuted_parts(len(images), (1197, 300, 300))
    train, valid, test = (_tensor(images[part]) for part in parts)
    return Data("digits", train, valid, test, 16, "binomial", labels=_classes(labels[parts[2]]))


def _mnist() -> Data:
    """The first 50,000 training images train, the last 10,000 validate; probabilities are grey levels / 255."""
    images, test, labels = (_obtain(s) for s in SOURCES["mnist"])
    train, valid = _tensor(images[:50000], 255), _tensor(images[50000:], 255)
    return Data("mnist", train, valid, _tensor(test, 255), 1, "bernoulli", dynamic=True, labels=_classes(labels))


def _mnist_static() -> Data:
    """The fixed binarization of Salakhutdinov and Murray (2008), in the three parts of H. Larochelle's files."""
    train, valid, test = (_tensor(_obtain(s)) for s in SOURCES["mnist-static"])
    return Data("mnist-static", train, valid, test, 1, "bernoulli")


def _freyfaces() -> Data:
    """1565/200/200 of a fixed permutation of the 1965 video frames, grey levels 0..255.

    Neighbouring frames are nearly equal, so a random split leaks: a test frame has near twins in the training part. It
    is nevertheless the customary one (van den Berg et al. 2018, who also take a 256-way categorical likelihood).
    """
    images = _obtain(SOURCES["freyfaces"][0])
    train, valid, test = (_tensor(images[part]) for part in permuted_parts(len(images), (1565, 200, 200)))
    return Data("freyfaces", train, valid, test, 255, "categorical")


def _omniglot() -> Data:
    """Drawers 1-15 train, but for the last 1,345 of a fixed permutation, which validate; drawers 16-20 test.

    Probabilities are the ink fractions, value / 225, of these images' own downsampling: not the file of Burda et al.
    (2015), so likelihoods are not comparable with published ones.
    """
    images = _obtain(SOURCES["omniglot"][0])
    drawn = images[:, :15].reshape(-1, 28, 28)
    train, valid = (_tensor(drawn[part], 225) for part in permuted_parts(len(drawn), (len(drawn) - 1345, 1345)))
    test = _tensor(images[:, 15:].reshape(-1, 28, 28), 225)
    return Data("omniglot", train, valid, test, 1, "bernoulli", dynamic=True)


def _caltech() -> Data:
    """4100/2264/2307 by the file's own `split`, which is not the published one but has its sizes."""
    images, labels, split = (_obtain(s) for s in SOURCES["caltech"])
    train, valid, test = (_tensor(images[split == part]) for part in range(3))
    return Data("caltech", train, valid, test, 1, "bernoulli", labels=_classes(labels[split == 2]))


_LOADERS: dict[str, Callable[[], Data]] = {
    "digits": _digits,
    "mnist-static": _mnist_static,
    "mnist": _mnist,
    "freyfaces": _freyfaces,
    "omniglot": _omniglot,
    "caltech": _caltech,
}
NAMES: tuple[str, ...] = tuple(_LOADERS)


def _tensor(array: np.ndarray, scale: int = 1) -> Tensor:
    return torch.from_numpy(array.astype(np.float32)).div_(scale)


def _classes(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.int64))


def _obtain(source: Source) -> np.ndarray:
    """The verified array: from the folder that `FLOWPOST_DATA` names, else from the cache or the web."""
    folder = _data_folder()
    for path in _candidates(folder, source) if folder else ():
        if path.exists():
            return read(path, source)
    if source.mirrors:
        return fetch(source)
    where = folder or "a folder of your choice, and name that folder in the environment variable FLOWPOST_DATA"
    raise DataError(f"{source.files[0]} is missing and is not downloaded.\nPut it ({wanted(source)})\nin {where}.")


def _data_folder() -> Path | None:
    name = os.environ.get("FLOWPOST_DATA")
    if not name:
        return None
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise DataError(f"FLOWPOST_DATA names {folder}, which is not a folder.\nCorrect it, or unset it to download.")
    return folder


def _candidates(folder: Path, source: Source) -> list[Path]:
    """Where a file may lie: in its data set's folder, or straight in the data folder."""
    return [folder / file for file in source.files] + [folder / Path(file).name for file in source.files]
