"""Save and load: one file, verified to the last bit, that never runs code and is never half written."""

from __future__ import annotations

import contextlib
import inspect
import math
import os
import reprlib
import stat
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import TypeVar, cast, overload

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from flowpost._format import DTYPES, CorruptFileError, Entry, Header, encode, read_header, read_tensors, write
from flowpost._settings import differences, settings_of
from flowpost.numerics.alone import DrawsApart
from flowpost.posterior import FlowPosterior
from flowpost.recipes import RECIPES
from flowpost.recipes.record import arguments, record_of

_STEPS = 4096  # each is Python objects, which the tensors' sizes do not bound
_LISTED = 20
_SETTINGS = (bool, int, float, str, tuple, list, FunctionType, BuiltinFunctionType)
File = str | os.PathLike[str]
Device = str | torch.device | None
M = TypeVar("M", bound=nn.Module)


def save(module: nn.Module, path: File) -> None:
    """Write a module's parameters and buffers to one file, with a SHA-256 of every byte.

    The file is safetensors with JSON in its header: nothing in it is code. It is written beside `path` and moved there
    when it is on the disk, so that `path` always holds a whole file, whatever is killed or full. A write that fails is
    tried once more. Of a posterior that a recipe built, the recipe and its arguments are saved too, unless it was
    altered since: another activation, say, or a forward hook is not in the tensors. Of every step and likelihood its
    class and arguments are, so that `load` refuses a module with others: a spline's bound is not in the tensors either.

    Args:
        module: any module; its tensors may be shared, empty or not contiguous.
        path: the file; one that is there is replaced.

    Raises:
        TypeError: if `module` is no module.
        ValueError: for a state of other things than dense tensors of floats, ints or bools, or `path` a directory.
        ImportError: if safetensors is missing: ``pip install 'flowpost[files]'``.
        OSError: if the file cannot be written; says what is still good.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     flowpost.save(flowpost.planar(16, dim=2), f"{folder}/posterior.safetensors")
    """
    state = {name: tensor.cpu().clone(memory_format=torch.contiguous_format) for name, tensor in _state(module).items()}
    records = _recipes(module).items()
    whole = {name: record for name, record in records if _unaltered(module.get_submodule(name), record)}
    write(Path(os.path.realpath(path)), encode(state, whole, settings_of(module)))


@overload
def load(path: File, into: M, *, device: Device = None, allow_nonfinite: bool = False) -> M: ...
@overload
def load(path: File, into: None = None, *, device: Device = None, allow_nonfinite: bool = False) -> FlowPosterior: ...
def load(
    path: File, into: nn.Module | None = None, *, device: Device = None, allow_nonfinite: bool = False
) -> nn.Module:
    """Read a file that `save` wrote, checked to the last bit before any number of it is used.

    Args:
        path: the file.
        into: a module of the saved one's architecture, whose steps and likelihood were made with the same arguments.
            All its parameters and buffers are set, or, if anything is wrong, none. Without it, a posterior that is as
            its recipe built it is built again; an old `iaf` with ``gain=1``.
        device: where the module is put; by default `into` stays where it is, and a posterior is built on the CPU.
        allow_nonfinite: whether nan and inf may be loaded.

    Returns:
        `into`, or the posterior.

    Raises:
        CorruptFileError: if the file is damaged, cut, altered or of another kind; a ValueError.
        ValueError: for a state of another architecture or with values that are not finite, or if `into` is needed.
        TypeError: if `into` is no module.
        ImportError: if safetensors is missing: ``pip install 'flowpost[files]'``.
        OSError: if the file cannot be opened.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     flowpost.save(flowpost.planar(16, dim=2), f"{folder}/posterior.safetensors")
        ...     posterior = flowpost.load(f"{folder}/posterior.safetensors")
        >>> posterior.dim
        2
    """
    name = os.fspath(path)
    torch.empty(0, device=device)  # a device that is not there is found before anything is touched
    if into is not None:
        _state(into, "into")
    if not stat.S_ISREG(os.stat(path).st_mode):
        kind = "a directory" if os.path.isdir(path) else "no regular file"
        raise CorruptFileError(f"path: expected a file that flowpost.save wrote, got {kind}: {name!r}")
    with open(path, "rb") as file:
        header = read_header(file, name)
        module = _rebuild(header) if into is None else into
        check_same(header, module, "into")
        tensors = read_tensors(file, header)
    if not allow_nonfinite:
        _check_finite(tensors, module)
    _fill(module, tensors)
    return module if device is None else module.to(device)


