"""Two processes train expanded models to the weights that one does. About 30 s: five processes are started."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

import structrep
from tests.needs.distributed.training import (
    ACCUMULATED,
    OPTIONS,
    Plain,
    batch,
    even,
    expanded,
    loss_of,
    merged_first,
    train,
)
from tests.support import ROOT
from tests.support.truth import EXACT, relative_error

X, _ = batch(0, 0)
SHARDS = hasattr(torch.cpu.Stream, "record_event")
pytestmark = pytest.mark.slow
needs_shards = pytest.mark.skipif(not SHARDS, reason="FSDP2 runs on CPUs since torch 2.7")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where two processes have left what they found."""
    path = tmp_path_factory.mktemp("found")
    run("data_parallel,sharded,mixed" if SHARDS else "data_parallel", path, 2)
    return path


@pytest.fixture(scope="module")
def three(folder):
    """The same, with what three processes have left there too."""
    run("resharded,apart", folder, 3)
    return folder


def run(tasks: str, folder: Path, processes: int) -> None:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run(
        [sys.executable, *command, "-m", "tests.needs.distributed.worker", tasks, folder],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def farthest(state: dict, truth: dict) -> float:
    """The largest error of a state dict, each tensor relative to its largest number."""
    assert state.keys() == truth.keys()
    errors = ((state[name] - value).abs().max() / value.abs().max().clamp(min=1e-6) for name, value in truth.items())
    return max(map(float, errors))


def trained(block: str, parts: int = 1) -> torch.nn.Module:
    model = expanded(block)
    before = copy.deepcopy(model.state_dict())
    train(model, parts)
    assert farthest(before, model.state_dict()) > 0.1, "training has moved it"
    return model


def too_large(errors: dict[str, float], bound: float) -> dict[str, float]:
    return {name: error for name, error in errors.items() if not error < bound}


def test_data_parallel(folder):
    """DDP with the statistics of all processes; it raises by itself if a parameter has no gradient."""
    found = torch.load(folder / "data_parallel.pt")
    errors = {}
    for block in OPTIONS:
        model = trained(block)
        errors[block] = farthest(found[f"{block}/state"], model.state_dict())
        plain = Plain().double()
        plain.load_state_dict(found[f"{block}/back"])
        errors[f"{block}, plain again"] = relative_error(plain.eval()(X), model.eval()(X))
    for block in ACCUMULATED:
        errors[f"{block}, accumulated"] = farthest(found[f"{block}/accumulated"], trained(block, 2).state_dict())
    assert not too_large(errors, 1e-10)


@needs_shards
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # said to a single process that loads
def test_sharded(three):
    """FSDP2, saved by two processes; read by one, and by three into models without memory."""
    folder = three
    found, again = torch.load(folder / "sharded.pt"), torch.load(folder / "resharded.pt")
    errors = {}
    for block in OPTIONS:
        assert "load the full state dict into an unsharded model" in found[f"{block}/refused"]
        truth = trained(block)
        model = expanded(block)
        state = model.state_dict()
        dcp.load({"model": state}, checkpoint_id=folder / block)
        model.load_state_dict(state)
        errors[f"{block}, one process"] = farthest(model.state_dict(), truth.state_dict())
        errors[f"{block}, three"] = farthest(again[f"{block}/state"], truth.state_dict())
        output = truth.eval()(X)
        errors[f"{block}, output of three"] = relative_error(again[f"{block}/output"], output)
        back = structrep.reparameterize(model.eval(), norms="keep")
        plain = Plain().double()
        plain.load_state_dict(back.state_dict())
        errors[f"{block}, plain again"] = relative_error(plain.eval()(X), output)
    assert not too_large(errors, 1e-10)


@needs_shards
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_statistics_of_several_processes(three, tmp_path, recwarn):
    """torch has each process write some of what all have: a norm's mean may be of one, its variance of another."""
    folder, out = three, tmp_path / "deploy.pt"
    own = torch.load(folder / "apart.pt")["own"]
    model = even()
    state = model.state_dict()
    dcp.load({"model": state}, checkpoint_id=folder / "apart")
    of = {
        name: [torch.equal(state[name], buffers[name]) for buffers in own].index(True)
        for name in own[0]
        if name.endswith(("running_mean", "running_var"))
    }
    assert not any(torch.equal(own[0][name], own[1][name]) for name in of)
    norms = [name.removesuffix(".running_mean") for name in of if name.endswith("mean")]
    mixed = [norm for norm in norms if of[f"{norm}.running_mean"] != of[f"{norm}.running_var"]]
    assert mixed
    recwarn.clear()
    structrep.convert_checkpoint(folder / "apart", out, model, norms="keep")
    (told,) = (str(one.message) for one in recwarn if one.filename == __file__)
    assert "dedup_save_to_lowest_rank=True" in told
    for norm in norms:
        assert (f"model.{norm}" in told) == (norm in mixed), told
    recwarn.clear()
    synced = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    structrep.convert_checkpoint(folder / "apart", out, synced, norms="keep", force=True)
    structrep.convert_checkpoint(folder / "averaged", out, even(), norms="keep", force=True)
    assert not [one for one in recwarn if one.filename == __file__]
    dcp.load({"model": state}, checkpoint_id=folder / "averaged")
    for name in of:
        assert relative_error(state[name], sum(buffers[name] for buffers in own) / len(own)) < EXACT


@needs_shards
def test_sharded_in_bfloat16(folder):
    """FSDP2 with `MixedPrecisionPolicy`: gradients are off by as much as under autocast, in one process."""
    found = torch.load(folder / "mixed.pt")
    ratios = {}
    for block in OPTIONS:
        exact, autocast = expanded(block), expanded(block).float()
        loss_of(exact).backward()
        with torch.autocast("cpu", torch.bfloat16):
            loss_of(autocast).backward()
        truth, off = (torch.cat([p.grad.flatten() for p in model.parameters()]) for model in (exact, autocast))
        gradients = found[f"{block}/gradients"]
        got = torch.cat([gradients[name].flatten() for name, _ in exact.named_parameters()])
        assert torch.linalg.norm(off - truth) < 0.15 * torch.linalg.norm(truth)
        ratios[block] = float(torch.linalg.norm(got - truth) / torch.linalg.norm(off - truth))
    assert not too_large(ratios, 1.5)
    assert min(ratios.values()) > 0.5, "it was in bfloat16"


@needs_shards
def test_branches_merged_first_have_the_norms_of_all_processes(tmp_path):
    run("merged", tmp_path, 2)
    found, one = torch.load(tmp_path / "merged.pt"), merged_first()
    before = copy.deepcopy(one.state_dict())
    for module in one.modules():
        if hasattr(module, "online"):
            module.online = False
    train(one)
    assert farthest(before, one.state_dict()) > 0.1, "training has moved it"
    for state in found.values():
        assert farthest(state, one.state_dict()) < EXACT
