"""The commands, as a user meets them: what they print, the files they write, and what they say to bad input."""

import hashlib
import importlib
import io
import json
import os
import pickle
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torch.distributed.checkpoint
import torchvision
import transformers
from torch import Tensor, nn
from typer.testing import CliRunner, Result

import structrep
from structrep import __main__, registry
from structrep.cli import models
from structrep.cli.app import _working, app
from structrep.cli.commands import RulesRecord
from structrep.cli.doctor import DoctorRecord
from structrep.deliver import formats
from structrep.deliver.formats import PROGRAMS, SUFFIXES, checksum
from structrep.records.delivery import ExportRecord
from structrep.records.latency import LatencyRecord
from structrep.records.plan import PlanRecord
from structrep.records.verification import Verification

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


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current folder of its own, with a module `nets`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "fails.py").write_text("import surely_not_installed\n")
    (tmp_path / "wrong.py").write_text("def net(:\n")
    yield tmp_path
    for name in set(sys.modules) - before:
        if Path(str(getattr(sys.modules[name], "__file__", ""))).parent == tmp_path:
            del sys.modules[name]


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


# --- rules and explain --------------------------------------------------------------------------------------------


def test_rules_shows_every_rule() -> None:
    result = run("rules")
    assert result.exit_code == 0
    assert len(registry.default) > 5
    for rule in registry.default:
        assert rule.name in result.stdout
        assert rule.source in result.stdout
    assert "[identity: [pad] -> (affine or x)]" in result.stdout  # not taken for markup


def test_rules_as_json() -> None:
    record = RulesRecord.model_validate_json(run("rules", "--json").stdout)
    rules = list(registry.default)
    assert [rule.name for rule in record.rules] == [rule.name for rule in rules]
    assert [rule.pattern for rule in record.rules] == [str(rule.pattern) for rule in rules]
    assert [rule.kind for rule in record.rules] == ["law" if rule.law else "family" for rule in rules]


@pytest.mark.parametrize(
    ("source", "merges"),
    [
        ("timm:resnet10t", 14),
        ("torchvision:resnet18", 20),
        ("nets:Net", 1),
        ("nets:instance", 1),
        ("nets:Space.net", 1),
    ],
)
def test_explain(here: Path, source: str, merges: int) -> None:
    result = run("explain", source)
    assert result.exit_code == 0, result.output
    assert f"{merges} merge" in result.stdout
    assert ("fold_norm" if ":resnet" in source else "repvgg") in result.stdout
    assert not result.stderr


def test_explain_as_json_is_the_plan(here: Path) -> None:
    result = run("explain", "nets:Net", "--json", "--shape", "2x3x9x7", "--arg", "width=16", "--arg", "bias=False")
    record = PlanRecord.model_validate_json(result.stdout)
    (merge,) = record.merges
    assert (merge.where, merge.rules) == ("block", ("repvgg",))
    assert merge.parameters[1] == 16 * 3 * 9 + 16
    again = structrep.plan(sys.modules["nets"].Net(16, False).eval()).record
    but_for_weights = {"merges": {"__all__": {"largest"}}}
    assert again.model_dump(exclude=but_for_weights) == record.model_dump(exclude=but_for_weights)


def test_explain_shows_edits_as_a_patch(here: Path) -> None:
    rows = run("explain", "nets:Branches", "--diff").stdout.splitlines()
    assert rows[:2] == ["--- a/nets.py", "+++ b/nets.py"]
    assert [row for row in rows[2:] if row[0] in "+-"] == [
        "-        y = self.a(x)",
        "-        return (y + self.b(x)).relu()",
        "+        return self.reparam_conv(x).relu()",
    ]
    assert run("explain", "nets:Net", "--diff").stdout == ""
    assert "1 merge (1 by edits of forwards)" in run("explain", "nets:Branches").stdout


def test_explain_shows_refusals(here: Path) -> None:
    result = run("explain", "nets:Border")
    assert result.exit_code == 0
    assert "0 merges" in result.stdout
    assert "Inexact" in result.stdout


def test_explain_tells_of_two_layers_why_they_do_not_merge(here: Path) -> None:
    result = run("explain", "nets:Border", "--why", "first", "second")
    assert "first and second: (conv 1x1 -> conv 3x3) is not merged (Inexact)" in result.stdout
    assert json.loads(run("explain", "nets:Border", "--why", "first", "second", "--json").stdout)["second"] == "second"
    assert "no module named 'third'" in failed(2, "explain", "nets:Border", "--why", "first", "third")


