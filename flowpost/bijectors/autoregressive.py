"""The inverse autoregressive flow's step: a masked network feeds an LSTM-style gate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowpost.bijectors.base import Bijector, check_order
from flowpost.bijectors.made import MADE

_SPREAD = 4.0
_REACH = 1e3


def gate_parameters(raw: Tensor, mean: Tensor, forget_bias: float = 2.0) -> tuple[Tensor, Tensor]:
    """Bound a network's raw outputs: ``logit = bias + 4 tanh(raw / 4)`` and ``m = 1e3 tanh(mean / 1e3)``.

    The bounds are soft, with slope 1 at 0, and keep the inverse well-conditioned: at bias 2 the gate stays within
    0.119 and 0.998.

    Args:
        raw: any shape.
        mean: any shape.
        forget_bias: the gate's logit at ``raw = 0``.

    Returns:
        logit and m, of the shapes of `raw` and `mean`.
    """
    return forget_bias + _SPREAD * torch.tanh(raw / _SPREAD), _REACH * torch.tanh(mean / _REACH)


def gate(z: Tensor, logit: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """LSTM-style update ``z' = s z + (1 - s) m`` with ``s = sigmoid(logit)``, ``log_det = sum(log s)``.

    Args:
        z: ``(*batch, dim)``.
        logit: ``(*batch, dim)``.
        mean: ``(*batch, dim)``.

    Returns:
        z' ``(*batch, dim)`` and log_det ``(*batch)``.
    """
    return torch.lerp(mean, z, torch.sigmoid(logit)), F.logsigmoid(logit).sum(-1)


def gate_inverse(z: Tensor, logit: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Undo `gate` for known logit and mean: ``z = m + (z' - m) / s``.

    Args:
        z: the image z', ``(*batch, dim)``.
        logit: ``(*batch, dim)``.
        mean: ``(*batch, dim)``.

    Returns:
        The preimage ``(*batch, dim)`` and the log-det of the inverse ``(*batch)``.
    """
    return mean + (z - mean) / torch.sigmoid(logit), -F.logsigmoid(logit).sum(-1)


class Autoregressive(Bijector):
    """A step of inverse autoregressive flow: ``z'_i = s_i z_i + (1 - s_i) m_i``, m_i and s_i networks of z_{<i} and h.

    Invertible because the gate s is a sigmoid of a bounded logit, so positive, and the Jacobian is triangular. Forward
    and log-det are one pass of the network; the inverse is dim passes. A fresh step multiplies z by ``sigmoid(2)``: the
    network's last layer starts at 0.

    Args:
        dim: size of z.
        context_size: size of h, which the network's first layer reads; 0 for none.
        hidden: widths of the network's hidden layers, any number of them.
        order: the variables in the order in which they are computed; by default as they come.
        activation: element-wise, ``F.elu`` or ``F.relu`` say.
        forget_bias: the gate's logit at the start.

    Shapes:
        z ``(*batch, dim)``, context ``(*batch, context_size)``.

    Reference:
        Kingma et al. (2016), Improving Variational Inference with Inverse Autoregressive Flow, eq. 13, 14, algorithm 1;
        Kingma & Welling (2019), section 3.2.1, algorithm 5.

    Example:
        >>> step = Autoregressive(4, context_size=8, hidden=(32, 32))
        >>> z, log_det = step(torch.randn(50, 16, 4), torch.randn(16, 8))
        >>> log_det.shape
        torch.Size([50, 16])
    """

    order: Tensor | None
    back: Tensor | None
    start: Tensor

    def __init__(
        self,
        dim: int,
        context_size: int = 0,
        hidden: Sequence[int] = (320, 320),
        *,
        order: Sequence[int] | None = None,
        activation: Callable[[Tensor], Tensor] = F.elu,
        forget_bias: float = 2.0,
    ) -> None:
        super().__init__(dim, context_size)
        self.forget_bias = forget_bias
        self.net = MADE(dim, 2, hidden, context_size, activation)
        for parameter in self.net.layers[-1].parameters():
            nn.init.zeros_(parameter)
        given = None if order is None else torch.tensor(check_order(order, dim))
        self.register_buffer("order", given)
        self.register_buffer("back", None if given is None else torch.argsort(given))
        bound = 1 / math.sqrt(max(context_size, 1))
        self.register_buffer("start", torch.empty(context_size).uniform_(-bound, bound), persistent=False)

    def initial_context(self) -> Tensor:
        """Features drawn as a linear layer's bias is; at zeros the weights that read h would have no gradient."""
        return self.start.clone()

    def context_gain(self) -> Tensor:
        """Ones: h is features, not parameters, so a head keeps its usual initialization."""
        return torch.ones(self.context_size)

    def causal_order(self) -> Tensor:
        """The order in which the variables are computed."""
        return torch.arange(self.dim) if self.order is None else self.order

    def _gate_parameters(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        # Under autocast the network may run in half precision; everything after it does not.
        raw, mean = self.net(z, context).to(z.dtype).unbind(-1)
        return gate_parameters(raw, mean, self.forget_bias)

    def _sorted(self, z: Tensor) -> Tensor:
        return z if self.order is None else z.index_select(-1, self.order)

    def _unsorted(self, z: Tensor) -> Tensor:
        return z if self.back is None else z.index_select(-1, self.back)

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        z = self._sorted(z)
        image, log_det = gate(z, *self._gate_parameters(z, context))
        return self._unsorted(image), log_det

    def _inverse(self, z: Tensor, context: Tensor | None, known: Tensor | None) -> tuple[Tensor, Tensor]:
        image = preimage = self._sorted(z)
        log_det = z.new_zeros(())
        for _ in range(self.dim):  # pass i settles variable i, for it reads only those before
            preimage, log_det = gate_inverse(image, *self._gate_parameters(preimage, context))
        return self._unsorted(preimage), log_det
