"""How the time of a plan and of a conversion grows with the number of blocks, and with the number of weights.

    python -m benchmarks.growth            # writes benchmarks/results/growth.json; under 15 minutes on two cores
    python -m benchmarks.growth --quick    # up to 100 blocks and 64 channels, nothing is written

The exponent is the slope of log(seconds) over log(size), by least squares over the upper sizes, those from a thirtieth
of the largest up: 1 is linear, 2 quadratic. A series ends before a size that, going by the last two, would take more
than what is left of its time.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import linear_regression, median
from typing import Annotated

import typer
from rich.console import Console
from torch import Tensor, nn

import structrep
from benchmarks.measure import machine, save, show, timed
from structrep.blocks import ACBlock2d, RepVGGBlock2d

BLOCKS = (10, 30, 100, 300, 1000, 3000, 10000)
CHANNELS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
NARROW = 8  # channels of the models with many blocks: their time is that of the blocks, not of the weights
ROUNDS = 3  # of a size, unless fewer take a tenth of the series' time
UPPER = 30  # the exponent is that of the sizes from the largest down to this part of it
SERIES_SECONDS = 90.0
QUICK_SECONDS = 6.0


# --- the models -----------------------------------------------------------------------------------


def repvgg(channels: int) -> nn.Module:
    return nn.Sequential(RepVGGBlock2d(channels, channels, 3, padding=1), nn.ReLU())


def acb(channels: int) -> nn.Module:
    return nn.Sequential(ACBlock2d(channels, channels, 3, padding=1), nn.ReLU())


def conv_norm(channels: int) -> nn.Module:
    return nn.Sequential(*linear(channels).children(), nn.ReLU())


def linear(channels: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))


class Halves(nn.Module):
    """Two halves of a tree, one after the other."""

    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.left, self.right = left, right

    def forward(self, x: Tensor) -> Tensor:
        return self.right(self.left(x))


class Branches(Halves):
    """Two halves of a tree, added."""

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)


Block = Callable[[int], nn.Module]


def chain(block: Block, blocks: int, channels: int) -> nn.Module:
    return nn.Sequential(*(block(channels) for _ in range(blocks))).eval()


def tree(node: type[Halves], block: Block, blocks: int, channels: int) -> nn.Module:
    """As many blocks as leaves of a binary tree of modules."""
    if blocks == 1:
        return block(channels).eval()
    left = blocks // 2
    return node(tree(node, block, left, channels), tree(node, block, blocks - left, channels)).eval()


Model = Callable[[int, int], nn.Module]  # of so many blocks and channels

DEEP: dict[str, Model] = {
    "chain of RepVGG blocks": partial(chain, repvgg),
    "chain of conv, norm, ReLU": partial(chain, conv_norm),
    "chain of asymmetric blocks": partial(chain, acb),
    "tree of nested modules": partial(tree, Halves, conv_norm),
    "tree of residual sums": partial(tree, Branches, conv_norm),
    "tree of linear branches": partial(tree, Branches, linear),
}
WIDE: dict[str, Model] = {
    "wide RepVGG blocks": partial(chain, repvgg),
    "wide conv, norm, ReLU": partial(chain, conv_norm),
    "wide asymmetric blocks": partial(chain, acb),
}


# --- measuring ------------------------------------------------------------------------------------


@dataclass
class Point:
    """A size, what was found there, and how long it took."""

    blocks: int
    channels: int
    weights: int
    merges: int
    plan: list[float]
    reparameterize: list[float]


@dataclass
class Series:
    name: str
    by: str  # which of a point's sizes grows: "blocks" or "weights"
    points: list[Point]
    left_out: list[int]  # blocks or channels for which there was no time

    def sizes(self) -> list[int]:
        return [getattr(point, self.by) for point in self.points]

    def exponent(self, what: str) -> float:
        return exponent(self.sizes(), [median(getattr(point, what)) for point in self.points])


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The slope in log-log over the upper sizes; NaN if there is one alone."""
    upper = [(math.log(a), math.log(b)) for a, b in zip(sizes, seconds, strict=True) if a * UPPER >= max(sizes)]
    return linear_regression(*zip(*upper, strict=True)).slope if len(upper) > 1 else math.nan


def measure(make: Callable[[], nn.Module], blocks: int, channels: int, long: float) -> Point:
    """Time one size: `ROUNDS` times, or fewer once that has taken `long` seconds."""
    model = make()
    plans: list[structrep.Plan] = []
    point = Point(blocks, channels, sum(one.numel() for one in model.parameters()), 0, [], [])
    while len(plans) < ROUNDS and sum(point.plan + point.reparameterize) < long:
        gc.collect()
        point.plan.append(timed(lambda: plans.append(structrep.plan(model))))
        point.reparameterize.append(timed(lambda: structrep.reparameterize(model, verify=False)))
    point.merges = len(plans[0].terms)
    return point


def grow(name: str, model: Model, by: str, sizes: Sequence[int], seconds: float) -> Series:
    """The sizes of a series, smallest first, for as long as there is time."""
    series = Series(name, by, [], [])
    took: list[float] = []  # by each size
    began, ahead = time.perf_counter(), 0.0
    for index, size in enumerate(sizes):
        if len(took) > 1:  # what comes takes as much longer as this did, but linear growth at least, quadratic at most
            step = size / sizes[index - 1]
            ahead = took[-1] * min(max(took[-1] / took[-2], step), step**2)
        if time.perf_counter() - began + ahead > seconds:
            series.left_out += sizes[index:]
            break
        blocks, channels = (size, NARROW) if by == "blocks" else (1, size)
        point = measure(partial(model, blocks, channels), blocks, channels, seconds / 10)
        series.points.append(point)
        took.append(min(point.plan) + min(point.reparameterize))
    return series


def warm() -> None:
    """What is loaded once, at a process's first conversion."""
    structrep.reparameterize(chain(repvgg, 1, NARROW), verify=False)


def series_of(blocks: Sequence[int], channels: Sequence[int], seconds: float) -> list[Series]:
    """All series, each for about so many seconds."""
    warm()
    deep = [grow(name, model, "blocks", blocks, seconds) for name, model in DEEP.items()]
    return deep + [grow(name, model, "weights", channels, seconds) for name, model in WIDE.items()]


def row(series: Series) -> list[str]:
    last = series.points[-1]
    return [
        series.name,
        f"{last.blocks:,} x {last.channels:,}",
        f"{median(last.plan):.2f}",
        f"{median(last.reparameterize):.2f}",
        f"{series.exponent('plan'):.2f}",
        f"{series.exponent('reparameterize'):.2f}",
        ", ".join(f"{size:,}" for size in series.left_out),
    ]


def main(quick: Annotated[bool, typer.Option("--quick", help="Small sizes, nothing is written.")] = False) -> None:
    with Console(stderr=True).status("growing"):
        if quick:
            found = series_of(BLOCKS[:3], CHANNELS[:3], QUICK_SECONDS)
        else:
            found = series_of(BLOCKS, CHANNELS, SERIES_SECONDS)
    show(
        "growth",
        ("models", "blocks x channels", "plan, s", "conversion, s", "exponent: plan", "conversion", "no time for"),
        map(row, found),
    )
    if not quick:
        save("growth", {"machine": machine(), "series": [asdict(series) for series in found]})


if __name__ == "__main__":
    typer.run(main)
