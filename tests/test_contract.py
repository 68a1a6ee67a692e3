"""The shipped contract suite over every entry of the registry, and over a broken step that it must catch.

`test_contract` is tried by every run of the tests, at one size. What is marked `full` adds cases of Hypothesis, the
judge without rounding and the plain operations; `long` adds sizes and the entries whose like is in `CORE`, `compile`
takes seconds an entry.
"""

import dataclasses
import os
from collections.abc import Sequence

import exact
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from registry import BY_NAME, CORE, ENTRIES, Entry

import flowpost
from flowpost import Bijector, Householder, Inverse, Learned, Permute, Planar, Reverse
from flowpost.testing import (
    COMPILED,
    OFTEN,
    ONCE,
    PROPERTIES,
    BijectorContract,
    ContractError,
    check_bijector,
    derivatives,
    push,
)
from flowpost.testing.cases import PUSHES, Case, Make, condition, jacobian

DEEP = "FLOWPOST_DEEP" in os.environ
WRAPPED = ("learned_", "inverse_", "conditioned_")

more = [e for e in ENTRIES if DEEP or (e.name in CORE and not e.name.startswith((*WRAPPED, "deep_sigmoid")))]
more = pytest.mark.parametrize("entry", more, ids=lambda entry: entry.name)
DTYPES = (torch.float64, torch.float32)


def _maker(entry: Entry) -> Make:
    def make(*, dim: int, context_size: int, dtype: torch.dtype, seed: int, push: float) -> Bijector:
        del context_size
        return flowpost.testing.push(entry.make(dim, seed).to(dtype), push, seed)

    return make


def _skips(entry: Entry) -> set[str]:
    """The properties that the step declares not to have."""
    return (set() if entry.identity else {"identity"}) | ({"context_everywhere"} if entry.local else set())


def _check(entry: Entry, name: str, dims: Sequence[int], examples: int) -> None:
    if name in _skips(entry):
        pytest.skip("the step declares that it has no such property")
    # In float32, behind a triangular solve at contexts of 1e4, what a mask hides of a gradient is out of range.
    narrow = entry.name == "nested" and name == "extremes"
    dtypes = DTYPES[:1] if narrow else DTYPES
    others = [other for other in PROPERTIES if other != name]
    check_bijector(_maker(entry), dims=dims, dtypes=dtypes, examples=examples, skip=others)


FIRST = {"log_det", "round_trip", "orientation", "state"}
"""What the quick run asks of every entry, of those too whose family has another one there."""


def _level(entry: Entry, name: str) -> list[pytest.MarkDecorator]:
    """When an entry's property is tried: in the quick run, but for what has its like there."""
    if entry.name in CORE:
        return []
    return [] if name in FIRST and not entry.name.startswith(WRAPPED) else [pytest.mark.long]


def _quick() -> list:
    pairs = [(entry, name) for entry in ENTRIES for name in [*OFTEN, *ONCE]]
    return [pytest.param(e, name, marks=_level(e, name), id=f"{e.name}-{name}") for e, name in pairs]


@pytest.mark.parametrize(("entry", "name"), _quick())
def test_contract(entry: Entry, name: str) -> None:
    """At one size, every push and context scale; the mass where it is cheap."""
    _check(entry, name, dims=(1,) if name == "mass" else (3,), examples=3)


PLAIN = ("autoregressive_2_context", "autoregressive_order", "masked_affine_context", "maf")


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("name", [*OFTEN, *ONCE])
@pytest.mark.parametrize(
    "entry",
    [
        # `make test-plain` has the one with an order too.
        pytest.param(BY_NAME[name], marks=pytest.mark.long if name == "autoregressive_order" else pytest.mark.full)
        for name in PLAIN
    ],
    ids=PLAIN,
)
def test_contract_of_plain_operations(entry: Entry, name: str) -> None:
    """The operations that the passes by hand stand in for, and that transforms and compilers see."""
    _check(entry, name, dims=(1,) if name == "mass" else (3,), examples=3)


