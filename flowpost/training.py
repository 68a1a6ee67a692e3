"""A training step as one CUDA graph, where launching its operations costs most of its time; plain on a CPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from flowpost._graphs import Backend, CUDAGraphs

T = TypeVar("T")

_BACKENDS: dict[str, Callable[[torch.device, Sequence[torch.Generator]], Backend]] = {"cuda": CUDAGraphs}
_ADVICE = (
    "what is captured may read no value on the host (.item(), float(loss), a branch on a value, a boolean mask as an "
    "index), takes its optimizer with fused=True and capturable=True, and draws from the device's own generator or "
    "from those given as `generators`; no loss of an earlier pass may still be alive outside"
)


class Captured(Generic[T]):
    """A function of tensors, each call of which is one launch: it runs as it is a few times, then as a CUDA graph.

    The function is a whole training step, or any other work of fixed shapes. On a device without graphs, such as the
    CPU, it is called as it is, so that one script serves both. No step is lost or done twice: the first `warmup` calls
    run operation by operation and train like all others, the next one records the operations without running them, and
    from there on a call replays them.

    When to use: on a GPU, for steps of many small operations, as a flow posterior's are. A replay repeats the
    operations and no Python. So what Python decides (a number, the training mode, a branch) stays as it was at the
    capture; what changes from call to call is an input, or a tensor that is filled in place, as a learning rate can be.
    An autocast stands inside the function. Weights that are loaded are seen, as they go into their old memory. An
    optimizer's state gets new memory when it is loaded, so load it before the first call.

    Cost: a copy of each input and each output, and the memory of one step for each shape.

    Args:
        function: of tensors, to a tensor, or tuples, lists and dicts of them, or None. A training step begins with
            ``optimizer.zero_grad()``. It reads no value on the host.
        device: where the function works. Inputs from elsewhere are copied there.
        generators: those that it draws from, besides the device's own one.
        warmup: calls before the capture, at least 2. The first one makes what is made on first use; the last one raises
            where the function waits for the device.
        shapes: so many shapes of inputs, with that of a last short batch, get a graph each; more run as they are.

    Raises:
        TypeError: an input is no tensor.
        ValueError: `warmup` is below 2, or a generator is of another device.
        RuntimeError: the function cannot be captured. The message says what to look for. After a capture that failed,
            as opposed to a host read found before it, make anew what was captured before: the generator is another.

    Example:
        >>> weight = torch.zeros(2, requires_grad=True)
        >>> optimizer = torch.optim.Adam([weight], lr=torch.tensor(0.1), fused=True, capturable=True)
        >>> def step(x):
        ...     optimizer.zero_grad()
        ...     loss = (weight - x).square().sum()
        ...     loss.backward()
        ...     optimizer.step()
        ...     return loss
        >>> captured = Captured(step, "cpu")  # or "cuda"
        >>> losses = [captured(torch.ones(2)) for _ in range(50)]  # not one of them is read here
        >>> losses[0], bool(losses[-1] < 0.1)
        (tensor(2.), True)
    """

    def __init__(
        self,
        function: Callable[..., T],
        device: torch.device | str,
        *,
        generators: Sequence[torch.Generator] = (),
        warmup: int = 3,
        shapes: int = 8,
    ) -> None:
        if warmup < 2:
            raise ValueError(f"warmup: expected at least 2 calls before the capture, got {warmup}")
        self.function, self.device, self.warmup, self.shapes = function, torch.device(device), warmup, shapes
        for generator in generators:
            if generator.device.type != self.device.type:
                raise ValueError(f"generators: expected ones of {self.device}, got one of {generator.device}")
        make = _BACKENDS.get(self.device.type)
        self._backend = None if make is None else make(self.device, generators)
        self._recordings: dict[tuple, _Recording[T]] = {}

    def __call__(self, *inputs: Tensor) -> T:
        """The function's result: copies of its own, that carry no gradient."""
        for position, value in enumerate(inputs):
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"inputs: expected tensors, got {value!r} at position {position}; a number would stay as it was at "
                    f"the capture: give torch.tensor({value!r})"
                )
        if self._backend is None:
            return _copies(_detached(self.function, *(value.detach().to(self.device, copy=True) for value in inputs)))
        key = tuple((value.shape, value.dtype) for value in inputs)
        recording = self._recordings.get(key) or _Recording(self, self._backend, inputs)
        if len(self._recordings) < self.shapes:
            self._recordings[key] = recording  # one that is not kept never comes to its capture
        return _copies(recording.take(inputs))


class _Recording(Generic[T]):
    """The calls of one shape: the tensors that hold their inputs, how many are left before the capture, the graph."""

    def __init__(self, captured: Captured[T], backend: Backend, inputs: Sequence[Tensor]) -> None:
        with torch.inference_mode(mode=False):  # tensors of that mode could not be filled outside of it
            self.inputs = [torch.empty_like(value, device=captured.device, requires_grad=False) for value in inputs]
        self.call = partial(_detached, captured.function, *self.inputs)
        self.backend, self.left = backend, captured.warmup
        self.replay: Callable[[], T] | None = None

    def take(self, inputs: Sequence[Tensor]) -> T:
        """One call."""
        with torch.no_grad():
            for static, value in zip(self.inputs, inputs, strict=True):
                static.copy_(value, non_blocking=True)
        if self.left:
            with _explained("synchronizing"):
                found = self.backend.run(self.call, strict=self.left == 1)
            self.left -= 1  # not after an error: what may not be captured never is
            return found
        if self.replay is None:
            with _explained():
                self.replay = self.backend.capture(self.call)
        return self.replay()


