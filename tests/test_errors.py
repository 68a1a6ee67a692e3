"""Bad input raises the type and the words of RELIABILITY's table 5b, in both directions, at the outermost call."""

import math
import re
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from registry import Case, Entry, backward, core_first, draw
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import flowpost
from flowpost import (
    Affine,
    Autoregressive,
    Bijector,
    Chain,
    Conditioned,
    Coupling,
    FlowPosterior,
    Inverse,
    Learned,
    Permute,
    Planar,
    Reverse,
    Scale,
    Shared,
    Spline,
    Sylvester,
    UnitLowerTriangular,
)
from flowpost.calibration import rank_ecdf, sbc_ranks
from flowpost.evaluation import active_units, decompose_elbo, importance_estimate, log_marginal, refine
from flowpost.gaps import inference_gaps
from flowpost.objectives import free_bits
from flowpost.recipes import RECIPES
from flowpost.vae import VAE, Bernoulli, Binomial, Categorical


def raises(kind: type[Exception], message: str, call: Callable[[], object]) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == message


def context_of(step: Bijector, *batch: int) -> Tensor | None:
    return torch.zeros(*batch, step.context_size) if step.context_size else None


WRONG_Z: list[tuple[Tensor | list, type[Exception], str]] = [
    (torch.zeros(5, 5), ValueError, "z: expected shape (*, 4), got (5, 5)"),
    (torch.zeros(5, 3), ValueError, "z: expected shape (*, 4), got (5, 3)"),
    (
        torch.zeros(5, 1),
        ValueError,
        "z: expected shape (*, 4), got (5, 1); flowpost never broadcasts the event dimension",
    ),
    (torch.zeros(()), ValueError, "z: expected shape (*, 4), got ()"),
    ([0.0] * 4, TypeError, "z: expected a torch.Tensor, got list"),
    (torch.zeros(5, 4).long(), TypeError, "z: expected a floating dtype, got torch.int64; call .float()"),
    (torch.zeros(5, 4).bool(), TypeError, "z: expected a floating dtype, got torch.bool; call .float()"),
    (
        torch.zeros(5, 4, dtype=torch.complex64),
        TypeError,
        "z: expected a floating dtype, got torch.complex64; call .float()",
    ),
    (
        torch.zeros(5, 4, dtype=torch.bfloat16),
        TypeError,
        "z: expected float32 or float64, got torch.bfloat16; use torch.autocast around the encoder instead",
    ),
    (
        torch.zeros(5, 4, dtype=torch.float16),
        TypeError,
        "z: expected float32 or float64, got torch.float16; use torch.autocast around the encoder instead",
    ),
]


@core_first
def test_wrong_z(entry: Entry) -> None:
    step = entry.make(4, 0)
    for z, kind, message in WRONG_Z:
        for function in (step, step.inverse):
            raises(kind, message, lambda f=function, z=z: f(z, context_of(step, 5)))  # pyright: ignore[reportArgumentType]


@core_first
def test_dtype_mismatch(entry: Entry) -> None:
    step = entry.make(4, 0)
    if not list(step.parameters()):
        return
    for function in (step, step.inverse):
        with pytest.raises(
            TypeError, match=r"^z: expected torch\.float32 like the parameters, got torch\.float64; call"
        ):
            function(torch.zeros(5, 4, dtype=torch.float64), context_of(step, 5))
    step = step.bfloat16()
    for function in (step, step.inverse):
        with pytest.raises(TypeError, match=r"^parameters: expected float32 or float64, got torch\.bfloat16"):
            function(torch.zeros(5, 4), context_of(step, 5))


def test_dtype_mismatch_says_what_to_do() -> None:
    raises(
        TypeError,
        "z: expected torch.float32 like the parameters, got torch.float64; "
        "call .to(torch.float64) on the flow or .float() on z",
        lambda: Learned(Planar(4))(torch.zeros(5, 4, dtype=torch.float64)),
    )


@core_first
def test_device_mismatch(entry: Entry) -> None:
    step = entry.make(4, 0)
    z = torch.zeros(5, 4, device="meta")
    message = "z: expected device cpu like the parameters, got meta"
    if not list(step.parameters()):
        if not step.context_size:
            return
        message = "context: expected device meta like z, got cpu"
    for function in (step, step.inverse):
        raises(ValueError, message, lambda f=function: f(z, context_of(step, 5)))


