"""A small network, its data and its training: the same in one process and in several."""

import contextlib
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import structrep
from structrep.blocks import MobileOneBlock2d
from tests.support.models import settled

# every block that `expand` knows, with options that keep it small
OPTIONS: dict[str, dict[str, Any]] = {
    "repvgg": {},
    "acb": {},
    "dbb": {},
    "mobileone": {"branches": 2},
    "replknet": {"where": "large"},
    "diracnet": {},
    "doconv": {},
    "expandnet": {"rate": 2},
    "expandnet_linear": {"rate": 2},
    "orepa": {},
    "conv3xc": {},
    "ecbsr": {},
    "lora": {},
}
ACCUMULATED = ("repvgg", "dbb", "doconv")
STEPS = 2
CLASSES = 5


class Plain(nn.Module):
    """Convolutions with norms and without, one of them large and depthwise, and a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.large, self.norm = nn.Conv2d(4, 4, 7, padding=3, groups=4, bias=False), nn.BatchNorm2d(4)
        self.body = nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
            nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
            nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.body(F.relu(self.norm(self.large(x)) + x))
        return self.head(x.mean((2, 3)))


def expanded(block: str) -> nn.Module:
    """The network in float64, in training mode, with blocks: the same numbers in every process."""
    torch.manual_seed(0)
    model = structrep.expand(settled(Plain()).train(), block, **OPTIONS[block])
    with torch.no_grad():  # branches that start at zero get a part in it
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def even() -> nn.Module:
    """Blocks in float64, in training mode, of which processes get equal parts."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    layers += [nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    return structrep.expand(nn.Sequential(*layers).double(), "repvgg", where=["0", "3"])


def merged_first() -> nn.Module:
    """Blocks in float64, in training mode, whose branches are merged before they are run."""
    torch.manual_seed(0)
    depthwise = MobileOneBlock2d(3, 3, 3, padding=1, groups=3, branches=2, online=True)
    pointwise = MobileOneBlock2d(3, 6, 1, branches=2, online=True)
    layers = [depthwise, nn.ReLU(), pointwise, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES)]
    return nn.Sequential(*layers).double()


def batch(step: int, part: int) -> tuple[Tensor, Tensor]:
    """Images (8, 3, 8, 8) and labels (8,) of all processes together."""
    generator = torch.Generator().manual_seed(100 * step + part)
    x = torch.randn(8, 3, 8, 8, dtype=torch.float64, generator=generator)
    return x, torch.randint(CLASSES, (8,), generator=generator)


def loss_of(model: nn.Module, step: int = 0, part: int = 0) -> Tensor:
    """The mean loss of this process's share of a batch."""
    x, y = batch(step, part)
    own = slice(dist.get_rank(), None, dist.get_world_size()) if dist.is_initialized() else slice(None)
    dtype = next(model.parameters()).dtype
    return F.cross_entropy(model(x[own].to(dtype)).to(dtype), y[own])


def train(model: nn.Module, parts: int = 1) -> torch.optim.Optimizer:
    """SGD for `STEPS` steps; each gradient is of so many parts of a batch, and processes exchange it once."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(parts):
            waits = part + 1 < parts and hasattr(model, "no_sync")
            with model.no_sync() if waits else contextlib.nullcontext():
                (loss_of(model, step, part) / parts).backward()
        optimizer.step()
    return optimizer


class Average(torch.autograd.Function):
    """The mean over processes; its gradient is the mean of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return Average.forward(ctx, gradient)


class SyncedNorm(nn.BatchNorm2d):
    """What `nn.SyncBatchNorm` computes, which has no kernels for CPUs, of shares of equal size."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        shape = (1, -1, 1, 1)
        mean = Average.apply(x.mean((0, 2, 3)))
        var = Average.apply((x - mean.reshape(shape)).square().mean((0, 2, 3)))
        count = x.numel() // x.shape[1] * dist.get_world_size()
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
        scale = self.weight / torch.sqrt(var + self.eps)
        return x * scale.reshape(shape) + (self.bias - mean * scale).reshape(shape)


def sync_norms(model: nn.Module) -> nn.Module:
    """Norms that take the statistics of all processes, in the place of those that take their own's."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncedNorm
    return model