def test_several_inputs(here: Path) -> None:
    assert run("explain", "nets:Pair", "--shape", "2x3x8x8", "--shape", "2x5").exit_code == 0
    assert "Pair does not accept inputs" in failed(2, "explain", "nets:Pair", "--shape", "2x3x8x8", "--shape", "2x6")


def test_rules_limits_to_some(here: Path) -> None:
    assert "repvgg" in run("explain", "nets:Net", "--rules", "repvgg", "--rules", "acb").stdout
    assert "0 merges" in run("explain", "nets:Net", "--rules", "acb").stdout


def test_a_rule_of_the_sources_module(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.default, "_rules", dict(registry.default._rules))
    (here / "mine.py").write_text(
        "import structrep\n"
        "from structrep.pattern import Sum, conv_norm, spatial\n"
        "from torch import nn\n"
        "@structrep.rule(Sum(conv_norm(spatial).named('a'), conv_norm(spatial).named('b')), source='here')\n"
        "def twins(a, b):\n"
        "    return a + b\n"
        "class Twins(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)\n"
        "    def forward(self, x):\n"
        "        return self.a(x) + self.b(x)\n"
    )
    assert "twins" in run("explain", "mine:Twins", "--rules", "twins").stdout


def test_what_a_model_prints_stays_out_of_the_record(here: Path) -> None:
    result = run("explain", "nets:Loud", "--json")
    assert json.loads(result.stdout)["model"] == "Loud"
    assert "made a loud net" in result.stderr


def test_runs_as_a_module(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["structrep", "rules", "--json"])
    monkeypatch.delitem(sys.modules, "structrep.__main__")
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module("structrep", run_name="__main__")
    assert not exit_.value.code
    assert json.loads(capsys.readouterr().out)["rules"]


def test_version_and_help() -> None:
    assert run("--version").stdout.strip()
    assert "Exit codes: 0 done; 1 refused" in run("--help").stdout


@pytest.mark.parametrize(
    ("words", "completions"),
    [
        ("con", ["convert"]),
        ("explain\n", ["timm:", "torchvision:", "hf:"]),
        ("explain\nhf", ["hf:"]),
        ("explain\ntorchvision\n:\nresnet1", ["resnet101", "resnet152", "resnet18"]),  # bash parts words at colons
        ("explain\ntorchvision:resnet1", [f"torchvision:resnet{n}" for n in (101, 152, 18)]),  # or is told not to
        ("explain\ntimm\n:\nx\n--rules\nacb\n--rules\nmob", ["mobileone", "mobileone_pointwise"]),
        ("convert\nx\n--norms\n", ["fold", "keep"]),
    ],
)
def test_completion_in_bash(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str, completions: list[str]
) -> None:
    monkeypatch.setenv("_STRUCTREP_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", f"structrep\n{words}")
    monkeypatch.setenv("COMP_CWORD", str(words.count("\n") + 1))
    __main__.main()
    assert sorted(capsys.readouterr().out.split()) == sorted(completions)


def test_completion_is_installed_for_bash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    result = CliRunner().invoke(app, ["--install-completion", "bash"], prog_name="structrep")
    assert result.exit_code == 0, result.output
    (script,) = (path for path in tmp_path.rglob("*") if path.is_file() and "structrep" in path.name)
    assert "_STRUCTREP_COMPLETE=complete_bash" in script.read_text()


