"""Faults that flowpost has had outside its bijectors, put back one at a time, and the tests that find each.

The contract sees a bijector. Of posteriors, models and reports, single tests hold what was mended; `python -m
tests.mutants` shows that they do. Two kinds cannot be planted: a wrong citation, which no test reads, and
``next(module.parameters(), h)``, which the compiler of torch 2.5 alone does not follow.
"""

from __future__ import annotations

import contextlib
import copy
import math
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import pytest
import test_errors
import test_evaluation
import test_golden
import test_householder
import test_likelihoods
import test_meta
import test_objectives
import test_prior
import test_traced
import test_triangular
import test_vae
import test_wrap_reading
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Distribution

from flowpost import (
    Householder,
    decomposition,
    density,
    evaluation,
    generative,
    likelihoods,
    objectives,
    outputs,
    pareto,
    posterior,
    vae,
)
from flowpost.bijectors import base
from flowpost.conditions import call
from flowpost.distribution import FlowDistribution
from flowpost.masked import engine
from flowpost.numerics import arguments, states, watchers
from flowpost.recipes import gaussian
from flowpost.testing.cases import reseed
from flowpost.vae import VAE

Test = Callable[[], object]


@dataclass(frozen=True)
class Fault:
    """A fault: where it was seen, how it is put back, and the tests each of which must find it."""

    name: str
    seen_in: str
    patches: tuple[tuple[object, str, object], ...]
    tests: tuple[Test, ...]


def said(test: Test, fault: Fault | None = None) -> str:
    """What a test says with a fault, or with none, where it fails; empty where it passes."""
    quiet = contextlib.redirect_stdout(None)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(), quiet:
        warnings.simplefilter("ignore")  # of what is deprecated, and of a trace
        warnings.simplefilter("error", UserWarning)
        for owner, name, replacement in () if fault is None else fault.patches:
            patch.setattr(owner, name, replacement)
        reseed(0)
        try:
            test()
        except (Exception, pytest.fail.Exception) as error:
            line = traceback.extract_tb(error.__traceback__)[-1].line  # without pytest an assertion says nothing
            return f"{type(error).__name__}: {[*str(error).strip().splitlines(), line][0]}"
    return ""


def function_of(test: Test) -> Callable[..., object]:
    """The test without its parameters."""
    return test.func if isinstance(test, partial) else test


def label(test: Test) -> str:
    """The test's name and its parameters."""
    given = [*test.args, *test.keywords.values()] if isinstance(test, partial) else []
    values = "-".join(str(getattr(each, "__name__", each)) for each in given)
    return f"{function_of(test).__name__}{values and f'[{values}]'}"


def _nothing(*args: object, **kwargs: object) -> None:
    return None


def _joined_by_forward(self: Householder, *, shared: bool) -> type | None:
    return Householder if type(self)._forward is Householder._forward and not shared else None


def _autocast_everywhere(device_type: str) -> bool:
    return torch.is_autocast_enabled(device_type)


def _full_precision_everywhere(device_type: str) -> torch.autocast:
    return torch.autocast(device_type, enabled=False)


def _copied(dim: int, direction: Tensor | None = None) -> Householder:
    return copy.deepcopy(Householder(dim, direction))


def _counts_as_they_come(self: likelihoods.Binomial, outputs: Tensor, x: Tensor) -> Tensor:
    logit = outputs.squeeze(-2)
    ways = math.lgamma(self.n + 1) - torch.lgamma(x + 1) - torch.lgamma(self.n - x + 1)
    return (x * logit - self.n * F.softplus(logit) + ways).sum(-1)


def _encoded_raw(encoder: nn.Module, x: Tensor, y: Tensor | None) -> Tensor:
    return call("encoder", encoder, x, y)


def _features_of_any_axes(self: VAE, x: Tensor, y: Tensor | None = None) -> FlowDistribution:
    return self.posterior.at(self.encoder(x))


def _int_but_of_examples(name: str, value: object, minimum: int) -> int:
    return _CHECK_INT(name, value, 0 if name == "len(x)" else minimum)


