"""What all pictures of a job share: sizes, colours, names."""

from __future__ import annotations

from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = {"diagonal": "#0072B2", "full_covariance": "#D55E00", "planar": "#009E73", "iaf": "#CC79A7"}
OTHER = "#56B4E9"


def blank(width: float, height: float) -> Figure:
    """A figure of its own, which no global state holds on to."""
    return Figure(figsize=(width, height), layout="constrained")


def colour(name: str) -> str:
    """A posterior's colour, the same in every picture."""
    return COLOURS.get(name, OTHER)


def title(name: str) -> str:
    """A posterior's name, in words."""
    return name.replace("_", " ")
