"""The unit lower-triangular step: which entry is which, and that it is a matrix product."""

import torch

from flowpost import UnitLowerTriangular


def test_unit_lower_triangular_fills_row_by_row() -> None:
    entries = torch.tensor([2.0, 3.0, 5.0], dtype=torch.float64)
    image, log_det = UnitLowerTriangular(3)(torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64), entries)
    assert image.tolist() == [1.0, 2.0 + 10.0, 3.0 + 50.0 + 100.0]  # a transpose would give 1 + 20 + 300, ...
    assert log_det == 0


def test_unit_lower_triangular_is_a_matrix_product() -> None:
    dim = 7
    z, entries = torch.randn(5, dim, dtype=torch.float64), torch.randn(5, dim * (dim - 1) // 2, dtype=torch.float64)
    matrix = torch.eye(dim, dtype=torch.float64).repeat(5, 1, 1)
    index = 0
    for row in range(dim):
        for column in range(row):
            matrix[:, row, column] = entries[:, index]
            index += 1
    image, _ = UnitLowerTriangular(dim)(z, entries)
    torch.testing.assert_close(image, (matrix @ z.unsqueeze(-1)).squeeze(-1))
    back, _ = UnitLowerTriangular(dim).inverse(image, entries)
    torch.testing.assert_close(back, z)