def _noise_of_any_dtype(noise: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    _CHECK_NOISE(noise.to(like.dtype) if isinstance(noise, Tensor) else noise, shape, like)


def _int_of_python(value: object) -> int:
    if not isinstance(value, int):
        raise TypeError
    return value


def _size_of_python(size: object) -> bool:
    return isinstance(size, int) and not isinstance(size, bool)


def _no_refusals(names: object, what: str, place: int) -> list[str]:
    return []


def _its_own_number(state: object, key: str, own: float, errors: list[str]) -> float:
    return own


def _rate_by_rows(rate: float | None, features: int, dim: int) -> float:
    if rate is not None:
        return rate
    return 1 / dim if features else 1.0


def _std_for_variance(out: Distribution) -> tuple[Tensor, Tensor]:
    loc, log_var = _OF_GAUSSIAN(out)
    return loc, log_var / 2


def _pareto_k_negated(excess: Tensor) -> Tensor:
    return -_FIT_PARETO(excess)


_CHECK_INT, _CHECK_NOISE = arguments.check_int, arguments.check_noise
_OF_GAUSSIAN, _FIT_PARETO = outputs._of_gaussian, pareto.fit_pareto

_OF_ANOTHER_DTYPE = [
    index for index, (*_, message) in enumerate(test_errors.POSTERIOR) if message.startswith("noise: expected torch.")
]

FAULTS = (
    Fault(
        "torch.jit.trace dies raw, or freezes what it should not",
        "flowpost 8666d94",
        ((posterior, "check_untraced", _nothing), (base, "check_untraced", _nothing)),
        tuple(
            partial(test_traced.test_a_trace_is_refused_by_name, name, "sample")
            for name in ("full_covariance", "planar", "iaf", "maf", "naf")
        ),
    ),
    Fault(
        "autocast asked of a device that has none",
        "flowpost 8666d94",
        ((watchers, "autocast", _autocast_everywhere), (engine, "autocast", _autocast_everywhere)),
        (
            test_meta.test_autocast_is_asked_of_devices_that_have_it,
            partial(test_meta.test_every_recipe_runs_on_meta_alone_and_launches_no_more_than_it_did, "iaf"),
        ),
    ),
    Fault(
        "autocast turned off on a device that has none",
        "flowpost 8666d94",
        ((posterior, "full_precision", _full_precision_everywhere),),
        (
            test_meta.test_autocast_is_asked_of_devices_that_have_it,
            partial(test_meta.test_every_recipe_runs_on_meta_alone_and_launches_no_more_than_it_did, "diagonal"),
        ),
    ),
    Fault(
        "a fake tensor copied",
        "flowpost 8666d94",
        ((gaussian, "Householder", _copied),),
        (partial(test_meta.test_a_recipe_is_built_and_runs_of_fake_tensors, "householder", test_meta.sample),),
    ),
    Fault(
        "counts that wrap in 8 bits",
        "flowpost 8666d94",
        ((likelihoods.Binomial, "log_prob", _counts_as_they_come),),
        (test_likelihoods.test_bytes_do_not_wrap, test_likelihoods.test_a_vae_of_bytes),
    ),
    Fault(
        "counts out of many in float32",
        "flowpost 8666d94",
        ((likelihoods, "wide_dtype", lambda outputs: outputs.dtype),),
        tuple(partial(test_likelihoods.test_counts_out_of_many, n) for n in (65_535, 1_000_000)),
    ),
    Fault(
        "an x outside the likelihood in silence",
        "flowpost 8666d94",
        ((likelihoods, "check_values", _nothing),),
        tuple(
            partial(test_likelihoods.test_checking_names_an_x_that_the_likelihood_does_not_have, index)
            for index in range(len(test_likelihoods.WRONG))
        ),
    ),
    Fault(
        "an x of integers dies raw",
        "flowpost 8666d94",
        ((vae, "encode", _encoded_raw),),
        (partial(test_vae.test_integers_for_an_encoder_of_numbers_are_refused_with_what_to_write, torch.uint8),),
    ),
    Fault(
        "features with two batch axes mixed",
        "flowpost 8666d94",
        ((VAE, "encode", _features_of_any_axes),),
        (test_errors.test_features_of_several_tokens,),
    ),
    Fault(
        "a log q for each token mixed",
        "flowpost 8666d94",
        ((objectives, "_check_terms", _nothing),),
        (
            test_objectives.test_a_log_q_for_each_token_is_refused,
            partial(test_objectives.test_a_term_of_another_size_is_refused, "elbo", (3, 1)),
            partial(test_objectives.test_a_term_of_another_size_is_refused, "iwae", (3, 1)),
        ),
    ),
    Fault(
        "a decomposition of no example dies raw",
        "flowpost 8666d94",
        ((decomposition, "check_int", _int_but_of_examples),),
        (test_errors.test_too_few_examples_for_a_figure_of_all_of_them,),
    ),
    Fault(
        "active units of one example are nan",
        "flowpost 8666d94",
        ((evaluation, "check_int", _int_but_of_examples),),
        (test_errors.test_too_few_examples_for_a_figure_of_all_of_them,),
    ),
    Fault(
        "noise of another dtype reported as z",
        "flowpost 8666d94",
        ((density, "check_noise", _noise_of_any_dtype),),
        tuple(partial(test_errors.test_the_posterior_s_bad_inputs, index) for index in _OF_ANOTHER_DTYPE),
    ),
    Fault(
        "numpy's ints are no counts",
        "flowpost 8666d94",
        ((arguments, "operator", SimpleNamespace(index=_int_of_python)),),
        (test_errors.test_numpy_s_ints_are_ints,),
    ),
    Fault(
        "numpy's ints are no sample axes",
        "flowpost 8666d94",
        ((arguments, "_is_int", _size_of_python),),
        (test_errors.test_numpy_s_ints_are_ints,),
    ),
    Fault(
        "a whole state of another map taken in",
        "flowpost before d62f7ca",
        ((states, "_refusals", _no_refusals),),
        (
            partial(
                test_golden.test_a_whole_state_of_another_map_is_refused_and_told_what_takes_it,
                "full_covariance",
                strict=False,
            ),
            partial(test_golden.test_a_wrapped_iaf_of_then_is_refused_also_where_names_may_differ, strict=False),
        ),
    ),
    Fault(
        "a state's rate or gain left behind",
        "flowpost before 9fa6cdf",
        ((states, "_number_in", _its_own_number),),
        (
            test_triangular.test_a_state_tells_its_rate,
            test_golden.test_a_state_of_another_gain_makes_the_gates_those_of_that_gain,
        ),
    ),
    Fault(
        "a triangular matrix's rate whatever the features",
        "flowpost before a0e789b",
        ((gaussian, "steadied", _rate_by_rows),),
        tuple(partial(test_triangular.test_full_covariance_has_a_rate_that_falls_with_dim, dim) for dim in (1, 2, 20)),
    ),
    Fault(
        "a Normal's std taken for its variance",
        "-",
        ((outputs, "_of_gaussian", _std_for_variance),),
        tuple(
            partial(test_wrap_reading.test_it_starts_at_the_encoder_s_own_gaussian, name, "diagonal")
            for name in ("mu and std", "a diagonal Gaussian")
        ),
    ),
    Fault(
        "Zhang and Stephens' sign of k",
        "-",
        ((pareto, "fit_pareto", _pareto_k_negated),),
        (
            partial(test_evaluation.test_k_hat_is_the_naive_formula_s, 1000, 1.0),
            partial(test_evaluation.test_k_hat_of_pareto_weights, 0.7),
        ),
    ),
    Fault(
        "a draw from a plain prior of any shape",
        "-",
        ((generative, "check_noise", _nothing),),
        (test_prior.test_every_use_of_the_prior_finds_it,),
    ),
    Fault(
        "a run's inverse in the place of a subclass's own",
        "-",
        ((Householder, "_fuses", _joined_by_forward),),
        (test_householder.test_a_subclass_with_an_inverse_of_its_own_is_not_joined,),
    ),
)


def main() -> int:
    """Print which tests find what, and how many faults are found; 1 if one is not, or a test fails without it."""
    alive = 0
    for fault in FAULTS:
        print(f"{fault.name} [{fault.seen_in}]:")
        verdicts = []
        for test in fault.tests:
            verdicts.append("FAILS WITHOUT IT" if said(test) else said(test, fault) or "ALIVE")
            print(f"    {label(test)}: {verdicts[-1][:120]}", flush=True)
        alive += not {"FAILS WITHOUT IT", "ALIVE"}.isdisjoint(verdicts)
    print(f"faults found by tests: {len(FAULTS) - alive} of {len(FAULTS)}")
    return int(alive > 0)
