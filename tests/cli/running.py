"""The command line as users meet it, called in this process, and the models that it is given."""

import hashlib
import importlib
import os
import sys
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed.checkpoint
from torch import Tensor, nn
from typer.testing import CliRunner, Result

from structrep.cli.app import app

NETS = """
import torch
from torch import nn

from structrep.blocks import RepVGGBlock2d

class Net(nn.Module):
    def __init__(self, width=8, bias=True):
        super().__init__()
        self.block = RepVGGBlock2d(3, width, 3, padding=1)
        self.head = nn.Conv2d(width, 4, 1, bias=bias)

    def forward(self, x):
        return self.head(self.block(x).relu())

class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)

    def forward(self, x):
        y = self.a(x)
        return (y + self.b(x)).relu()

class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = RepVGGBlock2d(3, 8, 3, padding=1), nn.Linear(5, 8)

    def forward(self, x, y):
        return self.one(x).mean((2, 3)) + self.other(y)

class Border(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 3, padding=1)

    def forward(self, x):
        return self.second(self.first(x))

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = Net(), nn.Conv2d(4, 4, 1)
        self.three = nn.Conv2d(4, 4, 1)
        self.three.weight = self.two.weight

    def forward(self, x):
        return self.three(self.two(self.one(x)).relu())

class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.LazyConv2d(8, 3)

    def forward(self, x):
        return self.conv(x)

class Loud(Net):
    def __init__(self):
        super().__init__()
        print("made a loud net")

instance = Net()
plain = nn.Conv2d(3, 8, 3)
number = 3

class Plain(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

def Wide():
    import structrep
    return structrep.expand(Plain(), "repvgg")

def empty():
    return nn.Sequential()

class Space:
    net = Net

def broken():
    raise RuntimeError("no luck\\nat all")

def leaves():
    raise SystemExit(0)

def none():
    return None
"""


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    # anything but an exit would be a traceback
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert "Traceback" not in result.output
    return result


def files(folder: Path) -> dict[str, str]:
    """Every file in a folder and what is in it; links as what they point to."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


def failed(code: int, *arguments: object) -> str:
    """What the command says on failing, having changed no file."""
    before = files(Path.cwd())
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert not result.stdout
    assert files(Path.cwd()) == before
    return result.stderr


def randomized(model: nn.Module) -> nn.Module:
    """In eval mode and as if trained: no weight, shift or statistic is at its start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape, generator=generator) * (1.0 if "running_var" in name else 0.1))
    return model.eval()


def read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return dict(safetensors.torch.load_file(path))
    return dict(torch.load(path, weights_only=True))


def local(name: str) -> nn.Module:
    """A module of `nets`, in the current folder."""
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    model: nn.Module = getattr(importlib.import_module("nets"), name)()
    return model
