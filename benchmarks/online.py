"""What blocks whose branches are merged before they are run cost in training: over a plain convolution with its norm,
beside the same blocks with their branches run.

    python -m benchmarks.online            # on CUDA where there is one

A step is forward and all gradients. The three forms take theirs in turn, in one process, every other round
backwards; times are those of the processor on a CPU, so that what else runs counts little. Each ratio is one step
over the plain step beside it. MobileOne is the network as timm has it, whole, with its own branches and with
`structrep`'s in their place.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from torch import nn

from benchmarks.measure import ROOT, machine, markdown, ratio, save, show, write
from structrep.blocks import Branches, MobileOneBlock2d
from tests.support.vision import import_torchvision

_torchvision_ops = import_torchvision()  # which timm imports
import timm  # noqa: E402
from timm.models.byobnet import MobileOneBlock  # noqa: E402

PAGE = ROOT / "docs" / "training.md"
COLUMNS = ("block", "input", "branches run", "merged first", "kept: run", "first")
POINTWISE = [(64, 56, 8), (128, 28, 8), (256, 14, 16), (512, 14, 8)]  # channels, rows and columns, images
DEPTHWISE = [(3, 64, 56, 8), (3, 256, 14, 16), (3, 96, 112, 4), (3, 512, 7, 32), (5, 64, 56, 8)]  # kernel, the same

NETWORKS = {"mobileone_s0": "MobileOne-S0, 4 branches", "mobileone_s1": "MobileOne-S1, 1 branch"}


def forms(kernel: int, channels: int) -> dict[str, nn.Module]:
    """A convolution, a norm and an activation; and blocks of four branches, a 1x1 and the identity in their place."""
    groups = channels if kernel > 1 else 1
    arguments: dict[str, Any] = {"padding": kernel // 2, "groups": groups}
    conv = nn.Conv2d(channels, channels, kernel, bias=False, **arguments)
    return {
        "plain": nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU()),
        "run": nn.Sequential(MobileOneBlock2d(channels, channels, kernel, online=False, **arguments), nn.ReLU()),
        "first": nn.Sequential(MobileOneBlock2d(channels, channels, kernel, online=True, **arguments), nn.ReLU()),
    }


def network(name: str, first: bool) -> nn.Module:
    """A network of timm; with its own blocks, or with `Branches` in the place of what they add up."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name)
    if not first:
        return model
    for path, block in list(model.named_modules()):
        if isinstance(block, MobileOneBlock):
            model.set_submodule(path, nn.Sequential(Branches(*_branches(block)), block.attn, block.act))
    return model


def _branches(block: Any) -> list[nn.Module]:
    convs = [*block.conv_kxk, block.conv_scale]
    branches: list[nn.Module] = [nn.Sequential(one.conv, _plain(one.bn)) for one in convs if one is not None]
    return branches if block.identity is None else [*branches, _plain(block.identity)]


def _plain(norm: Any) -> nn.Module:
    made = nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum)
    made.load_state_dict(norm.state_dict())
    return made


def in_turn(runs: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(rounds + 2):
        for name in list(runs) if index % 2 else reversed(runs):
            seconds = _seconds(runs[name], device)
            if index >= 2:
                samples[name].append(seconds)
    return samples


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def kept(model: nn.Module, x: torch.Tensor) -> int:
    """Bytes that a forward keeps for the gradients, beside parameters and its input."""
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    for tensor in (x, *model.parameters(), *model.buffers()):
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    del y
    return sum(storages.values())


def measure(models: dict[str, nn.Module], x: torch.Tensor, rounds: int, half: bool) -> dict[str, Any]:
    for model in models.values():
        model.to(x.device).train()

    def step(model: nn.Module) -> None:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
            y = model(x)
        y.float().square().mean().backward()

    runs = {name: (lambda model=model: step(model)) for name, model in models.items()}
    return {
        "seconds": in_turn(runs, rounds, x.device),
        "kept": {name: kept(model, x) for name, model in models.items()},
    }


def table(results: dict[str, Any]) -> list[list[str]]:
    rows = []
    for row in results["rows"]:
        base = "plain" if "plain" in row["seconds"] else "run"
        times = [str(ratio(row["seconds"], form, base)) if form != base else "1" for form in ("run", "first")]
        memory = [f"{row['kept'][form] / row['kept'][base]:.2f}" for form in ("run", "first")]
        rows.append([row["name"], row["input"], *times, *memory])
    return rows


def introduction(results: dict[str, Any]) -> str:
    on = results["machine"]
    return (
        f"Forward and all gradients, {results['precision']}, on {on['gpu'] or on['cpu']}, {on['threads']} threads, "
        f"torch {on['torch']}: times, and what is kept for the gradients, over those of a plain convolution, norm and "
        f"ReLU; of networks, over their own branches, merged first where the count says so. In brackets the middle "
        f"half of the ratios of {results['rounds']} rounds, of {max(3, results['rounds'] // 3)} of networks."
    )


def main(
    rounds: Annotated[int, typer.Option(help="Steps that count, of each form.")] = 9,
    half: Annotated[bool, typer.Option("--half", help="Autocast to bfloat16.")] = False,
    whole: Annotated[bool, typer.Option(help="Whole networks too.")] = True,
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    rows = []
    for kernel, channels, size, images in [*((1, *shape) for shape in POINTWISE), *DEPTHWISE]:
        x = torch.randn(images, channels, size, size, device=device, requires_grad=True)
        kind = f"depthwise {kernel}x{kernel}" if kernel > 1 else "pointwise"
        found = measure(forms(kernel, channels), x, rounds, half)
        rows.append({"name": f"{kind}, {channels} channels", "input": f"{images} x {size}x{size}", **found})
    if whole:
        x = torch.randn(4, 3, 224, 224, device=device)
        for name, title in NETWORKS.items():
            found = measure({"run": network(name, False), "first": network(name, True)}, x, max(3, rounds // 3), half)
            rows.append({"name": title, "input": "4 x 224x224", **found})
    results = {
        "machine": machine("timm"),
        "rounds": rounds,
        "precision": "bfloat16 autocast" if half else "float32",
        "rows": rows,
    }
    save(f"online-{device.type}{'-bfloat16' if half else ''}", results)
    if device.type == "cpu" and not half:
        write(PAGE, "benchmarks/online.py", f"{introduction(results)}\n\n{markdown(COLUMNS, table(results))}")
    show(introduction(results), COLUMNS, table(results))


if __name__ == "__main__":
    typer.run(main)
