"""What a training step costs: the plain model, blocks that run their branches on the activations, and blocks that merge
their kernels first and run one convolution.

    python -m benchmarks.training            # on CUDA where there is one

ResNet-18 at 224x224; every 3x3 but the stem is expanded. The three forms of a family take their steps in turn, in one
process, and each ratio is one step over the plain step beside it. Memory is the peak of a process of its own.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import structrep
from benchmarks.measure import ROOT, in_turn, machine, markdown, ratio, save, show, write
from benchmarks.memory import resident
from tests.support.vision import import_torchvision

_torchvision_ops = import_torchvision()  # which timm imports
import timm  # noqa: E402

PAGE = ROOT / "docs" / "training.md"
IN_WEIGHT_SPACE = ("diracnet", "doconv", "orepa", "expandnet")  # no norm on a branch: one convolution will do
WITH_NORMS = ("repvgg", "acb", "mobileone", "dbb")  # norms of the branches' own statistics: each has to be run
COLUMNS = ("family", "branches: time", "memory", "merged first: time", "memory")


# --- the branches of a computed kernel, run one by one --------------------------------------------


class OnActivations(nn.Module):
    """A block whose branches are run on the activations, as a definition written down as layers would be."""

    def __init__(self, block: Any, run: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.block, self.run = block, run

    def forward(self, x: Tensor) -> Tensor:
        y = self.run(self.block, x)
        return y if self.block.bias is None else y + self.block.bias[:, None, None]


def _conv(block: Any, x: Tensor, kernel: Tensor, groups: int | None = None) -> Tensor:
    padding = block.conv_padding if kernel.shape[-1] > 1 else 0
    return F.conv2d(x, kernel, None, block.stride, padding, block.dilation, groups or block.groups)


def _diracnet(block: Any, x: Tensor) -> Tensor:
    direction = F.normalize(block.weight.flatten(1), dim=1).view(block.weight_shape)
    scaled = _conv(block, x, direction) * block.b[:, None, None]
    return scaled + _conv(block, x, block.delta) * block.a[:, None, None]


def _doconv(block: Any, x: Tensor) -> Tensor:
    channels, taps = block.in_channels, block.kernel_size
    depthwise = (block.D + block.D_diag).reshape(channels, -1, block.D_mul).transpose(1, 2)
    spread = _conv(block, x, depthwise.reshape(channels * block.D_mul, 1, *taps), channels)
    return F.conv2d(spread, block.W.reshape(block.out_channels, -1, 1, 1), groups=block.groups)


def _orepa(block: Any, x: Tensor) -> Tensor:
    channels, outs = block.in_channels, block.out_channels
    inner = F.conv2d(x, block.inner[..., None, None])
    averaged = F.conv2d(x, block.average[..., None, None])
    filtered = F.conv2d(x, block.prior[..., None, None])
    deep = _conv(block, x, block.depth.reshape(channels * 8, 1, *block.kernel_size), channels)
    branches = (
        _conv(block, x, block.dense),
        _conv(block, x, block.point[..., None, None]),
        _conv(block, inner, block.outer),
        F.avg_pool2d(averaged, block.kernel_size, block.stride, block.conv_padding),
        _conv(block, filtered, block.filters[:, None], outs),
        F.conv2d(deep, block.mix.reshape(outs, channels * 8, 1, 1)),
    )
    return sum((y * scale[:, None, None] for y, scale in zip(branches, block.scale, strict=True)), x.new_zeros(()))


RUN = {"diracnet": _diracnet, "doconv": _doconv, "orepa": _orepa}


def make(family: str, form: str) -> nn.Module:
    """A form of a family: "plain", "branches" or "merged first"."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model("resnet18")
    if form == "plain":
        return model
    if family == "expandnet":
        return structrep.expand(model, family, where=_spatial, online=form == "merged first", inplace=True)
    structrep.expand(model, family, inplace=True)
    if family in RUN and form == "branches":
        for path in structrep.expand_layers(model):
            model.set_submodule(path, OnActivations(model.get_submodule(path), RUN[family]))
    return model


def _spatial(path: str, layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3)


# --- measuring ------------------------------------------------------------------------------------


