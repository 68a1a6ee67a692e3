"""The benchmarks' data: splits with known content, and no bad file ever taken for a good one."""

import gzip
import hashlib
import io
import os
import pickle
import re
import struct
import sys
import threading
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pooch
import pytest
import torch
from forked import Run

from benchmarks import data, download
from benchmarks.data import NAMES, SOURCES, DataError, binarize, load
from benchmarks.download import Source, digest, fetch, read
from benchmarks.split import permuted_parts

ROOT = Path(__file__).parents[1]
REAL = Path(os.environ.get("FLOWPOST_DATA") or ROOT / ".." / "shared" / "data")
needs_real = pytest.mark.skipif(not (REAL / "mnist").is_dir(), reason="the real data sets are not here")

# Small stand-ins: same code paths, milliseconds.
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 4, 5), dtype=np.uint8)
BINARY = IMAGES % 2
IDX = Source(("mnist/tiny.gz", "mnist/tiny"), "tiny", IMAGES.shape, digest(IMAGES), ("unset",))
AMAT = Source(("tiny/tiny.amat", "tiny/tiny.amat.gz", "tiny/tiny.npz"), "x", BINARY.shape, digest(BINARY))
NPZ = Source(("tiny/tiny.npz",), "x", IMAGES.shape, digest(IMAGES))


def idx(array: np.ndarray, kind: int = 8) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, kind, array.ndim, *array.shape) + array.tobytes()


def amat(array: np.ndarray, end: str = "\n") -> bytes:
    return "".join(" ".join(map(str, row)) + end for row in array.reshape(len(array), -1)).encode()


def npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=True, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def zipped(member: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", member)
    return buffer.getvalue()


def npy_header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) + 1) + text.encode() + b"\n"


@pytest.fixture(autouse=True)
def _own_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FLOWPOST_DATA", raising=False)
    monkeypatch.setenv("FLOWPOST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a download was tried")

    monkeypatch.setattr(pooch, "HTTPDownloader", refuse)


# ------------------------------------------------------------------------------------------------ splits


def test_digits_are_the_known_images() -> None:
    digits = load("digits")
    assert [tuple(x.shape) for x in (digits.train, digits.valid, digits.test)] == [
        (1197, 8, 8),
        (300, 8, 8),
        (300, 8, 8),
    ]
    assert (digits.name, digits.levels, digits.likelihood, digits.dynamic) == ("digits", 16, "binomial", False)
    everything = torch.cat([digits.train, digits.valid, digits.test])
    assert everything.dtype == torch.float32
    assert everything.sum() == 561718  # sklearn.datasets.load_digits().images.sum()
    first = torch.tensor([0, 0, 5, 13, 9, 1, 0, 0]).float()  # sklearn's image 0, row 0
    assert (everything[:, 0] == first).all(-1).sum() == 1


def test_digit_labels_belong_to_the_test_images() -> None:
    digits, raw = load("digits"), np.load(ROOT / "benchmarks" / "digits.npz", allow_pickle=False)
    known = {image.tobytes(): label for image, label in zip(raw["images"], raw["labels"], strict=True)}
    assert digits.labels is not None
    assert digits.labels.dtype == torch.int64
    found = [known[image.numpy().astype(np.uint8).tobytes()] for image in digits.test]
    assert digits.labels.tolist() == found


def test_digit_splits_do_not_overlap() -> None:
    digits = load("digits")  # its 1797 images are all different
    parts = [{image.numpy().tobytes() for image in part} for part in (digits.train, digits.valid, digits.test)]
    assert [len(part) for part in parts] == [1197, 300, 300]
    assert len(set.union(*parts)) == 1797


def test_splits_neither_read_nor_change_global_random_state() -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    first = load("digits", seed=3)
    untouched = torch.rand(1), np.random.rand()
    torch.manual_seed(1)
    np.random.seed(1)
    assert (torch.rand(1), np.random.rand()) == untouched
    assert torch.equal(first.train, load("digits").train)


def test_the_permutation_never_changes() -> None:
    first, second = permuted_parts(1797, (1197, 600))
    assert first[:5].tolist() == [62, 1128, 457, 1325, 207]
    assert sorted([*first, *second]) == list(range(1797))


