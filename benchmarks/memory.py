"""Peak memory of a conversion beside the model: in place a few of its largest layers, not a second model.

    python -m benchmarks.memory            # writes benchmarks/results/memory.json; on Linux
    python -m benchmarks.memory --quick    # two models, nothing is written

Each measurement is a process of its own. A small model is converted first, for what is loaded once and for good; then
the kernel's record of the most that the process held is reset. The allocator is told to give freed kernels back
(MALLOC_MMAP_THRESHOLD_), so that what is recorded is what is held.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from torch import nn

import structrep
from benchmarks.measure import ROOT, machine, save, show
from structrep.blocks import RepVGGBlock2d
from structrep.cli.models import named
from tests.support.vision import import_torchvision

_torchvision_ops = import_torchvision()  # which timm imports

CHANNELS, BLOCKS = 512, 40


def _conv_norm() -> list[nn.Module]:
    return [nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False), nn.BatchNorm2d(CHANNELS), nn.ReLU()]


def _repvgg() -> list[nn.Module]:
    return [RepVGGBlock2d(CHANNELS, CHANNELS, 3, padding=1), nn.ReLU()]


CHAINS: dict[str, Callable[[], list[nn.Module]]] = {
    f"{BLOCKS} x conv, norm, ReLU": _conv_norm,
    f"{BLOCKS} x RepVGG block, ReLU": _repvgg,
}
MODELS = (
    *CHAINS,
    "timm:repvgg_a0",
    "timm:mobileone_s1",
    "timm:repvit_m2_3",
    "timm:resnet50",
    "timm:resnet152",
)
QUICK = ("timm:repvgg_a0", "timm:resnet50")
HOW = ("copy", "in place")


def resident(what: str) -> float:
    """MiB of this process: what it has, VmRSS, or has had at most, VmHWM, which unlike `ru_maxrss` starts with it."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[what].split()[0]) / 2**10


def make(name: str) -> nn.Module:
    if name in CHAINS:
        return nn.Sequential(*(layer for _ in range(BLOCKS) for layer in CHAINS[name]())).eval()
    return named(name, {}).eval()


def measure(name: str, how: str) -> float:
    """MiB that a conversion in this process takes at most, beside what was there before it."""
    model = make(name)
    structrep.reparameterize(make("timm:repvgg_a0"), verify=False)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the most so far is what it has now
    before = resident("VmHWM")
    structrep.reparameterize(model, inplace=how == "in place", verify=False)
    return resident("VmHWM") - before


def elsewhere(name: str, how: str) -> float:
    """`measure` in a process of its own."""
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", "--peak-of", f"{name}/{how}"],
        cwd=ROOT, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}, capture_output=True, text=True,
    )  # fmt: skip
    if run.returncode:
        raise RuntimeError(f"the conversion of {name} ({how}) failed:\n{run.stderr}")
    return float(run.stdout.split()[-1])


def line(name: str) -> dict[str, Any]:
    model = make(name)
    sizes = [t.numel() * t.element_size() / 2**20 for t in (*model.parameters(), *model.buffers())]
    return {
        "model": name,
        "model_mib": sum(sizes),
        "largest_mib": max(sizes),
        "peak_mib": {how: elsewhere(name, how) for how in HOW},
    }


def row(found: dict[str, Any]) -> list[str]:
    peak, size, largest = found["peak_mib"], found["model_mib"], found["largest_mib"]
    return [
        found["model"],
        *(f"{mib:,.1f}" for mib in (size, largest, peak["copy"], peak["in place"])),
        f"{peak['in place'] / size:.2f}",
        f"{peak['in place'] / largest:.1f}",
    ]


COLUMNS: Sequence[str] = (
    "model", "model, MiB", "largest layer, MiB", "copy: peak beside it, MiB", "in place: peak beside it, MiB",
    "in place, in models", "in largest layers",
)  # fmt: skip


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Two models, nothing is written.")] = False,
    peak_of: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    if peak_of:
        print(measure(*peak_of.rsplit("/", 1)))
        return
    found = []
    for name in track(QUICK if quick else MODELS, "models", console=Console(stderr=True)):
        found.append(line(name))
        if not quick:
            save("memory", {"machine": machine("timm"), "models": found})
    show("peak memory of a conversion, beside the model", COLUMNS, map(row, found))


if __name__ == "__main__":
    typer.run(main)
