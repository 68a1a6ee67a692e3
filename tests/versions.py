"""What PyTorches before the newest cannot do."""

import pytest
import torch
from packaging.version import Version

RELEASE = Version(torch.__version__)
OLDEST = RELEASE < Version("2.6")
untraceable = pytest.mark.skipif(OLDEST, reason="compilers of PyTorch 2.5 cannot trace it, as the README says")
# 2.11 counts so, 2.13 does not; between them nobody looked.
adam_elsewhere = pytest.mark.skipif(RELEASE < Version("2.13"), reason="Adam counts its steps on the default device")
# Before that, a compiler that traces for an export does not know what it traces for.
untold = pytest.mark.skipif(RELEASE < Version("2.7"), reason="the compiler does not say that an export has called it")
# 2.11 cannot, and says so by an error; 2.13 can.
walked = pytest.mark.skipif(RELEASE < Version("2.13"), reason="this compiler knows no vars() of a Transform")
