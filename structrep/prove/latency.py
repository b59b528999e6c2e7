"""How long models take, side by side."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import nn

from structrep.modules.arguments import Example, as_arguments
from structrep.records.latency import Latency, LatencyRecord

WARM, LEAST = 3, 5


def latency(models: Mapping[str, nn.Module], example_inputs: Example, rounds: int = 20) -> LatencyRecord:
    """Seconds for one pass of each model in turn, in one process: what slows one down slows all.

    Args:
        models: by name; the first is what the others are compared with.
        example_inputs: on the models' device.
        rounds: how often each runs, after a few that do not count.
    """
    args, kwargs = as_arguments(example_inputs)
    with torch.no_grad():
        runs = {name: partial(model, *args, **kwargs) for name, model in models.items()}
        return in_turn(runs, rounds, device_of(models.values()))


def device_of(models: Iterable[nn.Module]) -> torch.device:
    """Where models are: the accelerator, if a parameter of one is on it."""
    devices = (one.device for model in models for one in model.parameters())
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))


def accelerator() -> torch.device:
    """The device of this machine that is faster than its CPU, or else that."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return f"CPU, {torch.get_num_threads()} threads"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def in_turn(
    runs: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, enough: float = math.inf
) -> LatencyRecord:
    """Seconds of each run in turn, as `latency` has them.

    Args:
        device: where they run: a run is over only when all that it has launched there is done.
        enough: stop after so many seconds, if there were `LEAST` rounds.
    """
    samples: dict[str, list[float]] = {name: [] for name in runs}
    begun = time.perf_counter()
    for index in range(WARM + rounds):
        if index >= WARM + LEAST and time.perf_counter() - begun > enough:
            break
        for name, run in runs.items():
            seconds = _timed(run, device)
            if index >= WARM:
                samples[name].append(seconds)
    first = next(iter(samples.values()))
    return LatencyRecord(
        device=device_name(device),
        torch=torch.__version__,
        models={
            name: Latency(
                seconds=tuple(found),
                median=statistics.median(found),
                faster=statistics.median(one / other for one, other in zip(first, found, strict=True)),
            )
            for name, found in samples.items()
        },
    )


def _timed(run: Callable[[], object], device: torch.device) -> float:
    launches = device.type != "cpu" and torch.accelerator.is_available()
    if launches:
        torch.accelerator.synchronize(device)
    start = time.perf_counter()
    run()
    if launches:
        torch.accelerator.synchronize(device)
    return time.perf_counter() - start
