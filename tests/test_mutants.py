"""Every planted fault is found by the property that is there to find it; `make mutants` tries all properties."""

import pytest
from mutants import MUTANTS, Mutant, killers

from flowpost.testing import COMPILED


def _marked(mutant: Mutant) -> object:
    marks = [pytest.mark.compile] if mutant.killer in COMPILED else []
    return pytest.param(mutant, id=mutant.name, marks=marks)


@pytest.mark.full
@pytest.mark.parametrize("mutant", [_marked(mutant) for mutant in MUTANTS])
def test_mutant_is_killed(mutant: Mutant) -> None:
    found = killers(mutant, [mutant.killer])
    assert bool(found) != bool(mutant.equivalent), f"{mutant.name} lives"