@pytest.mark.long
@pytest.mark.parametrize("name", OFTEN)
@more
def test_contract_on_more_examples(entry: Entry, name: str) -> None:
    _check(entry, name, dims=(1, 2, 4), examples=9 if DEEP else 4)


@pytest.mark.long
@pytest.mark.parametrize("name", ONCE)
@more
def test_contract_at_more_sizes(entry: Entry, name: str) -> None:
    _check(entry, name, dims=(1, 4) if DEEP else (1,), examples=1)


COMPILED_EARLIER = {("planar", "compiles"), ("planar", "batch_sizes"), ("iaf", "compiles")}
"""In the full run, which has the batch sizes of iaf's recipe in `test_shapes_compiled`."""


def _compiled() -> list:
    pairs = [(entry, name) for entry in ENTRIES if DEEP or entry.name in CORE for name in COMPILED]
    marks = [pytest.mark.full if (e.name, name) in COMPILED_EARLIER else pytest.mark.compile for e, name in pairs]
    return [
        pytest.param(*pair, marks=mark, id=f"{pair[0].name}-{pair[1]}") for pair, mark in zip(pairs, marks, strict=True)
    ]


@pytest.mark.parametrize(("entry", "name"), _compiled())
def test_contract_compiled(entry: Entry, name: str) -> None:
    _check(entry, name, dims=(3,), examples=1)


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, dtype) for name in ("log_det", "round_trip") for dtype in DTYPES),
        *(pytest.param("cancel", dtype, marks=pytest.mark.long) for dtype in DTYPES),
        ("undone", torch.float64),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
@more
@settings(max_examples=500 if DEEP else 5)
@given(
    dim=st.integers(1, 6),
    seed=st.integers(0, 2**20),
    amount=st.sampled_from(PUSHES),
    scale=st.sampled_from([0.1, 1.0, 3.0]),
)
def test_contract_anywhere(
    entry: Entry, name: str, dtype: torch.dtype, dim: int, seed: int, amount: float, scale: float
) -> None:
    """B1 to B4 where Hypothesis looks; the log-det with no allowance for what autodiff rounds."""
    PROPERTIES[name](Case(_maker(entry), dim, 0, dtype, seed, amount, scale, judge=exact.slogdet))


@pytest.mark.full
@pytest.mark.parametrize(
    ("names", "examples"),
    [({"log_det"}, 3), pytest.param({"round_trip", "cancel"}, 1, marks=pytest.mark.long)],
    ids=["value", "back"],
)
@more
def test_at_64_variables(entry: Entry, names: set[str], examples: int) -> None:
    """The log-det at every push and context scale, the way back near the start: no matrix of 64 random rows has one."""
    check_bijector(
        _maker(entry), dims=(64,), examples=examples, skip=[other for other in PROPERTIES if other not in names]
    )


@pytest.mark.long
@pytest.mark.parametrize("dim", [1, 2, 5])
def test_orientation_is_the_family_s_own(dim: int) -> None:
    """B2: every family keeps orientation, for every context; only a permutation or a reflection may turn it."""
    for entry in ENTRIES:
        parts = [type(part) for part in entry.make(dim, 0).modules()]
        if {Reverse, Permute, Householder} & set(parts) or entry.name == "lu_linear_order":
            continue
        for seed in range(8):
            step, z, context = Case(_maker(entry), dim, 0, seed=seed, push=1.0, context_scale=3.0).points(2)
            matrix = jacobian(step, z, context)
            assert (torch.linalg.det(matrix)[condition(matrix) < 1e8] > 0).all(), entry.name


@pytest.mark.parametrize("dim", [1, 3])
@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry.local], ids=lambda entry: entry.name)
def test_a_local_number_of_the_context_acts_somewhere(entry: Entry, dim: int) -> None:
    case = Case(_maker(entry), dim, 0, seed=11)
    points = torch.linspace(-2.95, 2.95, 121, dtype=torch.float64).view(-1, 1, 1) + 0.01 * case.z(5)
    step, context = case.step(), case.context(5)
    assert context is not None
    for direction in (step, step.inverse):
        derivatives.context_acts(case, "anywhere", direction, points, context)


