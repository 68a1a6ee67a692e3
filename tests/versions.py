"""What the oldest PyTorch that is supported cannot do."""

import pytest
import torch

OLDEST = torch.__version__.startswith("2.5.")
untraceable = pytest.mark.skipif(OLDEST, reason="compilers of PyTorch 2.5 cannot trace it, as the README says")