@core_first
def test_wrong_context(entry: Entry) -> None:
    step, z = entry.make(4, 0), torch.zeros(6, 4)
    size, reader = step.context_size, f"context: {step.layout()} of dim 4 reads"
    for function in (step, step.inverse):
        if not size:
            raises(
                ValueError,
                f"{reader} none, got shape (6, 3)",
                lambda f=function: f(z, torch.zeros(6, 3)),
            )
            continue
        wrong: list[tuple[Any, type[Exception], str]] = [
            (None, ValueError, f"{reader} {size} numbers, got None"),
            (torch.zeros(6, size + 1), ValueError, f"{reader} {size} numbers, got shape (6, {size + 1})"),
            (torch.zeros(()), ValueError, f"{reader} {size} numbers, got shape ()"),
            (
                torch.zeros(3, size),
                ValueError,
                "context: batch shape (3,) does not broadcast with z batch shape (6,)",
            ),
            ([0.0] * size, TypeError, "context: expected a torch.Tensor, got list"),
            (
                torch.zeros(6, size).int(),
                TypeError,
                "context: expected a floating dtype, got torch.int32; call .float()",
            ),
        ]
        for context, kind, message in wrong:
            raises(kind, message, lambda f=function, c=context: f(z, c))


@core_first
def test_wrong_preimage(entry: Entry) -> None:
    step = entry.make(4, 0)
    context = context_of(step, 5)
    with pytest.raises(ValueError, match=r"^preimage: expected shape \(\*, 4\), got \(5, 3\)$"):
        step.inverse(torch.zeros(5, 4), context, preimage=torch.zeros(5, 3))
    with pytest.raises(TypeError, match=r"^preimage: expected a torch\.Tensor, got list$"):
        step.inverse(torch.zeros(5, 4), context, preimage=[0.0])  # pyright: ignore[reportArgumentType]


@core_first
def test_an_empty_batch_is_accepted(entry: Entry) -> None:
    step = entry.make(4, 0)
    for function in (step, step.inverse):
        image, log_det = function(torch.zeros(0, 4), context_of(step, 0))
        assert image.shape == (0, 4)
        assert log_det.shape == (0,)


