"""The file `flowpost.save` writes: safetensors, with JSON and SHA-256 digests in its header.

8 bytes of header length, the header (JSON, at most 1 MB), the tensors' bytes back to back: a plain safetensors file,
which any safetensors reader opens. The header's ``__metadata__`` has two strings: ``flowpost``, a JSON object with the
format's number, the recipes, the settings and each tensor's SHA-256; and ``sha256``, the digest of the length and the
header with the digest's own 64 digits read as zeros. The header says how long the file is and what every tensor's
digest is, so that one digest answers for every byte.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

FORMAT = 1
HEADER_LIMIT = 1_000_000
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_BLANK = b"0" * 64
# Quotes inside JSON strings are escaped, so no tensor's name and no recipe's argument can look like this.
_MARK = b'"sha256":"%b"'
_DIGEST = re.compile(_MARK % rb'([^"\\]{64})')
_OTHERS = {
    b"PK\x03\x04": "a zip archive, as torch.save writes it; flowpost reads no pickle",
    b"\x80": "a pickle, as torch.save wrote it before 1.6; flowpost reads no pickle",
    b"<": "an HTML or XML page, such as a failed download",
}


class CorruptFileError(ValueError):
    """A file is not what `flowpost.save` wrote: damaged, cut, altered, or of another kind."""


class Entry(NamedTuple):
    """One tensor, as the header declares it; its bytes are ``start`` to ``stop`` after the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int
    sha256: str


class Header(NamedTuple):
    """A header whose digest holds and whose tensors fill the file exactly."""

    path: str
    raw: bytes
    tensors: dict[str, Entry]
    recipes: dict[str, dict]
    """By the path of the module that the recipe built; ``""`` for the saved module itself."""
    settings: dict[str, dict]
    """By a module's path; none in a file of an older release, or where they would not fit."""


def encode(
    state: Mapping[str, Tensor], recipes: Mapping[str, object], settings: Mapping[str, object]
) -> tuple[bytes, memoryview]:
    """The file's header and its tensors' bytes, for tensors that are contiguous, on the CPU and share no memory."""
    digests = {name: _sha256(tensor.reshape(-1).view(torch.uint8).numpy().data) for name, tensor in state.items()}
    config = {"format": FORMAT, "recipes": recipes, "settings": settings, "sha256": digests}
    metadata = {"flowpost": json.dumps(config, allow_nan=False), "sha256": _BLANK.decode()}
    data = memoryview(_safetensors().torch.save(dict(state), metadata=metadata))
    end = 8 + int.from_bytes(data[:8], "little")
    if end - 8 > HEADER_LIMIT and settings:
        return encode(state, recipes, {})
    if end - 8 > HEADER_LIMIT:
        raise ValueError(f"module: expected names and shapes that fit {HEADER_LIMIT} bytes, got {end - 8}")
    head = bytes(data[:end])
    return head.replace(_MARK % _BLANK, _MARK % _sha256(head).encode()), data[end:]


def read_header(file: BinaryIO, path: str) -> Header:
    """The header of an open file, bounded before it is read and checked before it is parsed; no tensor is read."""
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    length = int.from_bytes(start, "little")
    raw = start + file.read(length) if length <= min(HEADER_LIMIT, size - 8) else start
    marks = list(_DIGEST.finditer(raw))
    if len(marks) != 1:
        raise CorruptFileError(f"path: expected a file that flowpost.save wrote, got {_kind(raw)}: {path!r}")
    low, high = marks[0].span(1)
    found = _sha256(raw[:low] + _BLANK + raw[high:])
    _check_digest(path, "the header", raw[low:high].decode("latin-1"), found)
    try:
        return Header(path, raw, *_parse(raw, size - len(raw)))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CorruptFileError(f"path: {path!r} is cut, altered or not of flowpost.save: {error}") from error


def read_tensors(file: BinaryIO, header: Header) -> dict[str, Tensor]:
    """The tensors of a file whose header has been read, each checked against its digest before it is made."""
    safetensors = _safetensors()
    data = header.raw + file.read(max((entry.stop for entry in header.tensors.values()), default=0))
    body = memoryview(data)[len(header.raw) :]
    for name, entry in header.tensors.items():
        _check_digest(header.path, f"tensor {name!r}", entry.sha256, _sha256(body[entry.start : entry.stop]))
        if entry.dtype is torch.bool and not set(bytes(body[entry.start : entry.stop])) <= {0, 1}:
            raise CorruptFileError(f"path: {header.path!r}: tensor {name!r}: expected bools, got other bytes")
    try:
        return safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise CorruptFileError(f"path: {header.path!r}: safetensors refuses it: {error}") from error


