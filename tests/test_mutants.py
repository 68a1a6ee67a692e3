"""Every planted fault is found by the property that is there to find it; `make mutants` tries all properties."""

import inspect
from types import FunctionType

import pytest
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


PATCHES = [
    pytest.param(getattr(owner, name), replacement, id=f"{mutant.name}: {name}")
    for mutant in MUTANTS
    for owner, name, replacement in mutant.patches
    if isinstance(getattr(owner, name), FunctionType) and isinstance(replacement, FunctionType)
]


@pytest.mark.full
@pytest.mark.parametrize(("function", "replacement"), PATCHES)
def test_a_fault_takes_the_arguments_of_what_it_replaces(function: FunctionType, replacement: FunctionType) -> None:
    """Else it is found by any property, and for what it is not."""
    taken = inspect.signature(function).parameters.values()
    keywords = {each.name: None for each in taken if each.kind is each.KEYWORD_ONLY}
    inspect.signature(replacement).bind(*(None for each in taken if each.kind not in KEYWORDS), **keywords)
