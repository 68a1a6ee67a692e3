"""Modes that are mirror images of those that q holds: found, said, and given components."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Beta, LogNormal, Normal, constraints

from flowpost.fit import FittedPosterior, fit
from flowpost.variational.families import assemble, build_flow
from flowpost.variational.gaussian import Gaussian
from flowpost.variational.mirrored import find_mirrored, with_images
from flowpost.variational.mirrors import Mirror, mirrors
from flowpost.variational.mixture import Mixture
from flowpost.variational.parameters import Parameters, Spec, ordered
from flowpost.variational.starts import Start
from flowpost.variational.target import Target
from flowpost.variational.weighing import Weighed, weigh

MEANS = torch.tensor([-3.0, 0.0, 3.0], dtype=torch.float64)
LABELLED: Spec = {"mu": (3,), "tau": (3, constraints.positive)}
ORDERS = torch.tensor([[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]])


def labelled(p: dict[str, Tensor]) -> Tensor:
    """Three components whose labels mean nothing: each mu with a tau of its own, ``exp(mu / 3)`` in the middle."""
    mu, tau = p["mu"][:, ORDERS], p["tau"][:, ORDERS]
    terms = Normal(MEANS, 0.3).log_prob(mu) + LogNormal(MEANS / 3, 0.2).log_prob(tau)
    return terms.sum(-1).logsumexp(-1) - math.log(6)


def mode(order: list[int], scale: float = 1.0) -> Gaussian:
    """One of the six, in free coordinates."""
    means, sds = MEANS[order], torch.tensor([0.3, 0.3, 0.3, 0.2, 0.2, 0.2], dtype=torch.float64)
    return Gaussian(torch.cat([means, means / 3]), torch.diag(scale * sds))


def found_in(log_joint: Callable[[Any], Tensor], spec: Spec, *gaussians: Gaussian) -> tuple[Target, Any]:
    target = Target(log_joint, Parameters(spec), device="cpu", dtype=torch.float64)
    q = assemble(build_flow("full_covariance", target.parameters.dim, {}), gaussians, [0.0] * len(gaussians))
    return target, find_mirrored(q, target, weigh(q, target, 1000, torch.Generator().manual_seed(0)))


def given(log_joint: Callable[[Any], Tensor], spec: Spec, *gaussians: Gaussian) -> FittedPosterior:
    target = Target(log_joint, Parameters(spec), device="cpu", dtype=torch.float64)
    q = assemble(build_flow("full_covariance", target.parameters.dim, {}), gaussians, [0.0] * len(gaussians))
    return FittedPosterior(q, target, evaluations=0, seconds=0.0)


# ----------------------------------------------------------------------------------------------------------- mirrors


def test_what_is_tried_of_several_shapes() -> None:
    """Loadings and scores of factors have an axis of one length, at different places; a long axis is left alone."""
    spec: Spec = {"loadings": (5, 2), "scores": (20, 2), "sigma": (5, constraints.positive)}
    said = [str(each) for each in mirrors(Parameters(spec))]
    assert len(said) == len(set(said))
    for due in (
        "loadings[:,0] and loadings[:,1], scores[:,0] and scores[:,1] exchanged",
        "loadings[3] and loadings[4], sigma[3] and sigma[4] exchanged",
        "sigma[3] and sigma[4] exchanged",
        "the sign of loadings[:,1] and scores[:,1] turned",
        "the sign of loadings[4] turned",
        "the sign of loadings and scores turned",
        "the sign of scores turned",
    ):
        assert due in said, due
    assert not any("sign" in each and "sigma" in each for each in said)
    assert not any("[8]" in each for each in said)
    assert list(mirrors(Parameters({"tau": constraints.positive}))) == []


def test_what_is_tried_of_parameters_of_one_kind() -> None:
    """Those whose names differ alike go together; a weight of the first of two components is turned over with them."""
    half, room = constraints.unit_interval, constraints.interval(0, 2)
    spec: Spec = {
        "mu_a": (),
        "mu_b": (),
        "sd_a": constraints.positive,
        "sd_b": constraints.positive,
        "w": half,
        "v": room,
    }
    said = [str(each) for each in mirrors(Parameters(spec))]
    assert len(said) == len(set(said))
    for due in (
        "mu_a and mu_b, sd_a and sd_b exchanged",
        "mu_a and mu_b, sd_a and sd_b exchanged and w turned over in the interval",
        "mu_a and mu_b, sd_a and sd_b exchanged and w and v turned over in the interval",
        "sd_a and sd_b exchanged and v turned over in the interval",
        "mu_a and mu_b exchanged",
        "v turned over in the interval",
    ):
        assert due in said, due
    assert not any("mu_a and sd_a" in each or "w and v exchanged" in each for each in said)
    said = [str(each) for each in mirrors(Parameters({"mu": (2,), "tau": 2, "p": half, "q": half}))]
    assert "mu[0] and mu[1], tau[0] and tau[1], p and q exchanged" in said
    assert "mu[0] and mu[1] exchanged and p turned over in the interval" in said
    assert not any("p and q exchanged and" in each for each in said)
    many = {f"b{k}{k}": () for k in range(9)}
    assert not any("exchanged" in str(each) for each in mirrors(Parameters(many)))


def test_many_parameters_take_no_more_than_some_hundreds_of_ways() -> None:
    """Each costs ten values of the log joint: an exchange goes with few others turned over."""
    half = constraints.unit_interval
    kinds: Spec = {f"a{k}": () for k in range(8)} | {f"b{k}": constraints.positive for k in range(8)}
    for spec in (kinds | {f"w{k}": half for k in range(100)}, {f"w{k}": ((2, 2), half) for k in range(8)}):
        said = [str(each) for each in mirrors(Parameters(spec))]
        assert len(said) == len(set(said)) < 1200
        assert "w7 turned over in the interval" in said
    few = [str(each) for each in mirrors(Parameters(kinds | {"w": half}))]
    assert "a0 and a1, b0 and b1 exchanged and w turned over in the interval" in few


def test_a_symmetric_density_that_q_has_costs_little() -> None:
    """Of eight shares that the data do not see, every exchange is looked through, and none of them on all draws."""
    rows = []

    def log_joint(p: dict[str, Tensor]) -> Tensor:
        rows.append(len(p["w0"]))
        return torch.stack([Beta(2.0, 2.0).log_prob(w) for w in p.values()]).sum(0)

    spec: Spec = {f"w{k}": constraints.unit_interval for k in range(8)}
    one = Gaussian(torch.zeros(8).double(), 0.9 * torch.eye(8).double())
    found_in(log_joint, spec, one)
    assert sum(rows) < 60_000


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
def test_a_mirror_turns_its_axes_alone_and_twice_is_back(batch: tuple[int, ...]) -> None:
    values = {"a": torch.randn(*batch, 5, 2), "b": torch.randn(*batch, 2), "c": torch.randn(batch)}
    swap = Mirror((("a", 1), ("b", 0)), (0, 1))
    turned = swap.turned(values, len(batch))
    assert torch.equal(turned["a"], values["a"].flip(-1))
    assert torch.equal(turned["b"], values["b"].flip(-1))
    assert torch.equal(turned["c"], values["c"])
    sign = Mirror((("a", 0),), (3,)).turned(values, len(batch))["a"]
    assert torch.equal(sign[..., 3, :], -values["a"][..., 3, :])
    assert torch.equal(sign[..., :3, :], values["a"][..., :3, :])
    assert torch.equal(Mirror((("c", 0),), ()).turned(values, len(batch))["c"], -values["c"])
    for mirror in mirrors(Parameters({"a": (5, 2), "b": (2,), "c": ()})):
        twice = mirror.turned(mirror.turned(values, len(batch)), len(batch))
        assert all(torch.equal(twice[name], values[name]) for name in values)


# ------------------------------------------------------------------------------------------------------ what is missed


@pytest.mark.parametrize(("held", "share"), [([0], 1.0), ([0, 1], 1.0), ([0, 1, 2, 3], 0.5), ([0, 1, 2, 3, 4], 0.2)])
def test_labels_that_q_does_not_hold_are_found(held: list[int], share: float) -> None:
    """By an exchange of neighbours of both parameters at once, and of no one of them alone."""
    orders = [ORDERS[k].tolist() for k in held]
    target, found = found_in(labelled, LABELLED, *map(mode, orders))
    assert re.fullmatch(r"mu\[(.)\] and mu\[(.)\], tau\[\1\] and tau\[\2\] exchanged", str(found.mirror))
    assert found.share == pytest.approx(share, abs=0.01)
    z = target.parameters.constrain(found.place)[0]
    assert isinstance(z, dict)
    assert z["mu"].argsort().argsort().tolist() not in orders
    assert labelled({name: value.unsqueeze(0) for name, value in z.items()}) > -3


@pytest.mark.parametrize("scale", [1.0, 0.8, 1.3])
def test_where_q_holds_all_images_nothing_is_missed(scale: float) -> None:
    assert found_in(labelled, LABELLED, *(mode(order, scale) for order in ORDERS.tolist()))[1] is None


def weighted(p: dict[str, Tensor]) -> Tensor:
    """Two components, each by parameters of its own; w is the weight of the first. The image of a mode is 1 - w."""
    first = torch.stack([p["mu_1"], p["sd_1"].log(), torch.logit(p["w"])], -1)
    other = torch.stack([p["mu_2"], p["sd_2"].log(), -torch.logit(p["w"])], -1)
    low, high = torch.tensor([-2.0, -1.0, 0.8]).double(), torch.tensor([2.0, 0.5, -0.8]).double()
    modes = [Normal(a, 0.2).log_prob(first) + Normal(b, 0.2).log_prob(other) for a, b in ((low, high), (high, low))]
    jacobian = p["sd_1"].log() + p["sd_2"].log() + p["w"].log() + (1 - p["w"]).log()
    return torch.logaddexp(*(each.sum(-1) for each in modes)) - jacobian


def test_parameters_with_names_of_their_own_are_exchanged_and_their_weight_turned_over() -> None:
    positive = constraints.positive
    spec: Spec = {"mu_1": (), "mu_2": (), "sd_1": positive, "sd_2": positive, "w": constraints.unit_interval}
    loc, tril = torch.tensor([-2.0, 2.0, -1.0, 0.5, 0.8]).double(), 0.2 * torch.eye(5).double()
    tril[4, 4] = 0.2 / math.sqrt(2)
    fitted = given(weighted, spec, Gaussian(loc, tril))
    said = (
        "with mu_1 and mu_2, sd_1 and sd_2 exchanged and w turned over in the interval the log joint is about the same"
    )
    assert said in fitted.verdict
    assert "or make a parameter of like components `ordered`" in fitted.verdict
    image = torch.tensor([2.0, -2.0, 0.5, -1.0, -0.8]).double()
    both = given(weighted, spec, Gaussian(loc, tril), Gaussian(image, tril))
    assert both.is_trusted, both.verdict
    target, flow = both.target, build_flow("full_covariance", 5, {})
    start = Start([Gaussian(loc, tril)], [0.0], far=False)
    found = with_images(start, 2, flow, target, torch.Generator().manual_seed(0), diagonal=False)
    torch.testing.assert_close(found.gaussians[1].loc, image)
    torch.testing.assert_close(found.gaussians[1].scale_tril, tril)


def test_a_share_that_data_see_from_both_ends() -> None:
    """By ``w (1 - w)`` alone; a q of both ends misses nothing, and neither does one of a single wide mode."""

    def log_joint(p: dict[str, Tensor]) -> Tensor:
        return Normal(1.0, 0.05).log_prob(p["w"] * (10 - p["w"]) / 10)

    spec: Spec = {"w": constraints.interval(0, 10)}
    end, tril = torch.tensor([-2.06]).double(), torch.tensor([[0.06]]).double()
    assert "or allow one half of the interval, which leaves one" in given(log_joint, spec, Gaussian(end, tril)).verdict
    assert found_in(log_joint, spec, Gaussian(end, tril), Gaussian(-end, tril))[1] is None
    flat = lambda p: Beta(3.0, 3.0).log_prob(p["w"] / 10)  # noqa: E731
    assert found_in(flat, spec, Gaussian(torch.zeros(1).double(), 0.9 * torch.eye(1).double()))[1] is None


def test_parameters_that_differ_are_not_exchanged() -> None:
    """The same six modes, of which two are two nats higher: their images are no modes of the same density."""
    one = lambda p: labelled({**p, "mu": p["mu"]}) + 4 * (p["mu"][:, 0] < -1) + 2 * (p["mu"][:, 0] > 1)  # noqa: E731
    assert found_in(one, LABELLED, mode([0, 1, 2]), mode([0, 2, 1]))[1] is None


def test_an_ordered_parameter_has_no_images() -> None:
    def log_joint(p: dict[str, Tensor]) -> Tensor:
        return Normal(MEANS, 0.3).log_prob(p["mu"]).sum(-1)

    loc = torch.tensor([-3.0, math.log(3), math.log(3)], dtype=torch.float64)
    gaussian = Gaussian(loc, torch.diag(torch.tensor([0.3, 0.14, 0.14], dtype=torch.float64)))
    assert found_in(log_joint, {"mu": (3, ordered)}, gaussian)[1] is None


def test_a_sign_that_data_do_not_see() -> None:
    """Of a product: both signs turned at once leave it as it is."""

    def product(p: dict[str, Tensor]) -> Tensor:
        return Normal(6.0, 0.2).log_prob(p["a"] * p["b"]) + Normal(0.0, 3.0).log_prob(p["a"] + p["b"])

    def root(z: Tensor) -> Tensor:
        return Normal(9.0, 0.2).log_prob(z[:, 1].square()) + Normal(0.0, 1.0).log_prob(z[:, 0])

    fitted = given(product, {"a": (), "b": ()}, Gaussian(torch.full((2,), 2.4).double(), 0.1 * torch.eye(2).double()))
    assert "with the sign of a and b turned the log joint is about the same and q is not" in fitted.verdict
    assert "at the images of 100% of its draws, as near a = -2." in fitted.verdict
    assert fitted.verdict.count("constrain its sign, which leaves one") == 1
    loc, tril = torch.tensor([0.0, 3.0]).double(), torch.diag(torch.tensor([1.0, 0.033]).double())
    assert "with the sign of theta[1] turned" in given(root, 2, Gaussian(loc, tril)).verdict
    both = given(root, 2, Gaussian(loc, tril), Gaussian(-loc, tril))
    assert both.is_trusted, both.verdict


@pytest.mark.parametrize("scale", [0.3, 1.0, 2.0])
def test_a_rough_q_of_a_symmetric_density_misses_no_mode(scale: float) -> None:
    """Of ten normals, off their middle and too narrow, or too wide: log q at an image is another, and q is there."""
    gaussian = Gaussian(torch.full((10,), 0.3).double(), scale * torch.eye(10).double())
    assert found_in(lambda z: Normal(0.0, 1.0).log_prob(z).sum(-1), 10, gaussian)[1] is None


def test_weights_that_are_not_finite_and_faults_of_the_log_joint_end_nothing() -> None:
    target, _ = found_in(labelled, LABELLED, mode([0, 1, 2]))
    q = assemble(build_flow("full_covariance", 6, {}), [mode([0, 1, 2])], [0.0])
    z = torch.zeros(50, 6, dtype=torch.float64)
    lost = Weighed(z, torch.full((50,), -math.inf).double(), torch.full((50,), 0.02).double())
    assert find_mirrored(q, target, lost) is None

    def ascending(p: dict[str, Tensor]) -> Tensor:
        if len(p["mu"]) > 500 and bool((p["mu"][:, 0] > p["mu"][:, 2]).all()):
            raise LookupError
        return labelled(p)

    assert found_in(ascending, LABELLED, mode([0, 1, 2]))[1].share == pytest.approx(1, abs=0.01)


# ------------------------------------------------------------------------------------------------------------- start


@pytest.mark.parametrize(("most", "diagonal"), [(6, False), (4, True), (1, False)])
def test_a_start_gets_the_images_of_its_gaussians(most: int, diagonal: bool) -> None:  # noqa: FBT001
    """They are the other modes' own Gaussians, and no gradient is taken for them."""
    target = Target(labelled, Parameters(LABELLED), device="cpu", dtype=torch.float64)
    start, flow = Start([mode([0, 1, 2])], [-1.8], far=False), build_flow("full_covariance", 6, {})
    found = with_images(start, most, flow, target, torch.Generator().manual_seed(0), diagonal=diagonal)
    assert len(found.gaussians) == len(found.elbos) == most
    assert target.evaluations == 0
    orders = {tuple(each.loc[:3].argsort().argsort().tolist()) for each in found.gaussians}
    assert len(orders) == most
    for each in found.gaussians:
        due = mode(each.loc[:3].argsort().argsort().tolist())
        torch.testing.assert_close(each.loc, due.loc)
        torch.testing.assert_close(each.scale_tril, due.scale_tril)