class TestPlanar(BijectorContract):
    """As a third party runs it: a class, one test a property."""

    skip = tuple(COMPILED)
    dims = (3,)
    examples = 3

    def make(self, dim: int, context_size: int, dtype: torch.dtype, seed: int, push: float) -> Bijector:
        return flowpost.testing.push(Learned(Planar(dim)).to(dtype), push, seed)


def test_failure_names_the_property_and_the_case() -> None:
    class Wrong(flowpost.Affine):
        def _forward(self, z: torch.Tensor, context: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
            image, log_det = super()._forward(z, context)
            return image, 1.01 * log_det + 1e-3

    with pytest.raises(ContractError, match=r"^log_det: error: .* \(dim=1, float64, seed=0"):
        check_bijector(lambda dim, dtype, seed, push, context_size: Wrong(dim).to(dtype))


@pytest.mark.parametrize("name", ["_forward", "_inverse"])
def test_a_log_det_without_any_gradient_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its value is right, but nothing learns from it."""
    right = getattr(flowpost.Affine, name)
    monkeypatch.setattr(flowpost.Affine, name, lambda *args: (right(*args)[0], right(*args)[1].detach()))
    with pytest.raises(ContractError, match=r"^gradients: .*Jacobian mismatch for output 1"):
        check_bijector(lambda dim, dtype, **_: flowpost.Affine(dim).to(dtype), examples=1, skip=[*COMPILED])


@pytest.mark.parametrize("name", ["_forward", "_inverse"])
def test_another_answer_without_gradients_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a shorter way under no_grad may give it, which no Jacobian sees."""
    right = getattr(flowpost.Affine, name)
    off = lambda *args: (right(*args)[0], right(*args)[1] + (0 if torch.is_grad_enabled() else 1e-6))  # noqa: E731
    monkeypatch.setattr(flowpost.Affine, name, off)
    with pytest.raises(ContractError, match="^purity: purity: under no_grad another answer"):
        check_bijector(lambda dim, dtype, **_: flowpost.Affine(dim).to(dtype), examples=1, skip=[*COMPILED])


def test_an_extreme_that_fails_is_the_case_that_is_named() -> None:
    case = Case(lambda dim, dtype, **_: flowpost.Affine(dim, torch.exp).to(dtype), 1, 0)
    found = r"forward has values or gradients that are not finite \(.*push=0.0, context scale 10000.0\)"
    with pytest.raises(ContractError, match=found):
        PROPERTIES["extremes"](case)


def test_a_judge_decides_where_autodiff_is_over_the_bound() -> None:
    """At the foot of a steep planar step autodiff loses digits, and takes the log-det for wrong; a judge does not."""

    def make(*, dim: int, context_size: int, dtype: torch.dtype, seed: int, push: float) -> Bijector:
        step = Learned(Planar(dim)).to(dtype)
        step.load_state_dict({"context": torch.tensor([-100.0, 0.28, 0.0], dtype=dtype)}, strict=False)
        return step

    asked = []

    def judge(*arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
        asked.append(arguments)
        return exact.slogdet(*arguments)  # pyright: ignore[reportArgumentType]

    case = Case(make, 1, 0, seed=1)
    with pytest.raises(ContractError, match="error"):
        PROPERTIES["log_det"](case)
    PROPERTIES["log_det"](dataclasses.replace(case, judge=judge))
    assert asked
    off = dataclasses.replace(case, judge=lambda *arguments: (judge(*arguments)[0], judge(*arguments)[1] + 1e-9))
    with pytest.raises(ContractError, match="error"):
        PROPERTIES["log_det"](off)


def _twice(dim: int, context_size: int) -> Bijector:
    step = flowpost.Autoregressive(dim, context_size, (6,))
    return flowpost.Shared(step, Reverse(dim), step)


def test_a_step_that_comes_twice_is_held_to_no_more() -> None:
    """But for the number of passes. Torch's ``functional_call`` leaves in it what stood in for its weights."""
    make = _maker(Entry("twice", lambda dim: _twice(dim, 2)))
    skip = [*COMPILED, "identity", "passes"]
    check_bijector(make, context_size=2, dims=(2,), dtypes=(torch.float64,), examples=1, skip=skip)


class _Unusual(Bijector):
    """Right, with a network that has dropout, and a number in a saved buffer, as docs/own-step.md says."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, 2)
        self.network = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Dropout(0.5))
        self.last = torch.nn.Linear(8, dim)
        self.register_buffer("rate", torch.tensor(0.3))

    def _log_scale(self, context: torch.Tensor | None) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.get_buffer("rate") * self.last(self.network(context)).tanh()

    def _forward(self, z: torch.Tensor, context: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        log_scale = self._log_scale(context)
        return log_scale.exp() * z, log_scale.sum(-1)

    def _inverse(
        self, z: torch.Tensor, context: torch.Tensor | None, preimage: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        log_scale = self._log_scale(context)
        return (-log_scale).exp() * z, -log_scale.sum(-1)


def test_dropout_and_a_saved_number_raise_no_alarm() -> None:
    """A step in eval mode is deterministic, and a number in the state dict is rounded by a cast as a weight is."""
    make = _maker(Entry("unusual", lambda dim: _Unusual(dim).eval()))
    check_bijector(make, dims=(2,), examples=3, skip=[*COMPILED, "identity"])


def test_a_frozen_parameter_raises_no_alarm() -> None:
    make = _maker(Entry("frozen", lambda dim: flowpost.Conditioned(Planar(dim), 2).requires_grad_(False)))  # noqa: FBT003
    check_bijector(make, dims=(2,), examples=3, skip=[*COMPILED, "identity"])


def test_an_inverse_within_may_run_its_network_as_often_as_an_inverse() -> None:
    step = Entry("within", lambda dim: flowpost.Shared(Reverse(dim), Inverse(flowpost.Autoregressive(dim, 2, (6,)))))
    assert 1 <= PROPERTIES["passes"](Case(_maker(step), 3, 0)) <= 3


def test_a_step_of_other_than_vectors_is_refused() -> None:
    class Image(flowpost.Affine):
        event_ndim = 3

    for made, found in ((Image(2), "event_ndim=3"), (torch.nn.Linear(2, 2), "Linear")):
        with pytest.raises(ContractError, match=f"make: expected a Bijector of vectors, got {found} "):
            check_bijector(lambda made=made, **_: made, dims=(2,))


def test_report_and_unknown_names() -> None:
    worst = check_bijector(
        lambda dim, dtype, seed, push, context_size: flowpost.Affine(dim), dims=(2,), examples=2, skip=[*COMPILED]
    )
    assert set(worst) == set(PROPERTIES) - set(COMPILED)
    assert 0 < worst["log_det"] < 1e-3
    assert 1 < worst["meta"] < 100
    with pytest.raises(ValueError, match="skip: expected names among .*, got speed"):
        check_bijector(Planar, skip=["speed"])
    for name, nothing in {"dims": (), "dtypes": (), "examples": 0}.items():
        with pytest.raises(ValueError, match=f"^{name}: expected at least one, got none"):
            check_bijector(Planar, **{name: nothing})  # pyright: ignore[reportArgumentType]


def test_push_gives_each_tensor_a_scale_of_its_own() -> None:
    step = torch.nn.Sequential(*[torch.nn.Linear(50, 50, bias=False) for _ in range(30)])
    for layer in step:
        torch.nn.init.zeros_(layer.get_parameter("weight"))
    push(step, 2.0, seed=0)  # pyright: ignore[reportArgumentType]
    scales = torch.stack([p.std() * 50**0.5 / 2 for p in step.parameters()])
    nearest = (scales.unsqueeze(-1) / torch.tensor([0.03, 1.0, 3.0]) - 1).abs()
    assert nearest.amin(-1).max() < 0.1
    assert set(nearest.argmin(-1).tolist()) == {0, 1, 2}
