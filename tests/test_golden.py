"""The numbers of every recipe as they were before the redesign, from the files that were saved then."""

from pathlib import Path

import pytest
import torch
from golden.make import numbers
from safetensors.torch import load_file

import flowpost

GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(path.name.split(".")[0] for path in GOLDEN.glob("*.numbers.safetensors"))


def test_there_is_one_of_every_recipe_of_then() -> None:
    assert len(NAMES) == 17


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_then_gives_the_numbers_of_then(name: str) -> None:
    """To the rounding of one machine's products against another's; values, log q, and all gradients."""
    found = numbers(flowpost.load(GOLDEN / f"{name}.posterior.safetensors"))
    wanted = load_file(GOLDEN / f"{name}.numbers.safetensors")
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(
            found[key], value, rtol=1e-11, atol=1e-11, msg=lambda said, key=key: f"{key}: {said}"
        )