def test_data_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        load("digits").levels = 2  # type: ignore[misc]


def test_unknown_name_lists_the_choices() -> None:
    with pytest.raises(ValueError, match="digits, mnist-static, mnist, freyfaces, omniglot, caltech; got 'cifar'"):
        load("cifar")


def test_binarize_draws_with_the_given_probability() -> None:
    x = torch.tensor([0.0, 0.25, 1.0]).expand(20000, 3)
    drawn = binarize(x, torch.Generator().manual_seed(0))
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert drawn[:, 0].sum() == 0
    assert drawn[:, 2].sum() == 20000
    assert abs(drawn[:, 1].mean() - 0.25) < 4 * (0.25 * 0.75 / 20000) ** 0.5
    assert torch.equal(drawn, binarize(x, torch.Generator().manual_seed(0)))
    assert not torch.equal(drawn, binarize(x, torch.Generator().manual_seed(1)))
    assert binarize(x.double()).dtype == torch.float64


# name: shapes, sums of the parts, (levels, likelihood, dynamic), sum of the labels
EXPECTED = {
    "mnist-static": ((50000, 10000, 10000), (28, 28), (5118041, 1028036, 1038896), (1, "bernoulli", False), None),
    "mnist": ((50000, 10000, 10000), (28, 28), (5133682, 1012934, 1038025), (1, "bernoulli", True), 44434),
    "freyfaces": ((1565, 200, 200), (28, 20), (135386235, 17254931, 17327575), (255, "categorical", False), None),
    "omniglot": ((23000, 1345, 8115), (28, 28), (1456788, 84813, 508328), (1, "bernoulli", True), None),
    "caltech": ((4100, 2264, 2307), (28, 28), (1466793, 807702, 826034), (1, "bernoulli", False), 85930),
}


