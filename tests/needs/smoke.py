"""What `make smoke` runs in the environment of an installed wheel: everything a user can do with it, once.

First with nothing but what the wheel depends on (`smoke.py bare`), then with extras. It knows nothing of the tests, and
imports nothing but torch and structrep.
"""

import importlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import torch
from torch import nn

import structrep

USER = """
import torch
from torch import nn

import structrep
from structrep.blocks import RepVGGBlock2d

model = nn.Sequential(RepVGGBlock2d(3, 8, 3, padding=1)).eval()
x = torch.randn(1, 3, 9, 9)
plan: structrep.Plan = structrep.plan(model, x)
reveal_type(plan)
reveal_type(plan.apply())
reveal_type(plan.merges)
reveal_type(structrep.reparameterize(model, x))
reveal_type(structrep.verify(model, model, x))
reveal_type(structrep.expand(model, "repvgg"))
reveal_type(structrep.explain(model, "0.dense.conv", "0.point.conv"))
reveal_type(structrep.testing.check_rule)
"""
REVEALED = [
    "structrep.convert.plan.Plan",
    "torch.nn.modules.module.Module",
    "tuple[structrep.records.plan.MergeRecord, ...]",
    "torch.nn.modules.module.Module",
    "structrep.records.verification.Verification",
    "torch.nn.modules.module.Module",
    "structrep.records.plan.Explanation",
    "def (rule: structrep.registry.Rule) -> list[str]",
]
LOADED = """
import sys
import torch

sys.path.insert(0, ".")
model = torch.load("deploy.pt", weights_only=False)
torch.testing.assert_close(model(torch.load("input.pt")), torch.load("output.pt"))
assert "structrep.deployed.methods" in sys.modules and "structrep.match" not in sys.modules, "it loads all of structrep"
"""
MYNET = """
from torch import nn

from structrep.blocks import ACBlock2d, RepVGGBlock2d


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = RepVGGBlock2d(3, 8, 3, padding=1)
        self.wide = ACBlock2d(8, 8, 3, padding=1)
        self.dense, self.point = nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = self.wide(self.block(x).relu()).relu()
        return self.dense(x) + self.point(x)
"""


COMMAND = str(Path(sys.executable).parent / "structrep")


def run(*command: str) -> str:
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, f"{' '.join(command)}\n{ended.stdout}{ended.stderr}"
    assert not ended.stderr, ended.stderr
    return ended.stdout


def bare() -> None:
    """Without numpy, which torch can do without, and so does all that needs no extra; the rest says what it needs."""
    for package in ("numpy", "safetensors", "onnxscript", "onnxruntime", "matplotlib"):
        assert importlib.util.find_spec(package) is None, f"{package} is there"
    model: nn.Module = importlib.import_module("mynet").Net().eval()
    torch.save(model.state_dict(), "trained.pt")
    record = structrep.convert_checkpoint("trained.pt", "converted.pt", model, torch.randn(2, 3, 9, 7))
    assert len(record.entries["(all)"].merges) == 3
    given = ("mynet:Net", "--shape", "1x3x9x9", "--weights", "trained.pt")
    for command in ("explain", "verify", "bench"):
        run(COMMAND, command, *given)
    for out in ("net.pt", "net.pt2"):
        run(COMMAND, "convert", *given, "--out", out)
        run(COMMAND, "verify", *given, "--file", out)
    deploy = structrep.reparameterize(model)
    deploy.load_state_dict(torch.load("net.pt"))
    plan = structrep.plan(model)
    plan.report("plain.html")
    for extra, package, options in (
        ("weights", "safetensors", ("--out", "n.safetensors")),
        ("onnx", "onnxscript", ("--out", "n.onnx")),
        ("plot", "matplotlib", ("--out", "n.pt", "--report", "n.html")),
    ):
        ended = subprocess.run((COMMAND, "convert", *given, *options), capture_output=True, text=True)
        told = f"error: there is no module named '{package}': pip install 'structrep[{extra}]'\n"
        assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", told), ended
    assert "pip install 'structrep[weights]'" in run(COMMAND, "doctor")


def library() -> None:
    x = torch.randn(2, 3, 9, 7)
    model: nn.Module = importlib.import_module("mynet").Net().eval()
    plan = structrep.plan(model, x)
    assert len(plan.merges) == 3, plan
    deploy = plan.apply()
    assert plan.verify(x, deploy).ok
    assert "repvgg" in str(plan)
    assert plan.draw().startswith("<svg")
    plan.report("report.html", x)
    assert Path("report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    structrep.assert_merged(structrep.reparameterize(model, x))
    wide = structrep.expand(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)).eval(), "repvgg")
    assert structrep.expand_layers(wide)
    torch.save(deploy, "deploy.pt")
    torch.save(x, "input.pt")
    torch.save(deploy(x).detach(), "output.pt")
    run(sys.executable, "-I", "-c", LOADED)


def command() -> None:
    version = metadata.version("structrep")
    assert run(COMMAND, "--version").strip() == version
    assert version in run(COMMAND, "doctor")
    assert '"repvgg"' in run(COMMAND, "rules", "--json")
    run(COMMAND, "convert", "mynet:Net", "--shape", "1x3x9x9", "--out", "net.pt", "--report", "net.html")
    run(COMMAND, "convert", "mynet:Net", "--shape", "1x3x9x9", "--out", "net.safetensors")
    run(COMMAND, "verify", "mynet:Net", "--shape", "1x3x9x9")


def types() -> None:
    Path("user.py").write_text(USER)
    told = run(sys.executable, "-I", "-m", "mypy", "--strict", "user.py")
    revealed = [line.split('Revealed type is "')[1].rstrip('"') for line in told.splitlines() if "Revealed" in line]
    assert revealed == REVEALED, told


if __name__ == "__main__":
    place = Path(structrep.__file__).parent
    assert place.is_relative_to(sys.prefix), f"structrep comes from {place}, not from {sys.prefix}"
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        sys.path.insert(0, folder)
        Path("mynet.py").write_text(MYNET)
        for check in (bare,) if sys.argv[1:] == ["bare"] else (library, command, types):
            check()
            print(f"{check.__name__}: ok")
        os.chdir("/")
