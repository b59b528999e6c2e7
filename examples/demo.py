"""All five families in one small network: trained on handwritten digits, merged, proved, and measured."""

import statistics
import sys
import time
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import structrep
from structrep.blocks import ACBlock2d, DiracConv2d, DOConv2d, ExpandConv2d, ExpandLinear, RepVGGBlock2d

EPOCHS = 15
BATCH = 64


def digits_net() -> nn.Sequential:
    """A plain five-conv network, each conv grown into what one of the papers trains in its place."""
    return nn.Sequential(
        DOConv2d(1, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        RepVGGBlock2d(32, 32, 3, padding=1),  # with its norms inside, as in the paper
        nn.ReLU(),
        ACBlock2d(32, 64, 3, stride=2, padding=1),  # here too
        nn.ReLU(),
        DiracConv2d(64, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        ExpandConv2d(64, 64, 3, stride=2, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        ExpandLinear(64, 10),
    )


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (N, 1, 8, 8) in [0, 1] and labels (N,): three quarters to train on, a quarter to test on."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=0.25, random_state=0, stratify=labels)
    x, x_test, y, y_test = (torch.from_numpy(part) for part in parts)
    return x.float().view(-1, 1, 8, 8) / 16, y, x_test.float().view(-1, 1, 8, 8) / 16, y_test


def train(net: nn.Module, images: Tensor, labels: Tensor, console: Console) -> None:
    steps = EPOCHS * (len(images) // BATCH)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=steps)
    net.train()
    with Progress(console=console) as progress:
        bar = progress.add_task("training", total=steps)
        for epoch in range(EPOCHS):
            for batch in torch.randperm(len(images)).split(BATCH)[: len(images) // BATCH]:
                optimizer.zero_grad()
                loss = F.cross_entropy(net(images[batch]), labels[batch])
                loss.backward()
                optimizer.step()
                schedule.step()
                progress.update(bar, advance=1, description=f"epoch {epoch + 1}, loss {loss.item():.4f}")


class Executed(TorchDispatchMode):
    """Counts what a forward pass executes, on activations (whatever depends on x) and on weights alone."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.on_activations: Counter[str] = Counter()
        self.on_weights = 0
        self.activations = {id(x): x}  # kept alive, so that no id is used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(id(leaf) in self.activations for leaf in tree_leaves((args, kwargs))):
            self.on_activations[func.overloadpacket.__name__.strip("_")] += 1
            self.activations.update((id(leaf), leaf) for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        elif not func.is_view:  # a view computes nothing
            self.on_weights += 1
        return out


@torch.no_grad()
def size(net: nn.Module, x: Tensor) -> dict[str, int]:
    leaves = [module for module in net.modules() if not any(module.children())]
    with Executed(x) as executed:
        net(x)
    with FlopCounterMode(display=False) as flops:
        net(x)
    ran = executed.on_activations
    return {
        "layers": sum(not isinstance(leaf, nn.Identity) for leaf in leaves),
        "convolutions": ran["convolution"],
        "linear maps": ran["addmm"] + ran["mm"],
        "norms": sum(count for name, count in ran.items() if "batch_norm" in name),
        "additions": ran["add"],
        "operations on weights": executed.on_weights,
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "multiply-adds": flops.get_total_flops() // 2,
    }


@torch.no_grad()
def latencies(nets: tuple[nn.Module, nn.Module], x: Tensor, rounds: int = 60) -> tuple[float, float]:
    """Median milliseconds a forward pass; the two take turns, so that a busy machine slows both alike."""
    times: tuple[list[float], list[float]] = ([], [])
    for step in range(rounds + 10):
        for net, taken in zip(nets, times, strict=True):
            start = time.perf_counter()
            net(x)
            if step >= 10:  # the first ones warm up
                taken.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> int:
    console = Console()
    torch.set_num_threads(1)  # an 8x8 image is too small to share between threads
    torch.manual_seed(0)
    images, labels, test_images, test_labels = digits()
    net = digits_net()
    train(net, images, labels, console)
    net.eval()
    one, batch = test_images[:1], test_images[:BATCH]

    print(structrep.plan(net, batch))
    deploy = structrep.reparameterize(net, batch)
    verification = structrep.verify(net, deploy, batch)
    print(verification)

    with torch.no_grad():
        before, after = net(test_images).argmax(1), deploy(test_images).argmax(1)
    differing = int((before != after).sum())
    slow, fast = latencies((net, deploy), batch)

    table = Table("", "training-time", "deploy", title="One network, before and after")
    for column in table.columns[1:]:
        column.justify = "right"
    deploy_size = size(deploy, one)
    for name, count in size(net, one).items():
        table.add_row(name, f"{count:,}", f"{deploy_size[name]:,}")
    accuracies = [(predicted == test_labels).float().mean().item() for predicted in (before, after)]
    table.add_row("test accuracy", *(f"{accuracy:.2%}" for accuracy in accuracies))
    table.add_row("test images classed differently", "", f"{differing} of {len(test_labels)}")
    table.add_row(f"latency, batch of {BATCH}", f"{slow:.2f} ms", f"{fast:.2f} ms")
    table.add_row("times faster", "", f"{slow / fast:.2f}")
    table.caption = (
        "Counted from one forward pass on one image: operations on weights are run again on every pass; "
        "multiply-adds are those of convolutions and matrix products, on activations and on weights."
    )
    console.print(table)
    if differing:
        console.print(f"[red]the merged network classes {differing} test images differently")
        return 1
    return 0 if verification.ok else 1


if __name__ == "__main__":
    sys.exit(main())
