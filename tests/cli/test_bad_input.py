"""What the commands say to bad input: a sentence with the remedy, and no file is changed."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint
from torch import nn

import structrep
from structrep.cli import models
from tests.cli.running import failed, local, randomized, read, run

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
        ("net.bin", "convert writes .safetensors, .pt, .pt2, .onnx"),
        ("net", "convert writes .safetensors, .pt, .pt2, .onnx"),
        ("net.PT", "convert writes .safetensors, .pt, .pt2, .onnx"),
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
