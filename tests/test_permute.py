"""Permutations, by hand."""

import torch

from flowpost import Permute, Reverse


def test_permutations_move_variables_where_they_say() -> None:
    z = torch.tensor([10.0, 20.0, 30.0])
    assert Permute([2, 0, 1])(z)[0].tolist() == [30.0, 10.0, 20.0]
    assert Permute([2, 0, 1]).inverse(z)[0].tolist() == [20.0, 30.0, 10.0]
    assert Reverse(3)(z)[0].tolist() == Reverse(3).inverse(z)[0].tolist() == [30.0, 20.0, 10.0]
