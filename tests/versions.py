"""What the oldest PyTorch that is supported cannot do."""

import pytest
import torch

OLDEST = torch.__version__.startswith("2.5.")
untraceable = pytest.mark.skipif(OLDEST, reason="PyTorch 2.5 traces no method of the engine's constants")
