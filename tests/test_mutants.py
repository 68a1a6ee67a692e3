"""Every planted fault is killed, by the property that names it; `python -m tests.mutants` tries all properties."""

import pytest
from mutants import MUTANTS, Mutant, killers


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_killed(mutant: Mutant) -> None:
    found = killers(mutant, first=True)
    assert bool(found) != bool(mutant.equivalent), f"{mutant.name} lives"
