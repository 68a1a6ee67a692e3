"""Every planted fault is found by the property, or the tests, that are there to find it; `make mutants` tries all."""

import inspect
from types import FunctionType

import pytest
from faults import FAULTS, Fault, function_of, label, said
from mutants import MUTANTS, Mutant, killers

from flowpost.testing import COMPILED

KEYWORDS = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)


def _marked(mutant: Mutant) -> object:
    marks = [pytest.mark.compile] if mutant.killer in COMPILED else []
    return pytest.param(mutant, id=mutant.name, marks=marks)


@pytest.mark.full
@pytest.mark.parametrize("mutant", [_marked(mutant) for mutant in MUTANTS])
def test_mutant_is_killed(mutant: Mutant) -> None:
    found = killers(mutant, [mutant.killer])
    assert bool(found) != bool(mutant.equivalent), f"{mutant.name} lives"


def _of_level(fault: Fault) -> object:
    marks = {mark.name for test in fault.tests for mark in getattr(function_of(test), "pytestmark", [])}
    return pytest.param(fault, id=fault.name, marks=[pytest.mark.full] if "full" in marks else [])


@pytest.mark.parametrize("fault", [_of_level(fault) for fault in FAULTS])
def test_a_fault_outside_the_contract_is_found_by_each_of_its_tests(fault: Fault) -> None:
    for test in fault.tests:
        assert said(test) == ""
        assert said(test, fault), f"{label(test)} does not find {fault.name}"


PATCHES = [
    pytest.param(getattr(owner, name), replacement, id=f"{each.name}: {name}")
    for each in (*MUTANTS, *FAULTS)
    for owner, name, replacement in each.patches
    if isinstance(getattr(owner, name), FunctionType) and isinstance(replacement, FunctionType)
]


@pytest.mark.full
@pytest.mark.parametrize(("function", "replacement"), PATCHES)
def test_a_fault_takes_the_arguments_of_what_it_replaces(function: FunctionType, replacement: FunctionType) -> None:
    """Else it is found by any property, and for what it is not."""
    taken = inspect.signature(function).parameters.values()
    keywords = {each.name: None for each in taken if each.kind is each.KEYWORD_ONLY}
    inspect.signature(replacement).bind(*(None for each in taken if each.kind not in KEYWORDS), **keywords)