@contextmanager
def _explained(word: str = "") -> Iterator[None]:
    """Say what to do about an error with this word in it."""
    try:
        yield
    except RuntimeError as error:
        if word not in str(error):
            raise
        what = str(error).partition("\n")[0]
        raise RuntimeError(f"function: expected one that can be captured, got: {what}; {_ADVICE}") from error


def _detached(function: Callable[..., T], *inputs: Tensor) -> T:
    return tree_map_only(Tensor, Tensor.detach, function(*inputs))


def _copies(found: T) -> T:
    return tree_map_only(Tensor, Tensor.clone, found)


def step_if_finite(optimizer: torch.optim.Optimizer, loss: Tensor, *, max_norm: float | None = None) -> Tensor:
    """``optimizer.step()`` with gradients of norm at most `max_norm`, unless the loss or the norm is not finite.

    A step that is left out changes no weight and none of the optimizer's state. An optimizer with ``fused=True`` finds
    that out on the device, so nothing waits and the step can be captured; the gradients of a step left out are then
    spoilt by the clipping. One with ``capturable=True`` that is not fused, such as Adamax and RMSprop, steps, and
    weights and state are put back on the device; state that this step has made, to what torch's optimizers start from.
    For any other optimizer, and for SGD with dampening, the flag is read on the host before anything else: the
    gradients of a step left out stay as they are, to see which of them was not finite.

    When to use: after ``loss.backward()``, in the place of ``clip_grad_norm_`` and ``optimizer.step()``.

    Cost: one pass over the gradients for the norm, and one more to clip them; to put back, a copy of weights and state
    and two launches for each of their tensors.

    Args:
        optimizer: its parameters stand on one device; those without a gradient are passed over.
        loss: a scalar.
        max_norm: longer gradients, all parameters' together, are shortened to this; None for no clipping.

    Returns:
        Whether the step was taken, a bool scalar on the device. ``torch.where(taken, loss, torch.nan)`` marks the
        others in a record that is read once an epoch.

    Raises:
        ValueError: no parameter has a gradient, the loss is more than one number, or `max_norm` is not positive.

    Example:
        >>> weight = torch.zeros(2, requires_grad=True)
        >>> optimizer = torch.optim.Adam([weight], fused=True)
        >>> loss = (weight * torch.nan).sum()
        >>> loss.backward()
        >>> step_if_finite(optimizer, loss, max_norm=100.0), weight
        (tensor(False), tensor([0., 0.], requires_grad=True))
    """
    if loss.numel() != 1:
        raise ValueError(f"loss: expected a scalar, got shape {tuple(loss.shape)}; write loss.mean()")
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"max_norm: expected a positive number or None, got {max_norm}")
    gradients = [weight.grad for _, weight in _weights(optimizer) if weight.grad is not None]
    if not gradients:
        raise ValueError("optimizer: expected parameters with gradients, got none; call loss.backward() first")
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))  # pyright: ignore[reportPrivateImportUsage]
    # A fused optimizer takes the flag from its count of steps, which has no axes, where a loss may have one of size 1.
    finite = (norm + loss.detach().reshape(())).abs() < math.inf  # three launches, where two calls of isfinite are nine
    dampened = any(group.get("dampening") for group in optimizer.param_groups)  # the first step taken is another then
    fused = getattr(optimizer, "_step_supports_amp_scaling", False) and not dampened
    capturable = not fused and all(group.get("capturable", False) for group in optimizer.param_groups)
    if fused or capturable or finite:
        if max_norm is not None:
            factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(gradients, factor)  # pyright: ignore[reportPrivateImportUsage]
        with _told(optimizer, finite) if fused else _undone(optimizer, ~finite) if capturable else nullcontext():
            optimizer.step()
    return finite


@contextmanager
def _told(optimizer: torch.optim.Optimizer, finite: Tensor) -> Iterator[None]:
    """Tell a fused optimizer on the device whether to step, by the attribute that `torch.amp.GradScaler` sets."""
    told: Any = optimizer
    told.found_inf = (~finite).float()
    fresh = [pair for pair in _weights(optimizer) if not optimizer.state.get(pair[1])]
    try:
        yield
    finally:
        del told.found_inf
    with torch.no_grad():  # SGD's momentum that was left out is memory that nobody has set
        for group, weight in fresh:
            for key, value in optimizer.state.get(weight, {}).items():
                if isinstance(value, Tensor):
                    value.copy_(torch.where(finite, value, _start(group, key)))


@contextmanager
def _undone(optimizer: torch.optim.Optimizer, spoilt: Tensor) -> Iterator[None]:
    """Put weights and state back where a step was spoilt, without asking on the host whether it was."""
    before = {key: value.detach().clone() for key, value in _tensors(optimizer).items()}
    yield
    with torch.no_grad():
        for (i, key), value in _tensors(optimizer).items():
            old = before[i, key] if (i, key) in before else _start(_weights(optimizer)[i][0], key)
            value.copy_(torch.where(spoilt, old, value))


def _start(group: dict[str, Any], key: str) -> Tensor | float:
    """What torch's optimizers begin a part of their state with: Rprop and ASGD with the rate, NAdam with a 1."""
    return group["lr"] if key in ("step_size", "eta") else float(key in ("mu", "mu_product"))


def _weights(optimizer: torch.optim.Optimizer) -> list[tuple[dict[str, Any], Tensor]]:
    return [(group, weight) for group in optimizer.param_groups for weight in group["params"]]


def _tensors(optimizer: torch.optim.Optimizer) -> dict[tuple[int, str], Tensor]:
    """The weights of an optimizer and its state, as far as it has been made."""
    parts = [{"weight": weight, **optimizer.state.get(weight, {})} for _, weight in _weights(optimizer)]
    found = [((i, key), value) for i, part in enumerate(parts) for key, value in part.items()]
    return {place: value for place, value in found if isinstance(value, Tensor)}
