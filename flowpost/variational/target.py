"""The density that a user's log joint gives the free coordinates of its parameters."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from flowpost.variational.calling import Calls, LogJoint, agree, beyond, call, find, line, refusal, trial
from flowpost.variational.draws import described, named, short
from flowpost.variational.parameters import Parameters
from flowpost.variational.slopes import astray

SAME = 100
"""Roundings by which a value differs at most from call to call."""
_BEHIND = (
    "torch.where and nansum pass on the nan of what they leave out, as of missing data; put a number in its place "
    "first, as x.nan_to_num() or torch.where(x > 0, x, 1.0)"
)
_FOLLOWS = "expected one that follows every parameter, without .detach(), .item(), .numpy() and no_grad"


class Target:
    """The log density ``log p(x, g(u)) + log|det dg/du|`` of coordinates u, for many draws at once.

    How the log joint is called is found out once, on a few draws. It is "vectorised" if it takes parameters with a
    leading axis of draws and gives each draw what it gives that draw alone. Else it is a function of one draw, that
    returns a scalar: "vmap" if `torch.func.vmap` gives the same values, else "loop", slow, with a warning. Draws of
    the trial come from a generator of their own. Distributions of torch do not validate their values within the log
    joint, so that vmap and CUDA graphs can follow it; but once they do, on the trial's draws, and a finite value that
    they refuse there is warned of. So is a gradient that is missing, or not that of the values.

    Args:
        log_joint: of the parameters, a mapping or a tensor, as ``parameters.constrain`` gives them, to ``log p(x,
            theta)`` up to a constant; ``-inf`` where theta is impossible. A draw at which it raises a `LinAlgError`,
            ArithmeticError, AssertionError or ValueError, as at a matrix that is not positive definite, has the value
            nan, as long as some draw of the trial has another.
        parameters: what it is a function of.
        device: of the draws.
        dtype: of the draws; `precision` chooses one.

    Attributes:
        calls: "vectorised", "vmap" or "loop".
        evaluations: of how many draws a gradient was asked so far, whoever asked; the trial does not count. A replayed
            CUDA graph is not seen.
        coarsest: the dtype to which values are rounded: that of the draws, or of the log joint's own values.

    Raises:
        TypeError: for a value that is no floating tensor, or has no gradient.
        ValueError: for values of another shape, or that change from call to call, for parameters changed in place, or
            if no draw of the trial has a finite value and gradient.

    Example:
        >>> target = Target(lambda theta: -theta.square().sum(-1), Parameters(2), device="cpu", dtype=torch.float32)
        >>> target.calls
        'vectorised'
        >>> value, slope = target.gradient(torch.ones(3, 2))
        >>> value.tolist(), slope.shape, target.evaluations
        ([-2.0, -2.0, -2.0], torch.Size([3, 2]), 3)
    """

    def __init__(
        self, log_joint: LogJoint, parameters: Parameters, *, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        self.log_joint, self.parameters, self.dtype = log_joint, parameters, dtype
        self.evaluations = 0
        free = trial(parameters, device, dtype)
        version = free._version
        found = find(log_joint, parameters, free)
        if free._version != version:
            raise ValueError(
                "log_joint: expected its parameters left as they are, got them changed in place, which would move the "
                "draws themselves; write x = x.abs(), not x.abs_(), or give the parameter a constraint"
            )
        self.calls: Calls = found.calls
        with torch.no_grad():
            self._trial = free, call(log_joint, parameters.constrain(free)[0], found.calls)
        self.coarsest = max(dtype, self._trial[1].dtype, key=lambda each: torch.finfo(each).eps)
        lost = self._without_gradient(free)
        value, slope = self.gradient(free)
        self.check(free, value, slope)
        self.evaluations = 0
        if self.calls == "loop":
            _warn(
                f"is called in a Python loop over draws, for torch.func.vmap does not run it ({found.reason}); "
                f"write it for parameters with a leading axis of draws, or without .item() and branches on values"
            )
        if lost:
            _warn(f"has no gradient with respect to {', '.join(lost)} at any of {len(free)} draws; {_FOLLOWS}")
        elif self.coarsest == torch.float64 and (where := astray(self, parameters, free, value, slope)):
            _warn(f"has a gradient that is not that of its values: {where}; {_FOLLOWS}")
        if raised := next(filter(None, map(self.refusal, free[found.values.isnan()])), ""):
            _warn(
                f"raises {raised}; such draws are left out, and take many calls to find; make its value -inf there, or "
                f"add a small number to the diagonal of a matrix that is not positive definite"
            )
        if torn := self.torn(free, value, slope):
            _warn(f"has {torn}")
        with torch.no_grad():
            outside = beyond(log_joint, parameters.constrain(free)[0], self.calls, found.values)
        if outside:
            _warn(
                f"has a finite value at {outside}; expected -inf there; give the parameters constraints that are the "
                f"support, or the distribution validate_args=False if this is meant"
            )

    def __call__(self, free: Tensor) -> Tensor:
        """The log density ``(S,)`` of coordinates ``(S, dim)``; differentiable."""
        if free.requires_grad and torch.is_grad_enabled():
            self.evaluations += len(free)
        values, log_det = self.parameters.constrain(free)
        log_joint = call(self.log_joint, values, self.calls)
        if log_joint.shape != log_det.shape:
            raise ValueError(f"log_joint: expected shape {tuple(log_det.shape)}, got {tuple(log_joint.shape)}")
        return log_joint.to(log_det.dtype) + log_det

    def gradient(self, free: Tensor) -> tuple[Tensor, Tensor]:
        """The log density ``(S,)`` of coordinates ``(S, dim)``, and its gradient ``(S, dim)``, both detached."""
        leaf = free.detach().requires_grad_()
        with torch.enable_grad():
            value = self(leaf)
            (slope,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), slope

    def check(self, free: Tensor, value: Tensor, slope: Tensor | None = None) -> None:
        """Raise if none of the draws has a finite value, and where given a finite gradient; reads them on the host.

        A draw outside the support, where the value is -inf, is no fault, nor is one where it overflows.

        Raises:
            ValueError: with the parameters of one such draw.
        """
        fine = value.isfinite()
        if not fine.any():
            worst = int((value != -torch.inf).int().argmax())
            hint = "; give its parameters constraints that are the support" if value[worst] == -torch.inf else ""
            raise ValueError(
                f"log_joint: expected a finite value, got {value[worst].item()} at {self.describe(free[worst])}, and "
                f"none at any of {len(free)} draws{hint}"
            )
        if slope is not None and not (fine & slope.isfinite().all(-1)).any():
            row = int(fine.int().argmax())
            raise ValueError(
                f"log_joint: expected a finite gradient, got {short(slope[row])} at {self.describe(free[row])}; "
                f"{_BEHIND}"
            )

    def torn(self, free: Tensor, value: Tensor, slope: Tensor, most: float = 0.0) -> str:
        """What is said of draws with a finite value and no finite gradient, if there is more than a share of them.

        They are left out of a fit, whose q keeps away from where they are: its ELBO is that of the others.
        """
        rows = value.isfinite() & ~slope.isfinite().all(-1)
        if not rows.double().mean() > most:
            return ""
        return (
            f"a finite value but no finite gradient at {int(rows.sum())} of {len(free)} draws, as at "
            f"{self.describe(free[int(rows.int().argmax())])}; such draws are left out of the fit; {_BEHIND}"
        )

    @torch.no_grad()
    def changed(self) -> str:
        """What a draw of the trial had and has now, where the log joint has changed since; empty where it has not.

        So it has where data are looked up by a name that has been given to others, as in a loop over data sets.
        """
        free, before = self._trial
        now = call(self.log_joint, self.parameters.constrain(free)[0], self.calls)
        rtol = SAME * torch.finfo(before.dtype).eps
        if agree(now, before, rtol):
            return ""
        row = next((i for i in range(len(free)) if not agree(now[i], before[i], rtol)), 0)
        return f"{before[row].item():.10g} at {self.describe(free[row])}, and now {now[row].sum().item():.10g}"

    def check_same(self) -> None:
        """Raise if the log joint has changed: what reads it beside what was read before would mix two models.

        Raises:
            ValueError: with one of its values then and now.
        """
        if changed := self.changed():
            raise ValueError(
                f"log_joint: expected that which was fitted, whose value was {changed}; keep its data as they were, or "
                f"give each fit a function with data of its own"
            )

    def describe(self, free: Tensor) -> str:
        """The parameters of one draw's coordinates ``(dim,)``, in short."""
        with torch.no_grad():
            return described(self.parameters.constrain(free)[0])

    def refusal(self, free: Tensor) -> str:
        """What the log joint raises at one draw's coordinates ``(dim,)``, and where; empty where it has a value."""
        with torch.no_grad():
            raised = refusal(self.log_joint, self.parameters.constrain(free.unsqueeze(0))[0], self.calls)
        return f"{raised} at {self.describe(free)}" if raised else ""

    @torch.enable_grad()
    def _without_gradient(self, free: Tensor) -> list[str]:
        """The parameters that the log joint does not follow; an error where it follows none."""
        values, _ = self.parameters.constrain(free.detach().requires_grad_())
        parts = named(values)
        try:
            total = call(self.log_joint, values, self.calls).sum()
            slopes = torch.autograd.grad(total, list(parts.values()), allow_unused=True)
        except RuntimeError as error:
            raise TypeError(
                f"log_joint: expected a value with a gradient at {self.describe(free[0])}, got none ({line(error)}); "
                f"write it in operations of torch, without .detach(), .item(), .numpy() and no_grad"
            ) from error
        return [
            name for name, slope in zip(parts, slopes, strict=True) if slope is None or not slope.nan_to_num().any()
        ]


def _warn(message: str) -> None:
    """A warning at the line that called who made the target."""
    warnings.warn(f"log_joint: {message}", UserWarning, stacklevel=4)
