"""Data that make a training step not finite, for the loops that have to leave it out."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from benchmarks import train
from benchmarks.data import Data
from benchmarks.models import build


def spoil(data: Data, images: list[int], monkeypatch: pytest.MonkeyPatch) -> Data:
    """With images that are not finite, of which the model's own statistics know nothing."""
    clean, pixels = replace(data, dynamic=False), data.train.clone()
    pixels[images] = math.nan
    monkeypatch.setattr(train, "build", lambda _, *arguments, **options: build(clean, *arguments, **options))
    return replace(clean, train=pixels)
