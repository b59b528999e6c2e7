"""How long models take, side by side."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import nn

from structrep.report import Latency, LatencyRecord
from structrep.trace import Example, as_arguments

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
        return in_turn(runs, rounds, on_cuda(models.values()))


def on_cuda(models: Iterable[nn.Module]) -> bool:
    return any(one.is_cuda for model in models for one in model.parameters())


def device_name(cuda: bool) -> str:
    return torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"


def in_turn(
    runs: Mapping[str, Callable[[], object]], rounds: int, cuda: bool, enough: float = math.inf
) -> LatencyRecord:
    """Seconds of each run in turn, as `latency` has them.

    Args:
        cuda: whether a run is over only when the GPU is done.
        enough: stop after so many seconds, if there were `LEAST` rounds.
    """
    samples: dict[str, list[float]] = {name: [] for name in runs}
    begun = time.perf_counter()
    for index in range(WARM + rounds):
        if index >= WARM + LEAST and time.perf_counter() - begun > enough:
            break
        for name, run in runs.items():
            seconds = _timed(run, cuda)
            if index >= WARM:
                samples[name].append(seconds)
    first = next(iter(samples.values()))
    return LatencyRecord(
        device=device_name(cuda),
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


def _timed(run: Callable[[], object], cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
