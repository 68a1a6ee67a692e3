"""The named posteriors of the literature: plain functions that assemble steps into a `FlowPosterior`.

Each is one function under the decorator `recipe`; its name here, in `RECIPES` and in `flowpost` follows from that.
"""

from typing import TYPE_CHECKING

from flowpost.recipes.amortized import *
from flowpost.recipes.autoregressive import *
from flowpost.recipes.coupling import *
from flowpost.recipes.record import RECIPES as RECIPES

if not TYPE_CHECKING:
    __all__ = list(RECIPES)