# --- convert ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    ("source", "make", "shape"),
    [
        ("timm:resnet10t", lambda: timm.create_model("resnet10t"), (1, 3, 33, 40)),
        ("torchvision:resnet18", lambda: torchvision.models.resnet18(), (1, 3, 33, 40)),
        ("nets:Net", lambda: local("Net"), (2, 3, 9, 7)),
        ("nets:Tied", lambda: local("Tied"), (2, 3, 9, 7)),
    ],
)
def test_round_trip(
    here: Path, source: str, make: Callable[[], nn.Module], shape: tuple[int, ...], suffix: str
) -> None:
    trained, weights, out = randomized(make()), here / f"trained{suffix}", here / f"deploy{suffix}"
    if suffix == ".pt":
        torch.save(trained.state_dict(), weights)
    else:
        safetensors.torch.save_file({key: value.clone() for key, value in trained.state_dict().items()}, weights)
    result = run("convert", source, "--weights", weights, "--out", out, "--shape", "x".join(map(str, shape)))
    assert result.exit_code == 0, result.output
    assert "outputs compared on" in result.stdout

    deploy = structrep.reparameterize(make().eval())
    deploy.load_state_dict(read(out))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    assert structrep.verify(trained, deploy, x).ok
    assert len(deploy.state_dict()) < len(trained.state_dict())
    assert set(files(here)) == {"nets.py", "fails.py", "wrong.py", weights.name, out.name}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("source", "shape", "more"), [("nets:Net", (2, 3, 9, 7), 5), ("timm:repvgg_a0", (1, 3, 64, 64), 3)]
)
def test_what_was_written_says_what_it_is_and_holds(
    here: Path, source: str, shape: tuple[int, ...], more: int, suffix: str
) -> None:
    trained = randomized(local("Net") if source == "nets:Net" else timm.create_model("repvgg_a0"))
    torch.save(trained.state_dict(), here / "trained.pt")
    given = [source, "--weights", "trained.pt"]
    out, size = f"net{suffix}", "x".join(map(str, shape))
    result = run("convert", *given, "--out", out, "--shape", size, "--json")
    assert result.exit_code == 0, result.output
    written = ExportRecord.model_validate_json(result.stdout)
    record = formats.read(here / out).record
    assert record == written.provenance
    assert record.weights_sha256 == checksum(trained)
    assert record.versions["torch"] == torch.__version__
    assert sum(record.rules.values()) == written.merges > 0
    assert record.verification is not None
    assert record.verification.ok
    assert (written.runtime is not None) == (suffix in PROGRAMS)
    size = "x".join(map(str, (more, *shape[1:])))  # another batch than it was made with
    result = run("verify", *given, "--file", out, "--shape", size, "--json")
    assert result.exit_code == 0, result.output
    assert Verification.model_validate_json(result.stdout).outputs[0].shape[0] == more
    said = failed(2, "verify", source, "--file", out, "--shape", size)
    assert "was made of other weights" in said


def test_a_file_that_differs_is_found(here: Path) -> None:
    torch.save(local("Net").state_dict(), here / "trained.pt")
    given = ["nets:Net", "--weights", "trained.pt", "--shape", "2x3x9x7"]
    assert run("convert", *given, "--out", "net.pt").exit_code == 0
    state = torch.load(here / "net.pt")
    state["head.bias"] += 1e-3
    torch.save(state, here / "net.pt")
    result = run("verify", *given, "--file", "net.pt")
    assert result.exit_code == 1
    assert "OFF" in result.stdout
    assert "net.pt differs from the original by more than rounding" in result.stderr


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("nowhere.pt", None, "nowhere.pt is not there: give a file"),
        ("nowhere.onnx", None, "nowhere.onnx is not there: give a file"),
        (".", None, "has the suffix '': convert writes .safetensors, .pt, .pt2, .onnx"),
        ("nets.py", None, "has the suffix '.py': convert writes"),
        ("bad.pt", b"no program", "bad.pt is damaged, or no torch file"),
        ("bad.safetensors", b"no program", "bad.safetensors is damaged, or no safetensors file"),
        ("bad.pt2", b"no program", "bad.pt2: it is no program of torch.export"),
        ("bad.onnx", b"no program", "bad.onnx: onnxruntime cannot run it"),
    ],
)
def test_files_to_verify_that_are_none(here: Path, name: str, content: bytes | None, said: str) -> None:
    if content is not None:
        (here / name).write_bytes(content)
    message = failed(2, "verify", "nets:Net", "--shape", "2x3x9x7", "--file", name)
    assert said in message
    assert "weights_only" not in message
    assert "Traceback" not in message