def test_the_image_of_a_tilted_gaussian_is_exact() -> None:
    tril = torch.tensor([[0.3, 0], [0.2, 0.1]], dtype=torch.float64)
    one = Gaussian(torch.tensor([-3.0, 3.0]).double(), tril)

    def log_joint(z: Tensor) -> Tensor:
        normal = torch.distributions.MultivariateNormal(one.loc, scale_tril=tril)
        return torch.logaddexp(normal.log_prob(z), normal.log_prob(z.flip(-1)))

    target, flow = Target(log_joint, Parameters(2), device="cpu", dtype=torch.float64), build_flow("realnvp", 2, {})
    found = with_images(Start([one], [0.0], far=False), 2, flow, target, torch.Generator(), diagonal=False)
    other = found.gaussians[1]
    torch.testing.assert_close(other.loc, one.loc.flip(-1))
    torch.testing.assert_close(other.scale_tril @ other.scale_tril.mT, (tril @ tril.mT).flip(-1).flip(-2))
    assert (other.scale_tril.diagonal() > 0).all()


def test_a_fit_holds_the_images_that_its_search_has_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """All guesses are near one mode; the five others are its images, and said where q may not hold them."""
    near: Any = mode([0, 1, 2])
    monkeypatch.setattr("flowpost.variational.starts._guesses", lambda origin, *_, **__: near.at(None))
    fitted = fit(labelled, LABELLED, "full_covariance", budget=40_000, modes=6)
    assert isinstance(fitted.posterior, Mixture)
    assert fitted.elbo()[0] == pytest.approx(0, abs=0.01)
    assert fitted.is_trusted, fitted.verdict
    two: dict[str, Any] = {"modes": 2}
    for options, share in ((two, 100), ({}, 50)):
        fitted = fit(labelled, LABELLED, "full_covariance", budget=40_000, **options)
        said = r"next to nothing at the images of (\d+)% of its draws.*of modes=\d or more, or make .* `ordered`"
        assert not fitted.is_trusted
        found = re.search(said, fitted.verdict)
        assert found, fitted.verdict
        assert int(found[1]) == pytest.approx(share, abs=5)
