"""From the name of a file to an array that is known to be the right one: download, decode, verify.

What is verified is the decoded array, not the file: a recompressed or repackaged copy is as good as the public
original, and a wrong one never passes. No pickle is loaded, and no more is read than the expected array takes.
"""

import gzip
import hashlib
import io
import math
import os
import struct
import uuid
import zipfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

NPY_HEADER = 4096  # bytes: more than numpy writes before a plain array (128)


class DataError(RuntimeError):
    """A data set is missing, damaged or not the expected one; the message says which file and what to do."""


@dataclass(frozen=True)
class Source:
    """One array of a data set: the files that may hold it, and what it must decode to.

    Args:
        files: paths inside the data folder that may hold the array; a download is kept under the first.
        key: name of the array inside an `.npz`.
        shape: of the decoded uint8 array.
        digest: `digest` of the decoded array.
        mirrors: folders on the web, each ending in `/`, that hold the first file; tried in order.
    """

    files: tuple[str, ...]
    key: str
    shape: tuple[int, ...]
    digest: str
    mirrors: tuple[str, ...] = ()


def digest(array: np.ndarray) -> str:
    """SHA-256 of the shape and the bytes of a uint8 array, as hexadecimal digits."""
    return hashlib.sha256(str(array.shape).encode() + np.ascontiguousarray(array).tobytes()).hexdigest()


def read(path: Path, source: Source) -> np.ndarray:
    """The verified array of one file, an IDX or `.amat` file (plain or gzip) or an `.npz`.

    Raises:
        DataError: the file does not hold the expected array.
    """
    try:
        return _verified(path, source)
    except ValueError as error:
        raise DataError(f"{path} cannot be used:\n{error}.\nReplace it with a sound copy of that array.") from error


def fetch(source: Source) -> np.ndarray:
    """The verified array from the cache, or from the first mirror that gives it.

    Raises:
        DataError: no mirror gave the expected array.
    """
    path = _cache_folder() / source.files[0]
    try:
        return _verified(path, source)
    except ValueError:
        pass  # not there, or damaged: the download below replaces it
    failures: list[tuple[str, Exception]] = []
    for mirror in source.mirrors:
        try:
            return _download(mirror + path.name, path, source)
        except (OSError, ValueError) as error:  # requests' errors are OSErrors
            failures.append((mirror, error))
    _discard(path)
    tried = "; ".join(f"{mirror}: {_brief(error)}" for mirror, error in failures)
    raise DataError(
        f"{path.name} could not be downloaded into {path.parent}: {tried}.\n"
        f"Put it at {source.files[0]} in a folder that the environment variable FLOWPOST_DATA names,\n"
        "or set FLOWPOST_CACHE to another folder for downloads."
    ) from failures[-1][1]


def _cache_folder() -> Path:
    name = os.environ.get("FLOWPOST_CACHE")
    return Path(name).expanduser() if name else Path(_pooch().os_cache("flowpost"))


def _pooch() -> Any:  # noqa: ANN401 - a module
    """What downloads. It is imported where something is downloaded: a machine without a network may lack it.

    Raises:
        DataError: it is not installed.
    """
    try:
        import pooch
    except ImportError as error:
        raise DataError(
            "pooch is missing, which downloads; pip install pooch,\n"
            "or name a folder that has the data in the environment variable FLOWPOST_DATA."
        ) from error
    return pooch


def _discard(path: Path) -> None:
    """Remove a file that is of no use; a cache that cannot be written to is no error here."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        pass


def _download(url: str, path: Path, source: Source) -> np.ndarray:
    """Download beside `path`, verify, then rename: `path` never holds a partial or wrong file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")  # a name of its own: runs may download side by side
    try:
        with part.open("xb") as file:
            # The largest layout is text, two bytes a number; a server that never stops shall not fill the disk.
            _stream(url, file, limit=3 * math.prod(source.shape) + NPY_HEADER)
        array = _verified(part, source)
        os.replace(part, path)
    finally:
        _discard(part)
    return array


def _stream(url: str, file: BinaryIO, limit: int) -> None:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress, ExitStack() as stack:
        sink = _Sink(file, limit, progress, url.rsplit("/", 1)[-1])
        # pooch does not close the response of a transfer that failed; the stack does.
        hooks = {"response": lambda response, **_: stack.enter_context(response)}
        # pooch documents any object with these methods as a progress bar, and annotates none.
        bar: Any = sink
        _pooch().HTTPDownloader(progressbar=bar, chunk_size=1 << 16, timeout=30, hooks=hooks)(url, sink, None)