NO_STEP = nn.Linear(2, 2)
NO_MODULE = (
    "expected a torch.nn.Module, got function; write a torch.nn.Module whose forward calls it, so that its parameters "
    "are found"
)
NO_NETWORK = f"network: {NO_MODULE}".replace("function", "builtin_function_or_method")
ONE_WIDTH = "hidden: expected a tuple of ints, got 8; write (8,) for one layer"
OF_HIDDEN: list[Callable[[Any], object]] = [
    lambda hidden: Autoregressive(2, 0, hidden),
    lambda hidden: Coupling(2, Affine(1), 0, hidden),
    lambda hidden: flowpost.realnvp(3, 2, hidden=hidden),
    lambda hidden: flowpost.spline_autoregressive(3, 2, hidden=hidden),
]
DIM_0 = "dim: expected an int >= 1, got 0"
CONSTRUCTORS: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: Affine(0), ValueError, DIM_0),
    (lambda: Planar(0), ValueError, DIM_0),
    (lambda: UnitLowerTriangular(0), ValueError, DIM_0),
    (lambda: Reverse(0), ValueError, DIM_0),
    (lambda: Scale(0, 1.0), ValueError, DIM_0),
    (lambda: Autoregressive(0), ValueError, DIM_0),
    (lambda: Permute([]), ValueError, DIM_0),
    (lambda: Affine(-3), ValueError, "dim: expected an int >= 1, got -3"),
    (lambda: Affine(2.0), TypeError, "dim: expected an int, got float"),  # pyright: ignore[reportArgumentType]
    (lambda: Planar(True), TypeError, "dim: expected an int, got bool"),  # noqa: FBT003
    (lambda: Planar("2"), TypeError, "dim: expected an int, got str"),  # pyright: ignore[reportArgumentType]
    (lambda: Autoregressive(3, -1), ValueError, "context_size: expected an int >= 0, got -1"),
    (lambda: Autoregressive(3, 0, (4, 0)), ValueError, "hidden: expected an int >= 1, got 0"),
    (
        lambda: Autoregressive(3, order=[0, 1, 1]),
        ValueError,
        "order: expected a permutation of 0..2, got [0, 1, 1]",
    ),
    (lambda: Permute([1, 2, 3]), ValueError, "order: expected a permutation of 0..2, got [1, 2, 3]"),
    (lambda: Permute([0, 2]), ValueError, "order: expected a permutation of 0..1, got [0, 2]"),
    (lambda: Scale(2, 0.0), ValueError, "factor: expected a positive finite number, got 0.0"),
    (lambda: Scale(2, float("inf")), ValueError, "factor: expected a positive finite number, got inf"),
    (lambda: Scale(2, float("nan")), ValueError, "factor: expected a positive finite number, got nan"),
    (
        lambda: Scale(2, torch.tensor(2.0, requires_grad=True)),  # pyright: ignore[reportArgumentType]
        TypeError,
        "factor: expected a number, got Tensor; it is a constant, which is not trained: write .item()",
    ),
    (
        lambda: Spline(2, bound=torch.tensor(2.0, requires_grad=True)),  # pyright: ignore[reportArgumentType]
        TypeError,
        "bound: expected a number, got Tensor; it is a constant, which is not trained: write .item()",
    ),
    (lambda: Sylvester(0), ValueError, DIM_0),
    (lambda: Sylvester(3, 0), ValueError, "rank: expected an int >= 1, got 0"),
    (lambda: Sylvester(3, 4), ValueError, "rank: expected an int <= 3, the size of z, got 4"),
    (lambda: Sylvester(3, 2, -1), ValueError, "reflections: expected an int >= 0, got -1"),
    (
        lambda: flowpost.orthogonal_sylvester(3, 2, rank=3),
        ValueError,
        "rank: expected an int <= 2, the size of z, got 3",
    ),
    (
        lambda: flowpost.householder_sylvester(3, 2, reflections=0),
        ValueError,
        "reflections: expected an int >= 1, got 0",
    ),
    (lambda: flowpost.triangular_sylvester(3, 2, steps=0), ValueError, "steps: expected an int >= 1, got 0"),
    (lambda: Chain(), ValueError, "Chain: expected at least one step, got none"),
    (lambda: Shared(), ValueError, "Shared: expected at least one step, got none"),
    (lambda: Chain(Affine(2), Planar(3)), ValueError, "Chain: expected steps of one dim, got [2, 3]"),
    (lambda: Shared(Affine(2), Reverse(3)), ValueError, "Shared: expected steps of one dim, got [2, 3]"),
    (lambda: Shared(Affine(2), Planar(2)), ValueError, "Shared: expected steps of one context_size, got [4, 5]"),
    (lambda: Chain(NO_STEP), TypeError, "Chain: expected Bijector steps, got Linear"),  # pyright: ignore[reportArgumentType]
    (lambda: Learned(NO_STEP), TypeError, "step: expected a Bijector, got Linear"),  # pyright: ignore[reportArgumentType]
    (lambda: Inverse(NO_STEP), TypeError, "step: expected a Bijector, got Linear"),  # pyright: ignore[reportArgumentType]
    (
        lambda: Learned(Reverse(2)),
        ValueError,
        "step: expected one that reads a context, got Reverse with context_size=0",
    ),
    (
        lambda: Conditioned(Reverse(2), 3),
        ValueError,
        "step: expected one that reads a context, got Reverse with context_size=0",
    ),
    (lambda: Conditioned(Planar(2), 0), ValueError, "features: expected an int >= 1, got 0"),
    (lambda: flowpost.nice(3, "2"), TypeError, "dim: expected an int, got str"),  # pyright: ignore[reportArgumentType]
    (
        lambda: flowpost.full_covariance("3", 2),  # pyright: ignore[reportArgumentType]
        TypeError,
        "features: expected an int, got str",
    ),
    (lambda: FlowPosterior(3, NO_STEP), TypeError, "flow: expected a Bijector, got Linear"),  # pyright: ignore[reportArgumentType]
    (lambda: FlowPosterior(-1, Planar(2)), ValueError, "features: expected an int >= 0, got -1"),
    (lambda: flowpost.planar(3, 2, steps=0), ValueError, "steps: expected an int >= 1, got 0"),
    (lambda: flowpost.iaf(3, 2, steps=0), ValueError, "steps: expected an int >= 1, got 0"),
    (lambda: flowpost.diagonal(3, 0), ValueError, DIM_0),
    (lambda: Binomial(0), ValueError, "n: expected an int >= 1, got 0"),
    (lambda: Categorical(1), ValueError, "levels: expected an int >= 2, got 1"),
    *((lambda make=make: make(8), TypeError, ONE_WIDTH) for make in OF_HIDDEN),
    (lambda: flowpost.maf(3, 2, hidden=(0,)), ValueError, "hidden: expected an int >= 1, got 0"),
    (lambda: FlowPosterior(3, Affine(2), lambda h: h), TypeError, f"head: {NO_MODULE}"),  # pyright: ignore[reportArgumentType]
    (lambda: Coupling(2, Affine(1), network=lambda *_: torch.sinh), TypeError, NO_NETWORK),  # pyright: ignore
]


