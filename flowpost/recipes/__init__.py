"""The named posteriors of the literature: plain functions that assemble steps into a `FlowPosterior`.

Each is one function under the decorator `recipe`; its name here, in `RECIPES` and in `flowpost` follows from that.
"""

from typing import TYPE_CHECKING

# The simplest first: tables and messages name recipes in this order.
# isort: off
from flowpost.recipes.gaussian import *
from flowpost.recipes.amortized import *
from flowpost.recipes.autoregressive import *
from flowpost.recipes.coupling import *
from flowpost.recipes.record import RECIPES as RECIPES
# isort: on

if not TYPE_CHECKING:
    __all__ = list(RECIPES)
