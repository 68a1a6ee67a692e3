"""The peak of what a call allocates, beyond what is allocated when it starts."""

from __future__ import annotations

import gc
import os
import warnings
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.speed.timing import Call
from flowpost.masked.network import MaskedLinear


def peak_bytes(call: Call, clear: Call, device: torch.device) -> int:
    """Peak bytes of a call, after one that warms up; parameters and inputs are not in it, their gradients are.

    On a CPU every allocation and release of torch's allocator is replayed in the order of time; scratch memory of the
    matrix library is not seen. On a GPU torch's own counter is read.

    Args:
        call: what is measured.
        clear: releases what earlier calls left, so that nothing older is released during this one.
        device: of the tensors.
    """
    call()
    clear()
    gc.collect()  # cycles that hold tensors of an earlier call
    return _cuda_peak(call, device) if device.type == "cuda" else _cpu_peak(call)


def mask_bytes(model: nn.Module, device: torch.device) -> int:
    """Bytes on the device of the masks that a model keeps between calls, which no peak of a call has in it."""
    stairs = [part.staircase for part in model.modules() if isinstance(part, MaskedLinear)]
    masks = [mask for stair in stairs for mask in (stair.mask, *stair._edges)]
    tensors = [tensor for mask in masks for tensor in (mask.value, *mask._copies.values())]
    return sum(tensor.nbytes for tensor in tensors if tensor.device.type == device.type)


def _cuda_peak(call: Call, device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _cpu_peak(call: Call) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells stderr of each start and stop otherwise
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Profiler clears events")  # torch 2.11 says so of one cycle, too
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            call()
    results: Any = getattr(profiler.profiler, "kineto_results", None)  # which has no types
    events = [event for event in results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