@pytest.mark.parametrize("index", range(len(CONSTRUCTORS)))
def test_bad_sizes_raise_at_construction(index: int) -> None:
    call, kind, message = CONSTRUCTORS[index]
    raises(kind, message, call)


def test_a_chain_checks_once_at_the_outermost_call() -> None:
    flow = Chain(Chain(Affine(4), Planar(4)), Learned(Planar(4)))
    message = "context: Chain(Chain(Affine 8, Planar 9) 17) of dim 4 reads 17 numbers, got shape (5, 3)"
    with pytest.raises(ValueError, match=re.escape(message)):
        flow(torch.zeros(5, 4), torch.zeros(5, 3))


# ----------------------------------------------------------------------------------------------------- posterior

H = torch.zeros(6, 3)


def posterior() -> FlowPosterior:
    return flowpost.planar(3, 4, steps=1)


POSTERIOR: list[tuple[Callable[[FlowPosterior], object], type[Exception], str]] = [
    (lambda q: q(), ValueError, "h: this posterior needs shape (*, 3), got None"),
    (lambda q: q(torch.zeros(6, 4)), ValueError, "h: expected shape (*, 3), got (6, 4)"),
    (lambda q: q(torch.zeros(())), ValueError, "h: expected shape (*, 3), got ()"),
    (lambda q: q([0.0] * 3), TypeError, "h: expected a torch.Tensor, got list"),
    (lambda q: q(H.long()), TypeError, "h: expected a floating dtype, got torch.int64; call .float()"),
    (lambda q: q(H.to("meta")), ValueError, "h: expected device cpu like the parameters, got meta"),
    (lambda q: q(H, (-1,)), ValueError, "sample_shape: expected non-negative ints, got (-1,)"),
    (lambda q: q(H, 5), TypeError, "sample_shape: expected a tuple of ints, got 5"),
    (lambda q: q(H, (2.0,)), TypeError, "sample_shape: expected a tuple of ints, got (2.0,)"),
    (lambda q: q(H, [5]), TypeError, "sample_shape: expected a tuple of ints, got [5]"),
    (lambda q: q(H, (True,)), TypeError, "sample_shape: expected a tuple of ints, got (True,)"),
    (lambda q: q.at(H).sample(5), TypeError, "sample_shape: expected a tuple of ints, got 5"),  # pyright: ignore
    (lambda q: q.at(H).rsample_and_log_prob(5), TypeError, "sample_shape: expected a tuple of ints, got 5"),  # pyright: ignore
    (lambda q: q(H, (5,), torch.zeros(6, 4)), ValueError, "noise: expected shape (5, 6, 4), got (6, 4)"),
    (lambda q: q.log_prob(torch.zeros(6, 5), H), ValueError, "z: expected shape (*, 4), got (6, 5)"),
    (
        lambda q: q.log_prob(torch.zeros(6, 1), H),
        ValueError,
        "z: expected shape (*, 4), got (6, 1); flowpost never broadcasts the event dimension",
    ),
    (lambda q: q.log_prob(torch.zeros(6, 4)), ValueError, "h: this posterior needs shape (*, 3), got None"),
    (lambda q: q.gaussian(H), TypeError, "posterior: expected a Gaussian one, got a flow of Chain"),
    (lambda q: q.at(torch.zeros(6, 2)), ValueError, "h: expected shape (*, 3), got (6, 2)"),
    (lambda q: q(H, (5,), [0.0]), TypeError, "noise: expected a torch.Tensor, got list"),
    (
        lambda q: q(H, (5,), torch.zeros(5, 6, 4, dtype=torch.float64)),
        TypeError,
        "noise: expected torch.float32 like the parameters, got torch.float64; call .to(torch.float32)",
    ),
    (
        lambda _: flowpost.iaf(3, 4, steps=1)(H, noise=torch.zeros(6, 4).double()),  # not as the z of its networks
        TypeError,
        "noise: expected torch.float32 like the parameters, got torch.float64; call .to(torch.float32)",
    ),
    (
        lambda q: q(H, noise=torch.zeros(6, 4, device="meta")),
        ValueError,
        "noise: expected device cpu like the parameters, got meta",
    ),
    (lambda q: q.at(H).expand((5,)), ValueError, "batch_shape: expected one that (6,) expands to, got (5,)"),
]