def _state(module: nn.Module, argument: str = "module") -> dict[str, Tensor]:
    """The module's state dict, of tensors that a file can hold; with torch's version marks on it."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"{argument}: expected a torch.nn.Module, got {type(module).__name__}")
    state = module.state_dict()
    for name, tensor in state.items():
        kind = _unfit(tensor)
        if kind or name == "__metadata__":  # safetensors' own key
            raise ValueError(f"{argument}: expected dense tensors of floats, ints or bools, got {kind} in {name!r}")
    return state


def _unfit(value: object) -> str:
    """What keeps a value of a state dict out of a file; empty if nothing does."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    if is_lazy(value):
        return "a parameter that is not initialized; run the module once"
    if value.is_meta:
        return "a tensor without values, on the meta device"
    if value.layout is not torch.strided or value.dtype not in DTYPES.values():
        return f"{value.dtype}, {value.layout}"
    return ""


def _recipes(module: nn.Module) -> dict[str, dict]:
    """The record of every posterior in a module that a recipe built, by the posterior's path."""
    built = {path: part for path, part in module.named_modules() if isinstance(part, FlowPosterior)}
    records = {path: record_of(part) for path, part in built.items()}
    return {path: record for path, record in records.items() if record is not None}


def _unaltered(posterior: nn.Module, record: Mapping) -> bool:
    """Whether a posterior's modules still are what its recipe builds, but for their tensors, mode and notes on them."""
    with torch.device("meta"), DrawsApart():
        built = dict(RECIPES[record["name"]](**arguments(record)).named_modules())
    parts = dict(posterior.named_modules())
    return parts.keys() == built.keys() and all(_alike(parts[path], part) for path, part in built.items())


def _alike(part: nn.Module, built: nn.Module) -> bool:
    ours, theirs = vars(part), vars(built)
    changed = [name for name, value in theirs.items() if isinstance(value, _SETTINGS) and ours.get(name) != value]
    shadowed = [name for name in ours.keys() - theirs.keys() if callable(getattr(type(part), name, None))]
    hooks = part._forward_hooks or part._forward_pre_hooks  # of what they change no tensor tells
    return type(part) is type(built) and {*changed, *shadowed} <= {"training"} and not hooks


def _rebuild(header: Header) -> FlowPosterior:
    """The posterior of a file's recipe. It is built without memory first, to see whether its tensors are the file's."""
    if "" not in header.recipes:
        what = f"{header.path!r} is not of a recipe's posterior, or of one that was altered before it was saved"
        raise ValueError(f"into: expected a module, since {what}, got None")
    try:
        with torch.device("meta"):  # shapes without memory
            blank = _build(header)
        check_same(header, blank, "its recipe")
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        recipe = reprlib.repr(header.recipes[""])
        what = f"{header.path!r} is not of its recipe {recipe}, or was altered since (then pass into=)"
        raise CorruptFileError(f"path: {what}: {error}") from error
    with torch.device("cpu"):
        return _build(header)


def _build(header: Header) -> FlowPosterior:
    recipe = RECIPES[header.recipes[""]["name"]]
    bound = inspect.signature(recipe).bind(**arguments(header.recipes[""]))
    bound.apply_defaults()
    _check_size(bound.arguments, header)
    dtypes = [entry.dtype for entry in header.tensors.values() if entry.dtype.is_floating_point]
    with DrawsApart():  # what is drawn here is nobody's random number
        return recipe(**bound.arguments).to(dtype=dtypes[0] if dtypes else None)


def _check_size(given: Mapping[str, object], header: Header) -> None:
    """Refuse numbers that would build much more than the file holds, before anything is built.

    A state has at least about as many numbers as any argument says, as features times dim, and, for each step, as the
    variables and as the pairs of units in neighbouring layers.
    """
    lists = [[*value] for value in given.values() if isinstance(value, (list, tuple))]
    sizes = [value for value in given.values() if type(value) is int] + sum(lists, [])
    features, dim, steps = (given.get(name, 1) for name in ("features", "dim", "steps"))
    if any(type(size) is not int or size < 0 for size in [*sizes, features, dim, steps]):
        raise ValueError("sizes that are no ints of at least 0")
    features, dim, steps = cast(tuple[int, int, int], (features, dim, steps))
    pairs = sum(a * b for widths in lists for a, b in pairwise([dim, *widths, dim]))
    least = max(*sizes, features * dim, steps * max(dim, pairs))
    held = sum(math.prod(entry.shape) for entry in header.tensors.values())
    if least > 4 * held or steps > _STEPS:
        raise ValueError(f"at least {least} numbers in {steps} steps, and the file has {held}")