@needs_real
@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "freyfaces" else pytest.mark.full) for name in EXPECTED]
)
def test_real_data_sets(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWPOST_DATA", str(REAL))
    counts, size, sums, kind, labels = EXPECTED[name]
    found = load(name)
    parts = found.train, found.valid, found.test
    assert [tuple(x.shape) for x in parts] == [(count, *size) for count in counts]
    assert [int(x.double().sum()) for x in parts] == list(sums)
    assert (found.name, found.levels, found.likelihood, found.dynamic) == (name, *kind)
    assert all(x.dtype == torch.float32 for x in parts)
    assert (None if found.labels is None else int(found.labels.sum())) == labels
    assert found.labels is None or found.labels.shape == (counts[2],)
    assert all(int(((x == 0) | (x == 1)).all()) == (found.levels == 1) for x in parts[1:])
    assert bool(((found.train > 0) & (found.train < 1)).any()) == found.dynamic


@needs_real
def test_evaluation_parts_of_a_dynamic_set_are_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWPOST_DATA", str(REAL))
    torch.manual_seed(0)
    first = load("omniglot")
    torch.manual_seed(1)
    again, other = load("omniglot"), load("omniglot", seed=1)
    assert torch.equal(first.test, again.test)
    assert torch.equal(first.valid, again.valid)
    assert torch.equal(first.train, other.train)
    assert not torch.equal(first.test, other.test)


@needs_real
def test_omniglot_test_part_is_drawers_16_to_20(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWPOST_DATA", str(REAL))
    ink = np.load(REAL / "omniglot28" / "omniglot28.npz", allow_pickle=False)["images"]
    found = load("omniglot")
    sure = torch.from_numpy(ink[:, 15:].reshape(-1, 28, 28)) == 225  # full ink is drawn as 1 whatever the seed
    assert bool((found.test[sure] == 1).all())
    assert found.train.double().sum() * 225 < ink[:, :15].sum()
    assert found.train.max() == 1


@needs_real
def test_static_mnist_as_original_text_equals_the_npz(tmp_path: Path) -> None:
    source = SOURCES["mnist-static"][2]
    packed = read(REAL / "binarized_mnist" / "binarized_mnist.npz", source)
    text = np.full((10000, 1568), ord(" "), np.uint8)
    text[:, ::2], text[:, -1] = packed.reshape(10000, 784) + ord("0"), ord("\n")
    assert hashlib.md5(text.tobytes()).hexdigest() == "14e41ae11040adba6ab8cb291eda0dd8"  # Larochelle's file
    path = tmp_path / "binarized_mnist_test.amat"
    path.write_bytes(text.tobytes())
    assert np.array_equal(read(path, source), packed)


@needs_real
def test_mnist_as_plain_idx_and_recompressed(tmp_path: Path) -> None:
    source = SOURCES["mnist"][2]
    raw = gzip.decompress((REAL / "mnist" / "t10k-labels-idx1-ubyte.gz").read_bytes())
    assert hashlib.md5(raw).hexdigest() == "27ae3e4e09519cfbb04c329615203637"  # the published file
    for content in (raw, gzip.compress(raw, 1)):
        path = tmp_path / "labels"
        path.write_bytes(content)
        assert read(path, source)[:5].tolist() == [7, 2, 1, 0, 4]


# ------------------------------------------------------------------------------------------------ finding and decoding

GOOD = {
    "idx.gz": (IDX, "mnist/tiny.gz", gzip.compress(idx(IMAGES))),
    "idx plain": (IDX, "mnist/tiny", idx(IMAGES)),
    "idx plain named gz": (IDX, "mnist/tiny.gz", idx(IMAGES)),
    "idx at the top": (IDX, "tiny.gz", idx(IMAGES)),
    "amat": (AMAT, "tiny/tiny.amat", amat(BINARY)),
    "amat, blanks and CRLF": (AMAT, "tiny/tiny.amat", amat(BINARY, " \r\n")),
    "amat.gz": (AMAT, "tiny/tiny.amat.gz", gzip.compress(amat(BINARY))),
    "npz for amat, packed": (AMAT, "tiny/tiny.npz", npz(x=np.packbits(BINARY.reshape(3, -1), axis=1))),
    "npz": (NPZ, "tiny/tiny.npz", npz(x=IMAGES, other=BINARY)),
    "npz, Fortran order": (NPZ, "tiny/tiny.npz", npz(x=np.asfortranarray(IMAGES))),
}


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("case", GOOD)
def test_every_layout_is_accepted(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, name, content = GOOD[case]
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    monkeypatch.setenv("FLOWPOST_DATA", str(tmp_path))
    array = data._obtain(source)
    assert np.array_equal(array, BINARY if source is AMAT else IMAGES)
    assert array.dtype == np.uint8
    assert array.flags.c_contiguous


class Bomb:
    """Its unpickling makes a file."""

    def __reduce__(self) -> tuple[Callable, tuple[str, str]]:
        return open, ("pickle-was-run", "w")


ONE_WRONG = IMAGES.copy()
ONE_WRONG[2, 3, 4] ^= 1
BAD = {
    "idx.gz truncated": (IDX, "tiny.gz", gzip.compress(idx(IMAGES))[:-9]),
    "idx.gz without its checksum": (IDX, "tiny.gz", gzip.compress(idx(IMAGES))[:-8]),
    "idx.gz damaged": (IDX, "tiny.gz", gzip.compress(idx(IMAGES))[:20] + b"\xff" * 9 + gzip.compress(idx(IMAGES))[29:]),
    "idx one pixel wrong": (IDX, "tiny", idx(ONE_WRONG)),
    "idx wrong magic": (IDX, "tiny", b"\x01" + idx(IMAGES)[1:]),
    "idx wrong type": (IDX, "tiny", idx(IMAGES, kind=0x0D)),
    "idx wrong shape": (IDX, "tiny", idx(IMAGES.reshape(3, 5, 4))),
    "idx header lies": (IDX, "tiny", struct.pack(">HBB3I", 0, 8, 3, 2**31, 2**31, 2**31)),
    "idx one byte short": (IDX, "tiny", idx(IMAGES)[:-1]),
    "idx one byte long": (IDX, "tiny", idx(IMAGES) + b"\0"),
    "idx empty": (IDX, "tiny", b""),
    "idx html": (IDX, "tiny.gz", b"<!DOCTYPE html><title>Please log in</title>"),
    "amat one digit wrong": (AMAT, "tiny.amat", amat(ONE_WRONG % 2)),
    "amat row missing": (AMAT, "tiny.amat", amat(BINARY[:2])),
    "amat row too many": (AMAT, "tiny.amat", amat(np.concatenate([BINARY, BINARY]))),
    "amat html": (AMAT, "tiny.amat", b"<html>no</html>"),
    "amat other digits": (AMAT, "tiny.amat", amat(BINARY).replace(b"1", b"2")),
    "amat empty": (AMAT, "tiny.amat", b""),
    "npz truncated": (NPZ, "tiny.npz", npz(x=IMAGES)[:-30]),
    "npz junk": (NPZ, "tiny.npz", b"junk"),
    "npz empty": (NPZ, "tiny.npz", b""),
    "npz missing key": (NPZ, "tiny.npz", npz(y=IMAGES)),
    "npz wrong type": (NPZ, "tiny.npz", npz(x=IMAGES.astype(np.int64))),
    "npz wrong shape": (NPZ, "tiny.npz", npz(x=IMAGES.reshape(3, 20))),
    "npz wrong values": (NPZ, "tiny.npz", npz(x=ONE_WRONG)),
    "npz pickle": (NPZ, "tiny.npz", npz(x=np.array([Bomb()], dtype=object))),
    "npz bare pickle": (NPZ, "tiny.npz", pickle.dumps(Bomb())),
    "npz pickle inside": (NPZ, "tiny.npz", zipped(pickle.dumps(Bomb()))),
    "npz header lies": (NPZ, "tiny.npz", zipped(npy_header(f"{{'descr':'|u1','fortran_order':False,'shape':({2**40},)}}"))),  # noqa: E501
    "npz header junk": (NPZ, "tiny.npz", zipped(npy_header("{'descr': ("))),
    "npz header deep": (NPZ, "tiny.npz", zipped(npy_header("(" * 4000))),
    "npz body short": (NPZ, "tiny.npz", zipped(npy_header("{'descr':'|u1','fortran_order':False,'shape':(3,4,5)}"))),
}  # fmt: skip


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("case", BAD)
def test_no_bad_file_is_accepted(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, name, content = BAD[case]
    (tmp_path / name).write_bytes(content)
    monkeypatch.setenv("FLOWPOST_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        data._obtain(source)
    message = str(caught.value)
    assert message.count("\n") <= 2
    assert str(tmp_path / name) in message
    assert re.search(r"expected uint8 \(3, 4, 5\).*; found .+", message)
    assert "Replace it" in message
    assert caught.value.__cause__ is not None
    assert not (tmp_path / "pickle-was-run").exists()


def test_a_folder_in_place_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="IsADirectoryError|PermissionError"):
        read(tmp_path, NPZ)


@pytest.mark.parametrize(("source", "name"), [(IDX, "tiny.gz"), (AMAT, "tiny.amat.gz"), (NPZ, "tiny.npz")])
def test_decompression_bombs_cost_no_memory(source: Source, name: str, tmp_path: Path) -> None:
    zeros = bytes(100_000_000)
    (tmp_path / name).write_bytes(zipped(zeros) if source is NPZ else gzip.compress(zeros, 1))
    del zeros
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="found more than"):
            read(tmp_path / name, source)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_a_damaged_shipped_file_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SOURCES, "digits", tuple(replace(s, digest="0" * 64) for s in SOURCES["digits"]))
    with pytest.raises(DataError, match=r"digits\.npz cannot be used"):
        load("digits")


@pytest.mark.parametrize("name", ["freyfaces", "omniglot", "caltech"])
@pytest.mark.parametrize("named", [True, False])
def test_missing_data_sets_say_what_to_put_where(
    name: str,
    named: bool,  # noqa: FBT001
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if named:
        monkeypatch.setenv("FLOWPOST_DATA", str(tmp_path))
    with pytest.raises(DataError) as caught:
        load(name)
    message = str(caught.value)
    assert SOURCES[name][0].files[0] in message
    assert "array `images` of an .npz" in message
    assert (str(tmp_path) if named else "FLOWPOST_DATA") in message
    assert message.count("\n") <= 2


def test_a_mistyped_data_folder_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWPOST_DATA", str(tmp_path / "typo"))
    with pytest.raises(DataError, match="typo, which is not a folder"):
        load("mnist")


# ------------------------------------------------------------------------------------------------ downloads

WHOLE = gzip.compress(idx(IMAGES))


class Server(ThreadingHTTPServer):
    """Answers `/KIND/tiny.gz` in the way KIND says, and keeps the paths it was asked for."""

    asked: list[str]
    cache: Path
    seen: list[str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"


class Handler(BaseHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:  # noqa: N802
        self.server.asked.append(self.path)
        kind = self.path.split("/")[1]
        if kind == "redirect":
            self.send_response(302)
            self.send_header("Location", "/good/tiny.gz")
            self.end_headers()
        elif kind == "endless":
            self.endless()
        elif kind.startswith("cut"):
            self.answer(200, WHOLE, WHOLE[: len(WHOLE) * int(kind[3:]) // 10])
        else:
            self.answer(404 if kind == "404" else 500 if kind == "500" else 200, BODIES[kind])

    def answer(self, status: int, promised: bytes, sent: bytes | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(promised)))
        self.end_headers()
        self.wfile.write(promised if sent is None else sent)
        self.wfile.flush()
        self.server.seen += [path.name for path in self.server.cache.rglob("*") if path.is_file()]

    def endless(self) -> None:
        self.send_response(200)
        self.end_headers()
        try:
            for _ in range(10_000):
                self.wfile.write(bytes(1 << 16))
        except OSError:
            return
        self.server.asked.append("all of it was read")

    def log_message(self, format: str, *args: object) -> None: ...  # noqa: A002


BODIES = {
    "good": WHOLE,
    "plain": idx(IMAGES),
    "wrong": gzip.compress(idx(ONE_WRONG)),
    "short": WHOLE[: len(WHOLE) // 2],  # with a Content-Length that agrees
    "html": b"<!DOCTYPE html><title>Please log in</title>",
    "empty": b"",
    "404": WHOLE,
    "500": WHOLE,
}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Handler)
    server.asked, server.seen, server.cache = [], [], tmp_path / "cache"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def mirrored(server: Server, *kinds: str) -> Source:
    return replace(IDX, mirrors=tuple(f"{server.url}{kind}/" for kind in kinds))


def cached(tmp_path: Path) -> list[str]:
    return [str(path.relative_to(tmp_path / "cache")) for path in (tmp_path / "cache").rglob("*") if path.is_file()]


FAULTS = ["wrong", "short", "html", "empty", "404", "500", "endless", *(f"cut{tenths}" for tenths in range(10))]


@pytest.mark.parametrize("kind", ["good", "plain", "redirect"])
def test_a_download_is_kept_and_used_again(kind: str, server: Server, tmp_path: Path) -> None:
    source = mirrored(server, kind)
    assert np.array_equal(fetch(source), IMAGES)
    assert cached(tmp_path) == ["mnist/tiny.gz"]
    asked = len(server.asked)
    assert np.array_equal(fetch(source), IMAGES)
    assert len(server.asked) == asked


@pytest.mark.parametrize("kind", FAULTS)
def test_a_bad_download_is_refused_and_leaves_nothing(kind: str, server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        fetch(mirrored(server, kind))
    assert cached(tmp_path) == []
    assert "tiny.gz" not in server.seen  # the final name never holds a transfer under way
    message = str(caught.value)
    assert message.count("\n") <= 2
    assert all(part in message for part in ("tiny.gz", f"{server.url}{kind}/", "FLOWPOST_DATA", "mnist/tiny.gz"))
    assert caught.value.__cause__ is not None
    assert "all of it was read" not in server.asked


@pytest.mark.parametrize("kind", FAULTS)
def test_the_second_mirror_stands_in(kind: str, server: Server, tmp_path: Path) -> None:
    assert np.array_equal(fetch(mirrored(server, kind, "good")), IMAGES)
    assert [path.split("/")[1] for path in server.asked] == [kind, "good"]
    assert cached(tmp_path) == ["mnist/tiny.gz"]


def test_a_dead_first_mirror(server: Server) -> None:
    dead = "http://127.0.0.1:1/"  # nobody listens on port 1
    assert np.array_equal(fetch(replace(IDX, mirrors=(dead, f"{server.url}good/"))), IMAGES)
    with pytest.raises(DataError, match=f"{dead}: ConnectionError"):
        fetch(replace(IDX, files=("mnist/other.gz",), mirrors=(dead,)))


@pytest.mark.parametrize(
    "content", [WHOLE[:-3], BODIES["wrong"], b"", BODIES["html"]], ids=["cut", "wrong", "empty", "html"]
)
def test_a_damaged_cached_file_is_downloaded_again(content: bytes, server: Server, tmp_path: Path) -> None:
    path = tmp_path / "cache" / "mnist" / "tiny.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    assert np.array_equal(fetch(mirrored(server, "good")), IMAGES)
    assert path.read_bytes() == WHOLE


def test_a_damaged_cached_file_does_not_outlive_a_failed_download(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "cache" / "mnist" / "tiny.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(WHOLE[:-3])
    with pytest.raises(DataError):
        fetch(mirrored(server, "404"))
    assert not path.exists()


def test_a_cache_that_cannot_be_written(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLOWPOST_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="set FLOWPOST_CACHE to another folder"):
        fetch(mirrored(server, "good"))
    assert server.asked == []


def test_a_download_gets_its_name_only_once_verified(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    existed, verified = [], download._verified

    def spy(path: Path, source: Source) -> np.ndarray:
        array = verified(path, source)
        existed.append((tmp_path / "cache" / "mnist" / "tiny.gz").exists())
        return array

    monkeypatch.setattr(download, "_verified", spy)
    fetch(mirrored(server, "good"))
    assert existed == [False]


def test_interrupt_leaves_no_partial_file(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(download._Sink, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch(mirrored(server, "good"))
    assert cached(tmp_path) == []


def test_load_downloads_what_the_data_folder_lacks(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("FLOWPOST_DATA", str(tmp_path / "data"))
    labels = Source(("mnist/labels",), "", (3,), digest(np.arange(3, dtype=np.uint8)), (f"{server.url}labels/",))
    monkeypatch.setitem(BODIES, "labels", idx(np.arange(3, dtype=np.uint8)))
    monkeypatch.setitem(SOURCES, "mnist", (mirrored(server, "good"), mirrored(server, "good"), labels))
    mnist = load("mnist")
    assert server.asked == ["/good/tiny.gz", "/labels/labels"]
    assert torch.equal(mnist.train, torch.from_numpy(IMAGES).float() / 255)
    assert mnist.labels is not None
    assert mnist.labels.tolist() == [0, 1, 2]


def test_public_addresses() -> None:
    addresses = {
        mirror + Path(s.files[0]).name for sources in SOURCES.values() for s in sources for mirror in s.mirrors
    }
    assert len(addresses) == 3 * 2 + 3
    assert "https://storage.googleapis.com/cvdf-datasets/mnist/t10k-images-idx3-ubyte.gz" in addresses
    static = "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/binarized_mnist_valid.amat"
    assert static in addresses
    assert tuple(SOURCES) == NAMES


def test_the_default_cache_is_pooch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLOWPOST_CACHE")
    assert download._cache_folder() == Path(pooch.os_cache("flowpost"))


def test_only_a_download_needs_pooch(monkeypatch: pytest.MonkeyPatch, python: Run) -> None:
    """A machine without a network may lack it: the digits are there, and so may others be."""
    done = python("import sys; sys.modules['pooch'] = None\nfrom benchmarks.data import load\nload('digits')")
    assert not done.returncode, done.stderr
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(DataError, match=r"pooch is missing(?s:.*)FLOWPOST_DATA"):
        fetch(IDX)


@pytest.mark.full
def test_import_leaves_global_state_alone(python: Run) -> None:
    code = (
        "import torch, numpy as np; torch.manual_seed(0); np.random.seed(0)\n"
        "before = torch.get_rng_state(), np.random.get_state()[1].copy(), torch.get_default_dtype()\n"
        "import benchmarks.data\n"
        "assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()\n"
        "assert before[2] == torch.get_default_dtype()\n"
    )
    done = python(code)
    assert not done.returncode, done.stderr