class _Sink:
    """The file that pooch writes to and the bar it reports to: one object, because both count the same bytes."""

    def __init__(self, file: BinaryIO, limit: int, progress: Progress, name: str) -> None:
        self.file, self.limit, self.progress = file, limit, progress
        self.total = self.count = 0
        self.task = progress.add_task(name, total=None)

    def write(self, chunk: bytes) -> None:
        self.count += len(chunk)
        if self.count > self.limit:
            raise ValueError(f"more than {self.limit} bytes")
        self.file.write(chunk)
        self.progress.update(self.task, completed=self.count, total=self.total or None)

    def flush(self) -> None:
        self.file.flush()

    def update(self, amount: int) -> None:
        """Nothing: pooch counts whole chunks here, `write` counts bytes."""

    def reset(self) -> None:
        """Nothing, for the same reason."""

    def close(self) -> None:
        """Nothing: whoever opened the file and the bar closes them."""


def _verified(path: Path, source: Source) -> np.ndarray:
    try:
        array = _decode(path, source)
        if digest(array) != source.digest:
            raise ValueError(f"other values (SHA-256 {digest(array)[:12]}, not {source.digest[:12]})")
    except Exception as error:  # zip, gzip and numpy raise a dozen kinds for damaged bytes; the cause is chained
        raise ValueError(f"expected {wanted(source, path)}; found {_brief(error)}") from error
    return array


def _decode(path: Path, source: Source) -> np.ndarray:
    if ".npz" in path.name:
        return decode_npz(path, source.key, source.shape)
    return decode_amat(path, source.shape) if ".amat" in path.name else decode_idx(path, source.shape)


def decode_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A uint8 IDX file, plain or gzip, whose header must promise exactly `shape`."""
    header = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)
    raw = _read(path, len(header) + math.prod(shape))
    if not raw.startswith(header):
        raise ValueError(f"{len(raw)} bytes that begin with {raw[: len(header)]!r}")
    return np.frombuffer(raw, np.uint8, offset=len(header)).reshape(shape)


def decode_amat(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Zeros and ones as text, one image a line, plain or gzip."""
    # A number and a blank or line end are two bytes; a line may have a trailing blank and a carriage return besides.
    raw = np.frombuffer(_read(path, 2 * math.prod(shape) + 2 * shape[0]), np.uint8)
    numbers = raw[raw > ord(" ")]
    if ((numbers ^ ord("0")) > 1).any():
        raise ValueError(f"other text, which begins with {raw[:16].tobytes()!r}")
    if numbers.size != math.prod(shape):
        raise ValueError(f"{numbers.size} numbers")
    return (numbers - ord("0")).reshape(shape)


def decode_npz(path: Path, key: str, shape: tuple[int, ...]) -> np.ndarray:
    """The array `key` of an `.npz`, stored as it is or as bit-packed rows."""
    limit = math.prod(shape) + NPY_HEADER
    with zipfile.ZipFile(path) as archive, archive.open(f"{key}.npy") as member:
        raw = _at_most(member.read(limit + 1), limit)
    packed = (shape[0], -(-math.prod(shape[1:]) // 8))
    _check_npy_header(io.BytesIO(raw), (shape, packed))
    array = np.load(io.BytesIO(raw), allow_pickle=False)
    if array.shape == packed and packed != shape:
        array = np.unpackbits(array, axis=1, count=math.prod(shape[1:]))
    return np.ascontiguousarray(array).reshape(shape)


def _check_npy_header(file: BinaryIO, shapes: tuple[tuple[int, ...], ...]) -> None:
    """Refuse another type or shape before numpy allocates what the header promises."""
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("an unusual version of the .npy format")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype != np.uint8 or shape not in shapes:
        raise ValueError(f"{dtype} {shape}")


def _read(path: Path, limit: int) -> bytes:
    """The whole file, unzipped if it is gzip; one of more than `limit` bytes is refused without reading further."""
    with path.open("rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        with gzip.GzipFile(fileobj=file) if is_gzip else file as stream:
            return _at_most(stream.read(limit + 1), limit)


def _at_most(raw: bytes, limit: int) -> bytes:
    if len(raw) > limit:
        raise ValueError(f"more than {limit} bytes")
    return raw


def wanted(source: Source, path: Path | None = None) -> str:
    """The expected array in words, and inside which kind of file."""
    name = path.name if path else source.files[0]
    inside = f" as array `{source.key}` of an .npz" if ".npz" in name else " as text" if ".amat" in name else " as IDX"
    return f"uint8 {source.shape}{inside}"


def _brief(error: Exception) -> str:
    """One line of an error, short enough to stand inside a message."""
    line = next(iter(str(error).splitlines()), "")
    line = line if len(line) <= 200 else f"{line[:60]} ... {line[-130:]}"  # requests says the reason last
    return line if type(error) is ValueError else f"{type(error).__name__}: {line}"