@pytest.mark.parametrize("index", range(len(POSTERIOR)))
def test_the_posterior_s_bad_inputs(index: int) -> None:
    call, kind, message = POSTERIOR[index]
    raises(kind, message, lambda: call(posterior()))


def test_features_for_a_posterior_without_an_encoder() -> None:
    raises(ValueError, "h: this posterior takes none, got shape (6, 3)", lambda: flowpost.planar(0, 4, steps=1)(H))


def test_a_posterior_takes_empty_batches() -> None:
    for recipe in RECIPES.values():
        q = recipe(3, 4)
        z, log_prob, noise = q(H[:0], (5,))
        assert z.shape == noise.shape == (5, 0, 4)
        assert log_prob.shape == (5, 0)
        assert q(H, (0,)).z.shape == (0, 6, 4)
        assert q.log_prob(z, H[:0]).shape == (5, 0)


# ------------------------------------------------------------------------------------------------------ checking


@core_first
def test_values_are_checked_only_on_request(entry: Entry) -> None:
    step, z, context = entry.make(4, 0), torch.zeros(6, 4), None
    if step.context_size:
        context = step.initial_context().expand(6, -1).clone()
    z[3, 2] = torch.nan
    z[5, 0] = torch.inf
    for function in (step, step.inverse):
        function(z, context)
        with flowpost.checking():
            message = "z: 2 of 6 rows are not finite (first: row 3, feature 2 = nan)"
            raises(flowpost.NonFiniteError, message, lambda f=function: f(z, context))
            if context is not None:
                bad = context.clone()
                bad[1, 0] = -torch.inf
                with pytest.raises(
                    ValueError, match=r"^context: 1 of 6 rows are not finite \(first: row 1, feature 0 = "
                ):
                    function(torch.zeros(6, 4), bad)
        function(z, context)


@core_first
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_checking_changes_no_value(entry: Entry, dtype: torch.dtype) -> None:
    step, z, context = draw(entry, Case(4, push=0.1), dtype=dtype, batch=(3, 2))
    for function in (step, backward(step)):
        expected = function(z, context)
        with flowpost.checking():
            found = function(z, context)
            function(z[:0], None if context is None else context[:0])
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class Wrong(Bijector):
    """Its inverse is off by a thousandth in the second of five rows."""

    def __init__(self) -> None:
        super().__init__(2)

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return 2 * z, z.new_tensor(2 * math.log(2))

    def _inverse(self, z: Tensor, context: Tensor | None, preimage: Tensor | None) -> tuple[Tensor, Tensor]:
        back = z / 2
        return torch.cat([back[:1], back[1:2] + 5e-4, back[2:]]), z.new_tensor(-2 * math.log(2))


def test_an_inaccurate_inverse_is_named() -> None:
    step, z = Wrong(), torch.zeros(5, 2)
    step.inverse(z)
    with flowpost.checking(), pytest.raises(flowpost.InversionError) as caught:
        step.inverse(z)
    pattern = r"inverse: residual 0\.001 > [\d.e-]+ in 1 of 5 rows; the flow is too ill-conditioned for float32 here \("
    assert re.match(pattern, str(caught.value))
    assert isinstance(caught.value, ArithmeticError)