class Trained:
    """A model and what it takes to train it."""

    def __init__(self, model: nn.Module, device: torch.device, batch: int, half: bool) -> None:
        self.model, self.device, self.half = model.to(device).train(), device, half
        self.optimizer = torch.optim.SGD(self.model.parameters(), 1e-3, momentum=0.9)
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(batch, 3, 224, 224, generator=generator).to(device)
        self.y = torch.randint(1000, (batch,), generator=generator).to(device)

    def step(self) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            loss = F.cross_entropy(self.model(self.x), self.y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def peak(family: str, form: str, device: torch.device, batch: int, half: bool) -> float:
    """MiB that two steps take beside what was there before them; of the process, or of the device."""
    trained = Trained(make(family, form), device, batch, half)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        trained.step()
        trained.step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = resident("VmRSS")
    trained.step()
    trained.step()
    return resident("VmHWM") - before


def peak_elsewhere(family: str, form: str, batch: int, half: bool) -> float:
    command = [sys.executable, "-m", "benchmarks.training", "--batch", str(batch), "--memory-of", f"{family}/{form}"]
    run = subprocess.run(
        [*command, *(["--half"] if half else [])],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return float(run.stdout.split()[-1])


def same(family: str) -> None:
    """Branches on the activations and kernels merged first are one function."""
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    one, two = (make(family, form).eval() for form in ("branches", "merged first"))
    with torch.no_grad():
        for parameter in one.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
        for mine, other in zip(one.parameters(), two.parameters(), strict=True):
            other.copy_(mine)
        found, expected = one.double()(x.double()), two.double()(x.double())
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max(), family


def measure(family: str, device: torch.device, batch: int, half: bool, rounds: int) -> dict[str, Any]:
    forms = ["plain", "branches", *(["merged first"] if family in IN_WEIGHT_SPACE else [])]
    if family in IN_WEIGHT_SPACE:
        same(family)
    trained = {form: Trained(make(family, form), device, batch, half) for form in forms}
    samples = in_turn({form: one.step for form, one in trained.items()}, rounds)
    del trained
    gc.collect()
    memory = {form: peak_elsewhere(family, form, batch, half) for form in forms}
    return {"family": family, "batch": batch, "bfloat16": half, "seconds": samples, "peak_mib": memory}


# --- the page -------------------------------------------------------------------------------------


def introduction(results: dict[str, Any]) -> str:
    on = results["machine"]
    device = on["gpu"] or f"{on['cpu']}, {on['threads']} threads"
    return (
        f"ResNet-18, 224x224, batch {results['batch']}, {results['precision']}, on {device}, torch {on['torch']}. Step "
        f"time and peak memory over those of the plain model; in brackets the middle half of the ratios of "
        f"{results['rounds']} rounds."
    )


def table(results: dict[str, Any]) -> list[list[str]]:
    rows = []
    for row in results["rows"]:
        cells = [row["family"]]
        for form in ("branches", "merged first"):
            if form in row["seconds"]:
                cells += [
                    str(ratio(row["seconds"], form, "plain")),
                    f"{row['peak_mib'][form] / row['peak_mib']['plain']:.2f}",
                ]
            else:
                cells += ["-", "-"]
        rows.append(cells)
    return rows


def page(results: dict[str, Any]) -> str:
    return f"{introduction(results)}\n\n{markdown(COLUMNS, table(results))}"


def main(
    batch: Annotated[int, typer.Option(help="Images a step.")] = 32,
    rounds: Annotated[int, typer.Option(help="Steps that count, of each form.")] = 5,
    half: Annotated[bool, typer.Option("--half", help="Autocast to bfloat16.")] = False,
    memory_of: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if memory_of:
        print(peak(*memory_of.split("/"), device, batch, half))  # type: ignore[misc]
        return
    results: dict[str, Any] = {
        "machine": machine("timm"),
        "batch": batch,
        "rounds": rounds,
        "precision": "bfloat16 autocast" if half else "float32",
        "rows": [
            measure(family, device, batch, half, rounds)
            for family in track(IN_WEIGHT_SPACE + WITH_NORMS, "families", console=Console(stderr=True))
        ],
    }
    save(f"training-{device.type}{'-bfloat16' if half else ''}", results)
    if device.type == "cpu" and not half:
        write(PAGE, "benchmarks/training.py", page(results))
    show(introduction(results), COLUMNS, table(results))


if __name__ == "__main__":
    typer.run(main)