def write(path: Path, parts: Sequence[bytes | memoryview]) -> None:
    """Replace a file at once or not at all, in two tries."""
    if path.is_dir():
        raise ValueError(f"path: expected a file, got a directory: {str(path)!r}")
    good = f"the file that was there is unchanged: {str(path)!r}" if path.exists() else "no file was there before"
    for last in (False, True):
        try:
            _replace(path, parts)
            good = "the new file is there and whole, but may not outlast a power cut"
            if hasattr(os, "O_DIRECTORY"):  # not on Windows
                _sync(path.parent)
            return
        except OSError as error:
            if last:
                what = f"path: cannot write {str(path)!r}: {error.strerror or error}, in two tries"
                raise OSError(error.errno, f"{what}; {_free(path.parent)}; {good}") from error


def _replace(path: Path, parts: Sequence[bytes | memoryview]) -> None:
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")  # the same directory, so the same disk
    try:
        with open(temporary, "xb") as file:
            with contextlib.suppress(FileNotFoundError):
                shutil.copymode(path, temporary)  # a private file stays private
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Put the new name on the disk, where the file system can."""
    descriptor = os.open(folder, os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems have no such call
            raise
    finally:
        os.close(descriptor)


def _free(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 1e6:.0f} MB free on its disk"
    except OSError:
        return f"free space unknown of {str(folder)!r}"


def _parse(raw: bytes, body: int) -> tuple[dict[str, Entry], dict[str, dict], dict[str, dict]]:
    """Tensors, recipes and settings of a header, when `body` bytes of tensors follow it."""
    table = _json(raw[8:].decode())
    config = _json(table.pop("__metadata__")["flowpost"])
    if config["format"] != FORMAT:
        raise ValueError(f"format {config['format']!r}, and this flowpost reads format {FORMAT}")
    digests, recipes, settings = config["sha256"], config["recipes"], config.get("settings", {})
    if digests.keys() != table.keys():
        raise ValueError("the digests are of other tensors")
    tensors = {name: _entry(name, spec, digests[name]) for name, spec in table.items()}
    at = 0
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != at:
            raise ValueError(f"tensor {name!r} should start at byte {at}, and is said to start at {entry.start}")
        at = entry.stop
    if at != body:
        raise ValueError(f"expected {at} bytes of tensors, got {body}")
    if any(type(recipe["name"]) is not str or type(recipe["arguments"]) is not dict for recipe in recipes.values()):
        raise ValueError("a recipe that is no name with arguments")
    if any(type(each) is not dict for each in (settings, *settings.values())):
        raise ValueError("settings that are not by their names")
    return tensors, recipes, settings


def _entry(name: str, spec: dict, sha256: str) -> Entry:
    dtype, shape, (start, stop) = DTYPES[spec["dtype"]], spec["shape"], spec["data_offsets"]
    if len(spec) != 3 or any(type(number) is not int or number < 0 for number in [*shape, start, stop]):
        raise ValueError(f"tensor {name!r} is not described by a dtype, a shape and two offsets")
    if len(shape) > 64 or math.prod(shape) * dtype.itemsize != stop - start:
        raise ValueError(f"tensor {name!r} of shape {tuple(shape)} and {dtype} cannot take {stop - start} bytes")
    return Entry(dtype, tuple(shape), start, stop, sha256)


def _json(text: str) -> dict:
    """JSON as `encode` writes it: no key twice, no nan, no number that does not fit 64 bits."""
    return json.loads(text, object_pairs_hook=_unique, parse_constant=_small, parse_int=_small)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError(f"a key is there twice among {[key for key, _ in pairs][:20]}")
    return dict(pairs)


def _small(text: str) -> int:
    if not text.lstrip("-").isdecimal() or len(text) > 19:
        raise ValueError(f"no 64-bit number: {text[:20]}")
    return int(text)


def _kind(raw: bytes) -> str:
    """What a file seems to be that has no header of ours."""
    if not raw:
        return "an empty file"
    safetensors = raw[5:9] == b"\0\0\0{"  # its length, of any first byte, and its JSON
    for start, kind in _OTHERS.items():
        if raw.lstrip().startswith(start) and not safetensors:
            return kind
    if safetensors and b'"flowpost":' not in raw:
        return "a plain safetensors file, without flowpost's digests"
    return "other bytes, or a header that is damaged or cut"


def _check_digest(path: str, what: str, expected: str, found: str) -> None:
    if expected != found:
        raise CorruptFileError(f"path: {path!r} is damaged: {what}: expected SHA-256 {expected}, found {found}")


def _sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("flowpost.save and flowpost.load need safetensors: pip install 'flowpost[files]'") from error
    return safetensors