def test_an_ill_conditioned_log_prob_warns() -> None:
    """A Gaussian at 1e4 with scale 2e-3: one rounding of z is half a scale."""
    q = flowpost.diagonal(0, 1)
    assert isinstance(q.flow, Learned)
    with torch.no_grad():
        q.flow.context.copy_(torch.tensor([1e4, -7.0]))
    z = torch.full((3, 1), 1e4)
    q.log_prob(z)
    message = (
        r"^log_prob: moves by [\d.]+ nats when z moves by 4 ulp in 3 of 3 rows; use the log q returned by sample\(\)$"
    )
    with flowpost.checking(), pytest.warns(flowpost.IllConditionedWarning, match=message):
        q.log_prob(z)


def test_checking_ends_with_its_block_and_stays_in_its_thread() -> None:
    step, bad = Affine(2), torch.full((1, 2), torch.nan)
    with pytest.raises(flowpost.NonFiniteError), flowpost.checking():
        step(bad, torch.zeros(4))
    step(bad, torch.zeros(4))
    outcomes: list[Tensor] = []
    with flowpost.checking():
        thread = threading.Thread(target=lambda: outcomes.append(step(bad, torch.zeros(4))[0]))
        thread.start()
        thread.join()
        with flowpost.checking():
            step(torch.zeros(2), torch.zeros(4))
        with pytest.raises(flowpost.NonFiniteError):
            step(bad, torch.zeros(4))
    assert outcomes[0].isnan().all()


def test_features_and_encoders_are_checked() -> None:
    h = torch.zeros(6, 3)
    h[4, 1] = torch.nan
    with flowpost.checking():
        with pytest.raises(flowpost.NonFiniteError, match=r"^h: 1 of 6 rows are not finite \(first: row 4, feature 1"):
            posterior()(h)
        with pytest.raises(flowpost.NonFiniteError, match=r"; the encoder output is not finite, its input was finite$"):
            flowpost.wrap(nn.Threshold(1.0, math.nan), 2, features=3, flow="diagonal")(torch.zeros(6, 3))


# ----------------------------------------------------------------------------------------------------------- vae


def model(elements: int = 5) -> VAE:
    return VAE(nn.Linear(5, 3), flowpost.diagonal(3, 2), nn.Linear(2, elements), Bernoulli())


def test_the_decoder_s_width() -> None:
    message = "decoder: expected 1 x 5 outputs per example for Bernoulli, got 6"
    raises(ValueError, message, lambda: model(6)(torch.zeros(4, 5)))


def test_a_decoder_whose_numbers_stand_behind_the_axes_of_x() -> None:
    """Logits (N, tokens, levels), as a transformer gives them, were read as (N, levels, tokens): 3 nats off."""

    def model(*shape: int, numbers: int = 7) -> VAE:
        decoder = nn.Sequential(nn.Linear(2, math.prod(shape)), nn.Unflatten(1, shape))
        return VAE(nn.Flatten(), flowpost.diagonal(6, 2), decoder, Categorical(numbers))

    x = torch.zeros(4, 3, 2)
    message = "decoder: expected the likelihood's 7 numbers in front of the axes of x, (N, 7, 3, 2), got shape "
    message += "(4, 3, 2, 7), with them behind; give outputs.movedim(-1, 1)"
    raises(ValueError, message, lambda: model(3, 2, 7)(x))
    raises(ValueError, message, lambda: model(3, 2, 7).reconstruct(x))
    raises(ValueError, message, lambda: model(3, 2, 7).sample(4, (3, 2)))
    message = message.replace("(4, 3, 2, 7)", "(4, 3, 7, 2)").replace("behind", "behind 1 of them").replace("-1", "2")
    raises(ValueError, message, lambda: model(3, 7, 2)(x))  # as a PixelCNN gives those of each channel
    for shape in ((7, 3, 2), (21, 2), (42,)):
        model(*shape)(x)
    model(1, 7, 6)(torch.zeros(4, 1, 6))  # of one channel the order is the same
    model(6, 2, numbers=2).reconstruct(x)  # two maps (3, 2), one after the other