@pytest.mark.parametrize("suffix", PROGRAMS)
def test_a_program_is_read_once(here: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    torch.save(local("Net").state_dict(), here / "trained.pt")
    given = ["nets:Net", "--weights", "trained.pt", "--shape", "2x3x9x7"]
    assert run("convert", *given, "--out", f"net{suffix}").exit_code == 0
    reads, read = [], Path.read_bytes

    def counted(path: Path) -> bytes:
        reads.append(path.name)
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", counted)
    result = run("verify", *given, "--file", f"net{suffix}")
    assert result.exit_code == 0, result.output
    assert reads.count(f"net{suffix}") == 1
    assert not result.stderr  # torch warns of its own deprecations


@pytest.mark.parametrize(
    "option",
    [["--dtype", "float16"], ["--autocast", "bfloat16"], ["--device", "cuda"], ["--channels-last"], ["--tf32"]],
)
def test_an_onnx_program_runs_as_it_was_written(here: Path, option: list[str]) -> None:
    message = failed(2, "verify", "nets:Net", "--shape", "2x3x9x7", "--file", "net.onnx", *option)
    assert f"so {option[0]} says nothing of it: leave that out, or verify a .pt2 file" in message


def test_norms_that_were_kept_are_verified_so(here: Path) -> None:
    torch.save(local("Wide").state_dict(), here / "wide.pt")
    given = ["nets:Wide", "--weights", "wide.pt", "--shape", "2x3x9x7"]
    assert run("convert", *given, "--out", "net.pt", "--norms", "keep").exit_code == 0
    result = run("verify", *given, "--file", "net.pt", "--norms", "keep", "--json")
    assert result.exit_code == 0, result.output
    assert Verification.model_validate_json(result.stdout).ok
    assert "net.pt does not fit" in failed(2, "verify", *given, "--file", "net.pt")
    assert "give 'fold' or 'keep'" in failed(2, "verify", *given, "--norms", "lose")


def test_dtypes_and_devices(here: Path) -> None:
    given = ["verify", "nets:Net", "--shape", "2x3x9x7"]
    result = run(*given, "--dtype", "bfloat16", "--channels-last", "--device", "cpu", "--json")
    assert result.exit_code == 0, result.output
    record = Verification.model_validate_json(result.stdout)
    assert (record.dtype, record.channels_last, record.device) == ("bfloat16", True, "cpu")
    assert "is no floating-point dtype" in failed(2, *given, "--dtype", "int8")
    assert "--device 'nowhere' cannot be used" in failed(2, *given, "--device", "nowhere")
    assert "torch has no autocast to float64 on cpu" in failed(2, *given, "--autocast", "float64", "--device", "cpu")
    assert "give its --shape" in failed(2, "verify", "nets:Net")


def test_reports_and_files_stay_apart(here: Path) -> None:
    given = ["convert", "nets:Net", "--shape", "2x3x9x7"]
    assert "are the same file" in failed(2, *given, "--out", "a.pt", "--report", "a.pt")
    assert run(*given, "--out", "a.pt", "--report", "a.html").exit_code == 0
    assert (here / "a.html").read_text().startswith("<!DOCTYPE html>")
    assert "exists" in failed(2, *given, "--out", "b.pt", "--report", "a.html")
    assert "give it with --weights" in failed(2, *given, "--out", "b.pt", "--entry", "ema")


def test_inputs_that_have_no_batch_in_common(here: Path) -> None:
    result = run("convert", "nets:Pair", "--out", "pair.pt2", "--shape", "2x3x9x7", "--shape", "1x5")
    assert result.exit_code == 0, result.output
    result = run("verify", "nets:Pair", "--shape", "2x3x9x7", "--shape", "1x5")
    assert result.exit_code == 0, result.output


def test_half_precision(here: Path) -> None:
    torch.save(local("Net").half().state_dict(), here / "half.pt")
    for command in (["bench"], ["convert", "--out", "half.onnx"]):
        result = run(command[0], "nets:Net", *command[1:], "--weights", "half.pt", "--shape", "2x3x9x7")
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize("record", ["garbage", "{}", "[1]", '{"source": 1}'])
def test_records_that_are_damaged(here: Path, record: str) -> None:
    state = structrep.reparameterize(local("Net").eval()).state_dict()
    safetensors.torch.save_file(state, here / "net.safetensors", {"structrep": record})
    assert "net.safetensors has a record that is damaged" in failed(
        2, "verify", "nets:Net", "--shape", "2x3x9x7", "--file", "net.safetensors"
    )


def test_bench(here: Path) -> None:
    result = run("bench", "nets:Net", "--shape", "2x3x9x7", "--rounds", "3", "--json")
    assert result.exit_code == 0, result.output
    record = LatencyRecord.model_validate_json(result.stdout)
    assert list(record.models) == ["training-time", "deploy"]
    assert all(len(one.seconds) == 3 for one in record.models.values())
    assert record.models["training-time"].faster == 1
    assert "times as fast" in run("bench", "nets:Net", "--shape", "2x3x9x7", "--rounds", "1").stdout
    assert "does not accept inputs of shape" in failed(2, "bench", "nets:Net", "--shape", "2x5x9x7")


def test_doctor(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("doctor", "--json")
    assert result.exit_code == 0, result.output
    record = DoctorRecord.model_validate_json(result.stdout)
    assert not any(record.rules.values())
    assert {part.package for part in record.parts if part.version} >= {"torch", "timm", "onnxruntime"}
    for package in ("timm", "numpy"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr("structrep.cli.doctor.registry.resolve", lambda rules: iter(()))
    told = run("doctor").stdout.replace("\n", " ")
    assert "there is no module named 'timm'" in told
    assert "there is no module named 'numpy'" in told


def test_models_in_files(here: Path) -> None:
    net = local("Net").eval()
    batch = torch.export.Dim("batch")
    torch.export.save(torch.export.export(net, (torch.randn(2, 3, 9, 7),), dynamic_shapes=({0: batch},)), "net.pt2")
    result = run("convert", "net.pt2", "--out", "deploy.onnx", "--shape", "2x3x9x7")
    assert result.exit_code == 0, result.output
    torch.save(net, "module.pt")
    assert "say --trusted" in failed(2, "explain", "module.pt")
    assert run("explain", "module.pt", "--trusted").exit_code == 0
    torch.save(net.state_dict(), "state.pt")
    assert "not an nn.Module: name the model" in failed(2, "explain", "state.pt", "--trusted")
    (here / "broken.pt2").write_text("no program")
    assert "is no program of torch.export" in failed(2, "explain", "broken.pt2")
    assert "is not there" in failed(2, "explain", "none.pt2")


def test_models_of_transformers(here: Path) -> None:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    model = randomized(transformers.ResNetForImageClassification(config))
    model.save_pretrained(here / "resnet")
    result = run("convert", "hf:resnet", "--out", "deploy.pt", "--shape", "1x3x32x32")
    assert result.exit_code == 0, result.output
    assert formats.read(here / "deploy.pt").record.weights_sha256 == checksum(model)  # type: ignore[union-attr]
    assert run("explain", "hf:resnet/config.json").exit_code == 0
    assert "allow a download, --download" in failed(2, "explain", "hf:microsoft/resnet-50")
    (here / "empty").mkdir()
    assert "transformers makes no model of empty" in failed(2, "explain", "hf:empty")


def test_residuals_and_norms(here: Path) -> None:
    assert "norms='keep' gives back a model that structrep.expand" in failed(
        2, "convert", "nets:Net", "--out", "net.pt", "--norms", "keep"
    )
    assert "give 'fold' or 'keep'" in failed(2, "convert", "nets:Net", "--out", "net.pt", "--norms", "lose")
    assert run("convert", "nets:Wide", "--out", "net.pt", "--norms", "keep").exit_code == 0
    assert set(read(here / "net.pt")) == set(local("Plain").state_dict())
    assert "the model has no module named 'x'" in failed(2, "explain", "nets:Net", "--reserve", "x")


def test_without_a_shape_every_merge_is_proved(here: Path) -> None:
    result = run("convert", "nets:Net", "--out", "net.pt")
    assert result.exit_code == 0
    assert "every merge proved on its own" in result.stdout
    assert "not proved" in run("convert", "nets:Net", "--out", "again.pt", "--no-verify").stdout


def test_a_file_is_replaced_only_by_force(here: Path) -> None:
    out = here / "net.pt"
    out.write_text("precious")
    assert "net.pt exists: force its replacement (--force" in failed(2, "convert", "nets:Net", "--out", out)
    assert run("convert", "nets:Net", "--out", out, "--force").exit_code == 0
    assert "head.weight" in read(out)


def test_a_link_goes_on_pointing_where_it_did(here: Path) -> None:
    (here / "store").mkdir()
    (here / "net.pt").symlink_to(here / "store" / "real.pt")
    assert run("convert", "nets:Net", "--out", "net.pt").exit_code == 0
    assert (here / "net.pt").is_symlink()
    assert "head.weight" in read(here / "store" / "real.pt")


def test_files_may_be_read_by_whom_the_umask_lets(here: Path) -> None:
    (here / "plain").write_text("")
    for suffix in SUFFIXES:
        assert run("convert", "nets:Net", "--out", f"net{suffix}", "--shape", "2x3x9x9").exit_code == 0
        assert (here / f"net{suffix}").stat().st_mode == (here / "plain").stat().st_mode


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_write_that_fails_midway_leaves_the_old_file(
    here: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    (here / f"net{suffix}").write_text("precious")
    monkeypatch.setattr(os, "fsync", full)
    said = failed(2, "convert", "nets:Net", "--out", f"net{suffix}", "--force", "--shape", "2x3x9x9")
    assert "could not be written: OSError: [Errno 28] No space left" in said


def test_a_file_that_appears_meanwhile_is_not_replaced(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apply = structrep.Plan.apply

    def meanwhile(plan: structrep.Plan) -> nn.Module:
        (here / "net.pt").write_text("precious")
        return apply(plan)

    monkeypatch.setattr(structrep.Plan, "apply", meanwhile)
    assert run("convert", "nets:Net", "--out", "net.pt").exit_code == 2
    assert (here / "net.pt").read_text() == "precious"
    assert not list(here.glob(".net*"))


def test_a_failed_proof_writes_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apply = structrep.Plan.apply

    def wrongly(plan: structrep.Plan) -> nn.Module:
        deploy = apply(plan)
        deploy.head.bias.data += 1.0  # type: ignore[operator, union-attr]
        return deploy

    (here / "net.pt").write_text("precious")
    monkeypatch.setattr(structrep.Plan, "apply", wrongly)
    said = failed(1, "convert", "nets:Net", "--out", "net.pt", "--force", "--shape", "1x3x8x8")
    assert said.startswith("refused: the merged model differs from the original by more than rounding")


@pytest.mark.parametrize("method", ["prove", "apply", "verify"])
def test_an_interrupt_ends_in_a_sentence_and_leaves_no_file(
    here: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(structrep.Plan, method, interrupted)
    said = failed(130, "convert", "nets:Net", "--out", "net.pt", "--shape", "1x3x8x8")
    assert said == "interrupted: before the command was done\n"


@pytest.mark.parametrize("quiet", [False, True])
def test_a_terminal_sees_what_is_done_but_beside_a_record(monkeypatch: pytest.MonkeyPatch, quiet: bool) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with _working("merging", quiet):
        pass
    assert ("merging" in sys.stderr.getvalue()) != quiet  # type: ignore[attr-defined]


def test_nothing_to_merge_is_said_with_the_reasons(here: Path) -> None:
    assert "there is nothing to merge in Sequential" in failed(1, "convert", "nets:empty", "--out", "net.pt")
    assert "nothing to merge" in failed(1, "convert", "nets:plain", "--out", "net.pt")
    assert "or padded with it, the two would be one" in failed(1, "convert", "nets:Border", "--out", "net.pt")


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nets"], "write timm:NAME, torchvision:NAME, hf:PATH, package.module:callable"),
        ([""], "names no model"),
        ([":Net"], "names no model"),
        (["nets:"], "names no model"),
        (["timm:resnet10"], "did you mean"),
        (["timm:hf-hub:timm/resnet18.a1_in1k"], "timm has no model named"),
        (["torchvision:resnet19"], "did you mean resnet18"),
        (["nets:Nut"], "nets has nothing named 'Nut': did you mean Net?"),
        (["nets:Space.nat"], "nothing named 'Space.nat': did you mean net?"),
        (["nets.py:Net"], "without .py"),
        (["./nets:Net"], "without .py or slashes"),
        (["neets:Net"], "no module named 'neets'"),
        (["nets.inner:Net"], "no module named 'nets.inner'"),
        (["fails:Net"], "fails is there but cannot be imported: ModuleNotFoundError"),
        (["wrong:net"], "wrong is there but cannot be imported: SyntaxError"),
        (["nets:number"], "an object of type int: neither an nn.Module nor"),
        (["nets:none"], "gave an object of type NoneType, not an nn.Module"),
        (["nets:broken"], "could not be made: RuntimeError: no luck\n"),
        (["nets:leaves"], "could not be made: SystemExit"),
        (["nets:Lazy"], "has no shape yet"),
        (["nets:Net", "--arg", "depth=2"], "could not be made: TypeError"),
        (["nets:Net", "--arg", "width"], "write --arg name=value"),
        (["nets:Net", "--arg", "=2"], "write --arg name=value"),
        (["nets:Net", "--arg", "bias=false"], "\"bias='text'\""),
        (["nets:Net", "--arg", "width=__import__('os')"], "no Python literal"),
        (["nets:Net", "--arg", "width=1", "--arg", "width=2"], "gives 'width' twice"),
        (["nets:instance", "--arg", "width=2"], "is a module already"),
        (["timm:resnet10t", "--arg", "pretrained=True"], "would download weights"),
        (["torchvision:resnet18", "--arg", "weights='DEFAULT'"], "would download weights"),
        (["nets:Net", "--shape", "1x3x8x"], "write positive numbers"),
        (["nets:Net", "--shape", "1,3,8,8"], "write positive numbers"),
        (["nets:Net", "--shape", "0x3x8x8"], "write positive numbers"),
        (["nets:Net", "--shape", "-1x3x8x8"], "write positive numbers"),
        (["nets:Net", "--shape", "1x3x999999999x999999999"], "memory does not hold"),
        (["nets:Net", "--shape", "1x4x8x8"], "Net does not accept inputs of shape [(1, 4, 8, 8)]"),
        (["nets:Net", "--rules", "repvg"], "did you mean 'repvgg'?"),
        (["nets:Net", "--weights", "nowhere.pt"], "nowhere.pt is not there"),
        (["nets:Net", "--weights", "."], ". is no folder of torch.distributed.checkpoint"),
    ],
)
def test_bad_input(here: Path, arguments: list[str], said: str) -> None:
    for command in (["explain"], ["convert", "--out", "net.pt"]):
        message = failed(2, *command, *arguments)
        assert message.startswith("error: ")
        assert said in message


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("net.bin", ".safetensors, .pt, .pt2, .onnx are supported"),
        ("net", ".safetensors, .pt, .pt2, .onnx are supported"),
        ("net.PT", ".safetensors, .pt, .pt2, .onnx are supported"),
        ("nowhere/net.pt", "there is no folder"),
        ("folder.pt", "is a folder"),
        ("net.onnx", "is made from an example input: give its --shape"),
        ("net.pt2", "is made from an example input: give its --shape"),
    ],
)
def test_bad_out(here: Path, out: str, said: str) -> None:
    (here / "folder.pt").mkdir()
    assert said in failed(2, "convert", "nets:Net", "--out", out)


@pytest.mark.parametrize(
    "arguments", [["convert", "nets:Net"], ["explain"], ["explain", "a:b", "c:d"], ["explode"], ["rules", "--verbose"]]
)
def test_bad_usage(here: Path, arguments: list[str]) -> None:
    assert "Usage:" in failed(2, *arguments)


class _Attack:
    """Pickled, it makes a file when unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, ...]]:
        return os.system, ("touch attacked",)


def _content(name: str) -> bytes:
    """The bytes of a bad weights file."""
    state = {"weight": torch.zeros(3)}
    if name.startswith("truncated"):
        path = Path("whole")
        if name.endswith(".pt"):
            torch.save(state, path)
        else:
            safetensors.torch.save_file(state, path)
        content = path.read_bytes()
        path.unlink()
        return content[: len(content) * 2 // 3]
    if name == "legacy_attack.pt":
        return pickle.dumps(_Attack(), protocol=2)
    return {"empty": b"", "text": b"not weights\n" * 20}[name.split(".")[0]]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("empty.pt", "is damaged, or no torch file"),
        ("text.pt", "is damaged, or no torch file"),
        ("text.other", "is damaged, or no torch file"),
        ("truncated.pt", "is damaged, or no torch file"),
        ("empty.safetensors", "is damaged, or no safetensors file"),
        ("text.safetensors", "is damaged, or no safetensors file"),
        ("truncated.safetensors", "is damaged, or no safetensors file"),
        ("legacy_attack.pt", f"it asks for {os.name}.system"),
    ],
)
def test_bad_weights(here: Path, name: str, said: str) -> None:
    (here / name).write_bytes(_content(name))
    message = failed(2, "convert", "nets:Net", "--weights", name, "--out", "net.pt")
    assert said in message
    assert "weights_only" not in message  # torch's advice is to read the file unsafely
    assert not (here / "attacked").exists()


def test_a_file_with_code_in_it_runs_none(here: Path) -> None:
    torch.save({"weight": torch.zeros(3), "extra": _Attack()}, here / "attack.pt")
    message = failed(2, "explain", "nets:Net", "--weights", "attack.pt")
    assert f"it asks for {os.name}.system" in message
    assert not (here / "attacked").exists()
    torch.save(local("Net"), here / "module.pt")
    assert "it asks for nets.Net" in failed(2, "explain", "nets:Net", "--weights", "module.pt")


def test_keys_that_differ_are_listed_on_both_sides(here: Path) -> None:
    state = {f"module.{key}": value for key, value in local("Net").state_dict().items()}
    del state["module.block.dense.conv.weight"]
    torch.save({**state, "head.bias": torch.zeros(5)}, here / "wrapped.pt")
    message = failed(2, "explain", "nets:Net", "--weights", "wrapped.pt")
    assert "wrapped.pt does not fit Net" in message
    assert "only in the model: block.dense.conv.weight" in message
    torch.save({"module.odd": torch.zeros(5), "head.bias": torch.zeros(5)}, here / "other.pt")
    message = failed(2, "explain", "nets:Net", "--weights", "other.pt")
    assert "only in the model: block.dense.conv.weight," in message
    assert "only in the file: module.odd" in message
    assert "of another shape: head.bias 4 in the model, 5 in the file" in message


def test_a_checkpoint_gives_its_only_state_dict(here: Path) -> None:
    state = local("Net").state_dict()
    torch.save({"epoch": 3, "state_dict": state, "optimizer": {"lr": 0.1}}, here / "one.pt")
    assert run("explain", "nets:Net", "--weights", "one.pt").exit_code == 0
    torch.save({"model": state, "ema": state}, here / "two.pt")
    assert "holds 2 state dicts of the model: name an entry, model or ema" in failed(
        2, "explain", "nets:Net", "--weights", "two.pt"
    )
    assert run("explain", "nets:Net", "--weights", "two.pt", "--entry", "ema").exit_code == 0
    torch.save([1, 2], here / "list.pt")
    assert "an object of type list but no state dict" in failed(2, "explain", "nets:Net", "--weights", "list.pt")


def test_weights_as_others_write_them(here: Path) -> None:
    trained = randomized(local("Net"))
    state, deploy = trained.state_dict(), structrep.reparameterize(trained)
    counters = [name for name in state if name.endswith("tracked")]
    (here / "many").mkdir()
    for file, names in (("a", list(state)[::2]), ("b", list(state)[1::2])):
        safetensors.torch.save_file({name: state[name] for name in names}, here / "many" / f"{file}.safetensors")
    places = {name: f"{'ab'[index % 2]}.safetensors" for index, name in enumerate(state)}
    (here / "many" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    torch.save({name: value for name, value in state.items() if name not in counters}, here / "bare.pt")
    torch.save(state | {"total_ops": torch.zeros(1)}, here / "thop.pt")
    torch.save(state | {name: state[name].half() for name in counters}, here / "half.pt")
    for weights in ("bare.pt", "thop.pt", "half.pt", "many", "many/model.safetensors.index.json"):
        result = run("convert", "nets:Net", "--weights", weights, "--out", "net.pt", "--force")
        assert result.exit_code == 0, result.output
        assert all(torch.equal(value, deploy.state_dict()[name]) for name, value in read(here / "net.pt").items())
    torch.save(deploy.state_dict(), here / "deploy.pt")
    assert "of the deploy form already" in failed(2, "explain", "nets:Net", "--weights", "deploy.pt")
    torch.save(local("Plain").state_dict(), here / "plain.pt")
    assert "load them before expand" in failed(2, "explain", "nets:Wide", "--weights", "plain.pt")


def test_a_checkpoint_with_more_than_tensors_is_read_if_it_is_trusted(here: Path) -> None:
    net = local("Net")
    torch.save({"model": net.state_dict(), "held": net}, here / "held.pt")
    assert "or say --trusted" in failed(2, "explain", "nets:Net", "--weights", "held.pt")
    assert run("explain", "nets:Net", "--weights", "held.pt", "--trusted").exit_code == 0
    torch.distributed.checkpoint.save(net.state_dict(), checkpoint_id=here / "step-7")
    assert "say --trusted" in failed(2, "explain", "nets:Net", "--weights", "step-7")
    assert run("explain", "nets:Net", "--weights", "step-7", "--trusted").exit_code == 0


def test_a_saved_module_finds_its_class_in_the_current_folder(here: Path) -> None:
    (here / "elsewhere.py").write_text("from nets import Net\n\nclass Other(Net):\n    pass\n")
    make = "import sys, torch; sys.path.insert(0, '.'); import elsewhere; torch.save(elsewhere.Other(), 'whole.pt')"
    subprocess.run([sys.executable, "-c", make], cwd=here, env={"PYTHONPATH": os.pathsep.join(sys.path)}, check=True)
    sys.path[:] = [place for place in sys.path if place not in ("", str(here))]
    before = set(sys.modules)
    assert run("convert", "whole.pt", "--trusted", "--out", "net.pt").exit_code == 0
    assert "elsewhere" in set(sys.modules) - before


def test_no_model_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*args: object, **kwargs: object) -> None:
        raise AssertionError("a download")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)
    model = models.named("torchvision:fasterrcnn_mobilenet_v3_large_320_fpn", {"num_classes": 2})
    assert isinstance(model, nn.Module)


def test_a_package_that_is_not_installed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "pip install 'structrep[timm]'" in failed(2, "explain", "timm:resnet10t")


def test_a_torchvision_made_for_another_torch(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    monkeypatch.syspath_prepend(here)
    monkeypatch.delitem(sys.modules, "torchvision")
    said = failed(2, "explain", "torchvision:resnet18")
    assert "torchvision's build is for another torch" in said