def check_same(header: Header, module: nn.Module, argument: str) -> None:
    """Refuse a module that is not of the file's architecture: the recipes' arguments, the tensors, the settings."""
    ours, theirs = _shapes(module.state_dict()), _shapes(header.tensors)
    tensors = [
        f"{name!r}: {theirs.get(name, 'nothing')} != {ours.get(name, 'nothing')}"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ] or _untied(header, module)
    fields = [*_fields(header.recipes, _recipes(module))]
    if fields or tensors:
        short = ", ".join(fields[:_LISTED] or tensors[:3])
        more = [f"and {len(tensors) - _LISTED} more"] if len(tensors) > _LISTED else []
        first = f"{argument}: expected the architecture of {header.path!r}, got another (file != {argument}): {short}"
        raise ValueError("\n  ".join([first, *tensors[:_LISTED], *more]))
    if settings := [*differences(header.settings, settings_of(module))]:
        more = [f"and {len(settings) - _LISTED} more"] if len(settings) > _LISTED else []
        first = f"{argument}: expected the steps of {header.path!r}, got others (file != {argument}): {settings[0]}"
        raise ValueError("\n  ".join([first, *settings[1:_LISTED], *more]))


def _shapes(tensors: Mapping[str, Tensor | Entry]) -> dict[str, str]:
    return {name: f"{tuple(tensor.shape)} {tensor.dtype}" for name, tensor in tensors.items()}


def _fields(theirs: Mapping[str, dict], ours: Mapping[str, dict]) -> Iterator[str]:
    """Where the recipes of two modules differ: ``dim 4 != 5``."""
    for path in theirs.keys() & ours.keys():
        prefix, his, mine = f"{path}." if path else "", theirs[path], ours[path]
        if his["name"] != mine["name"]:
            yield f"{prefix}recipe {reprlib.repr(his['name'])} != {mine['name']!r}"
            continue
        given = arguments(his)
        for key, value in arguments(mine).items():
            if key in given and given[key] != value:
                yield f"{prefix}{key} {reprlib.repr(given[key])} != {value!r}"


def _untied(header: Header, module: nn.Module) -> list[str]:
    """Names that share one tensor in the module, and not in the file."""
    first: dict[tuple, str] = {}
    state = {name: tensor for name, tensor in module.state_dict().items() if tensor.numel() and not tensor.is_meta}
    pairs = [(first.setdefault((t.data_ptr(), t.shape, t.stride()), name), name) for name, t in state.items()]
    differ = [(a, b) for a, b in pairs if header.tensors[a].sha256 != header.tensors[b].sha256]
    return [f"{a!r} and {b!r}: two tensors != one shared tensor" for a, b in differ]


def _check_finite(tensors: Mapping[str, Tensor], module: nn.Module) -> None:
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name, tensor in tensors.items():
        count = int((~tensor.isfinite()).sum())
        if count:
            what = f"{'parameter' if name in parameters else 'buffer'} {name!r} has {count} non-finite values"
            raise ValueError(f"checkpoint: {what}; pass allow_nonfinite=True to inspect it")


def _fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Set a module's state to tensors of the same names, shapes and dtypes; if that fails, leave it as it was."""
    state = module.state_dict()
    own, before = dict(state), {name: tensor.clone() for name, tensor in state.items()}
    state.update(tensors)  # into torch's own dictionary, which carries the version marks of its modules
    try:
        module.load_state_dict(state)
    except BaseException:
        for name, tensor in own.items():
            with contextlib.suppress(RuntimeError):  # what cannot be written now could not be written before
                tensor.copy_(before[name])
        with contextlib.suppress(RuntimeError):
            module.load_state_dict(before, strict=False)  # an order of the variables is no tensor of the module
        raise