PARTS = {
    "encoder": (
        nn.Linear(5, 3).forward,
        "method; pass the Linear itself, or a module of your own whose forward calls forward",
    ),
    "posterior": (
        flowpost.diagonal,
        "function; write a torch.nn.Module whose forward calls it, so that its parameters are found",
    ),
    "decoder": (
        lambda z: z,
        "function; write a torch.nn.Module whose forward calls it, so that its parameters are found",
    ),
    "likelihood": (Bernoulli, "ABCMeta; write Bernoulli(...), an instance"),
}


@pytest.mark.parametrize("name", PARTS)
def test_a_vae_s_parts_are_modules(name: str) -> None:
    """The parameters of a function would not be among the model's, and never trained."""
    parts: dict[str, object] = {
        "encoder": nn.Linear(5, 3), "posterior": flowpost.diagonal(3, 2), "decoder": nn.Linear(2, 5),
        "likelihood": Bernoulli(),
    }  # fmt: skip
    wrong, message = PARTS[name]
    raises(TypeError, f"{name}: expected a torch.nn.Module, got {message}", lambda: VAE(**{**parts, name: wrong}))  # pyright: ignore


def test_a_vae_s_likelihood() -> None:
    for wrong in ("bernoulli", nn.BCEWithLogitsLoss()):
        message = (
            f"likelihood: expected a Likelihood, such as Bernoulli(), got {type(wrong).__name__}, which has no log_prob"
        )
        parts = nn.Linear(5, 3), flowpost.diagonal(3, 2), nn.Linear(2, 5), wrong
        raises(TypeError, message, lambda parts=parts: VAE(*parts))  # pyright: ignore


def test_what_is_no_tensor_is_not_evaluated() -> None:
    data = torch.utils.data.TensorDataset(torch.zeros(4, 5))
    message = "x: expected a tensor of all examples, (B, *event), got TensorDataset"
    for figure in (log_marginal, importance_estimate, inference_gaps):
        raises(TypeError, message, lambda figure=figure: figure(model(), data))  # pyright: ignore
    message = "q: expected a FlowDistribution, as vae.encode(x) gives it, got VAE"
    raises(TypeError, message, lambda: refine(model(), torch.zeros(4, 5)))  # pyright: ignore
    message = "kl: expected shape (B, G), a column for each group, as out.kl_groups() gives it, got None"
    raises(ValueError, message, lambda: free_bits(None, 0.1))  # pyright: ignore


def test_a_vae_s_x() -> None:
    no_rows = "x: expected shape (B, *event), got (); write x.unsqueeze(0) for one x"
    raises(ValueError, no_rows, lambda: model()(torch.zeros(())))
    raises(TypeError, "x: expected a real tensor, got list", lambda: model()([[0.0] * 5]))  # pyright: ignore
    x = torch.zeros(4, 5, dtype=torch.complex64)
    raises(TypeError, "x: expected a real tensor, got torch.complex64", lambda: model()(x))


class _Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, :2], x[:, 2:4]


def test_a_pair_for_a_vae_is_wrapped() -> None:
    vae = VAE(_Pair(), flowpost.diagonal(4, 2), nn.Linear(2, 5), Bernoulli())
    message = (
        "encoder: expected a tensor of features, got a tuple of a tensor of shape (4, 2), a tensor of shape (4, 2); "
        "write VAE(flowpost.wrap(encoder, dim=2, example=x), decoder, likelihood)"
    )
    raises(TypeError, message, lambda: vae(torch.zeros(4, 5)))


@pytest.mark.parametrize("around", [nn.DataParallel, AveragedModel, lambda part: torch.compile(part, backend="eager")])
def test_a_vae_s_posterior_within_another_module(around: Callable[[nn.Module], nn.Module]) -> None:
    """It was told of a likelihood that was missing, which was given, or at the first x of an attribute."""
    wrapped = around(flowpost.wrap(nn.Linear(5, 3), 2, features=3, flow="diagonal"))
    message = (
        f"encoder: expected what flowpost.wrap made, got {type(wrapped).__name__} around it, of which a VAE cannot "
    )
    message += "take encoder and posterior; give the wrapped encoder itself, and then the whole VAE to "
    with pytest.raises(TypeError, match=re.escape(message)):
        VAE(wrapped, nn.Linear(2, 5), Bernoulli())  # pyright: ignore


def test_a_vae_s_posterior_has_an_at() -> None:
    message = (
        "posterior: expected a FlowPosterior, such as flowpost.iaf(features, dim), got DataParallel, which has no "
    )
    message += "at(h); one within another module is put in as it is, and the whole VAE into such a module"
    hidden = nn.DataParallel(flowpost.diagonal(3, 2))
    raises(TypeError, message, lambda: VAE(nn.Linear(5, 3), hidden, nn.Linear(2, 5), Bernoulli()))  # pyright: ignore


def test_features_of_several_tokens() -> None:
    """As many tokens as examples: sizes that agree by chance, where each x met the features of all others."""
    vae = VAE(nn.Unflatten(1, (4, 3)), flowpost.diagonal(3, 2), nn.Linear(2, 12), Bernoulli())
    message = (
        "encoder: expected features (4, features), one row for each x, got shape (4, 4, 3); "
        "sum or average over tokens or pixels in the encoder, or, for latents with axes of their own, write "
        "the loss with the posterior itself: log q and log p(z) are then summed over these axes"
    )
    raises(ValueError, message, lambda: vae(torch.zeros(4, 12)))
    vae = VAE(nn.Flatten(0), flowpost.diagonal(12, 2), nn.Linear(2, 12), Bernoulli())
    raises(
        ValueError,
        message.replace("4, features", "1, features").replace("4, 4, 3", "12,"),
        lambda: vae(torch.zeros(1, 12)),
    )


def test_a_vae_needs_a_posterior_that_reads_features() -> None:
    vae = VAE(nn.Linear(5, 3), FlowPosterior(3, Reverse(2)), nn.Linear(2, 5), Bernoulli())
    message = "posterior: expected one that reads features, got one whose flow takes no context"
    raises(ValueError, message, lambda: vae(torch.zeros(4, 5)))


def test_log_marginal_s_counts() -> None:
    x = torch.zeros(4, 5)
    raises(ValueError, "samples: expected an int >= 1, got 0", lambda: log_marginal(model(), x, 0))
    raises(ValueError, "pairs: expected an int >= 1, got 0", lambda: log_marginal(model(), x, pairs=0))


def test_too_few_examples_for_a_figure_of_all_of_them() -> None:
    x = torch.zeros(1, 5)
    raises(ValueError, "len(x): expected an int >= 1, got 0", lambda: decompose_elbo(model(), x[:0]))
    raises(ValueError, "len(x): expected an int >= 2, got 1", lambda: active_units(model(), x))


def test_numpy_s_ints_are_ints() -> None:
    vae, x = model(), torch.zeros(4, 5)
    three: Any = np.int64(3)
    fifty: Any = np.int32(50)
    assert vae(x, (three,)).log_q.shape == (3, 4)
    assert vae.encode(x).rsample((three, three)).shape == (3, 3, 4, 2)
    assert vae.posterior(H, (three,), torch.zeros(3, 6, 2)).z.shape == (3, 6, 2)
    assert log_marginal(vae, x, three, pairs=three).shape == (4,)
    assert importance_estimate(vae, x, fifty, pairs=fifty).k_hat.shape == (4,)
    assert active_units(vae, x, three, pairs=three).variance.shape == (2,)
    assert decompose_elbo(vae, x, three, pairs=three).marginal_kl.shape == (4,)
    gaps = inference_gaps(vae, x, steps=three, step_samples=three, samples=fifty, examples=three, pairs=three)
    assert gaps.elbo.shape == (4,)
    ranks = sbc_ranks(
        lambda n: (torch.randn(n, 2), torch.zeros(n, 5)), lambda x, s: vae.encode(x).sample((s,)), three, three
    )
    assert rank_ecdf(ranks, three, rounds=fifty, seed=three).inside.shape == (2,)


def test_an_empty_batch_through_the_vae() -> None:
    x = torch.zeros(0, 5)
    out = model()(x, (3,))
    assert out.log_likelihood.shape == out.log_prior.shape == out.log_q.shape == (3, 0)
    assert log_marginal(model(), x, 3).shape == (0,)
