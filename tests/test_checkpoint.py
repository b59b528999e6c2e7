"""Checkpoints as training code writes them, made into those that the plain model reads."""

import argparse
import copy
import hashlib
from types import SimpleNamespace

import lightning.pytorch as lightning
import pytest
import safetensors.torch
import timm
import torch
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import nn
from torch.distributed import checkpoint as sharded

import structrep
from structrep.blocks import RepVGGBlock2d
from structrep.errors import BadInput
from tests.models import relative_error, settled

X = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(0))


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm, self.fc = nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(self.norm(self.conv(self.stem(x))).relu().mean((2, 3)))


class Lit(lightning.LightningModule):
    def __init__(self, width=4, wide=False):
        super().__init__()
        self.save_hyperparameters(ignore="wide")
        self.model = structrep.expand(Plain(), "repvgg") if wide else Plain()

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, index):
        return self.model(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def trained(model):
    """Weights that are those of no other model here."""
    model = settled(model).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture
def wide():
    return trained(structrep.expand(Plain(), "repvgg"))


def plain_of(state):
    model = Plain().eval()
    model.load_state_dict(state)
    return model


def written(content, path):
    safetensors.torch.save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    return path


@pytest.mark.parametrize("out", ["deploy.safetensors", "deploy.pt"])
@pytest.mark.parametrize("source", ["train.safetensors", "train.pth"])
def test_a_bare_state_dict(wide, tmp_path, source, out):
    fresh = structrep.expand(Plain(), "repvgg")  # in training mode, with other weights
    before = copy.deepcopy(fresh.state_dict())
    path = written(wide.state_dict(), tmp_path / source)
    record = structrep.convert_checkpoint(path, tmp_path / out, fresh, X, norms="keep")
    assert list(record.entries) == ["(all)"]
    assert len(record.entries["(all)"].merges) == 1
    read = safetensors.torch.load_file if out.endswith("safetensors") else torch.load
    assert relative_error(plain_of(read(tmp_path / out))(X), wide(X)) < 1e-5
    assert fresh.training
    assert all(torch.equal(value, before[name]) for name, value in fresh.state_dict().items())


def test_norms_are_folded_unless_kept(wide, tmp_path):
    path = written(wide.state_dict(), tmp_path / "train.pt")
    structrep.convert_checkpoint(path, tmp_path / "deploy.pt", wide)
    assert torch.load(tmp_path / "deploy.pt").keys() == structrep.reparameterize(wide).state_dict().keys()


@pytest.mark.parametrize("whole", [False, True])
def test_lightning(tmp_path, whole):
    lit = Lit(wide=True)
    trainer = lightning.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(lit, torch.utils.data.DataLoader(torch.randn(4, 3, 9, 8), 2))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    model = Lit(wide=True) if whole else structrep.expand(Plain(), "repvgg")
    record = structrep.convert_checkpoint(tmp_path / "last.ckpt", tmp_path / "deploy.ckpt", model, norms="keep")
    assert list(record.entries) == ["state_dict" if whole else "state_dict.model"]
    assert set(record.left) == {"callbacks", "loops", "lr_schedulers", "optimizer_states"}
    deploy = Lit.load_from_checkpoint(tmp_path / "deploy.ckpt")
    assert relative_error(deploy.eval()(X), lit.eval()(X)) < 1e-5


def test_timm_with_a_moving_average(wide, tmp_path):
    ema = ModelEmaV3(wide, decay=0.5)
    with torch.no_grad():
        wide.fc.bias += 1
    ema.update(wide)
    optimizer = torch.optim.SGD(wide.parameters(), 0.1)
    args = argparse.Namespace(model="plain", lr=0.1)
    saver = CheckpointSaver(wide, optimizer, args, model_ema=ema, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(3, metric=0.5)
    last, out = tmp_path / "last.pth.tar", tmp_path / "deploy.tar"
    record = structrep.convert_checkpoint(last, out, wide, X, norms="keep")
    assert list(record.entries) == ["state_dict", "state_dict_ema"]
    content = torch.load(out, weights_only=False)
    assert (content["epoch"], content["args"], "optimizer" in content) == (3, args, False)
    assert relative_error(plain_of(content["state_dict"])(X), wide(X)) < 1e-5
    average = plain_of(content["state_dict_ema"])
    assert relative_error(average(X), ema.module.eval()(X)) < 1e-5
    assert relative_error(average(X), wide(X)) > 1e-2
    timm.models.load_checkpoint(plain := Plain().eval(), str(out), use_ema=True)
    assert torch.equal(plain(X), average(X))
    with pytest.raises(BadInput, match="2 state dicts of the model: name an entry, state_dict or state_dict_ema"):
        structrep.convert_checkpoint(last, tmp_path / "one.safetensors", wide)
    with pytest.raises(BadInput, match="no state dict of the model at 'ema': there is state_dict, state_dict_ema"):
        structrep.convert_checkpoint(last, tmp_path / "one.safetensors", wide, entry="ema")
    structrep.convert_checkpoint(last, tmp_path / "one.safetensors", wide, entry="state_dict_ema", norms="keep")
    assert torch.equal(plain_of(safetensors.torch.load_file(tmp_path / "one.safetensors"))(X), average(X))


def test_names_with_wrappers(wide, tmp_path):
    average = torch.optim.swa_utils.AveragedModel(wide)
    compiled = SimpleNamespace(**{"model": torch.compile(wide).state_dict(), "ema": average.state_dict()})
    inner = {name.replace("conv.", "conv._orig_mod."): value for name, value in wide.state_dict().items()}
    content = {**vars(compiled), "inner": {f"module.{name}": value for name, value in inner.items()}, "step": 7}
    path = written(content, tmp_path / "train.pt")
    record = structrep.convert_checkpoint(path, tmp_path / "deploy.pt", wide, norms="keep")
    assert list(record.entries) == ["model", "ema.module", "inner.module"]
    found = torch.load(tmp_path / "deploy.pt")
    assert (found["step"], int(found["ema"]["n_averaged"])) == (7, 0)
    for state in (found["model"], found["ema"], found["inner"]):
        bare = {name.removeprefix("module."): value for name, value in state.items() if name != "n_averaged"}
        assert relative_error(plain_of(bare)(X), wide(X)) < 1e-5


@pytest.mark.parametrize("nested", [False, True])
def test_a_sharded_checkpoint(wide, tmp_path, nested):
    state = dict(wide.state_dict())
    content = {"model": state, "optim": {"state": {"conv.weight": torch.zeros(3)}}, "step": 7} if nested else state
    sharded.save(content, checkpoint_id=tmp_path / "step-7", no_dist=True)
    structrep.convert_checkpoint(tmp_path / "step-7", tmp_path / "deploy.safetensors", wide, norms="keep")
    state = safetensors.torch.load_file(tmp_path / "deploy.safetensors")
    assert relative_error(plain_of(state)(X), wide(X)) < 1e-5


def test_dtypes_are_those_of_the_checkpoint(tmp_path):
    block = trained(nn.Sequential(RepVGGBlock2d(3, 4, 3)))
    state = {
        name: value.bfloat16() if value.is_floating_point() else value for name, value in block.state_dict().items()
    }
    structrep.convert_checkpoint(written(state, tmp_path / "train.pt"), tmp_path / "deploy.pt", block)
    deploy = torch.load(tmp_path / "deploy.pt")
    assert {value.dtype for value in deploy.values()} == {torch.bfloat16}
    assert next(block.parameters()).dtype == torch.float32


def test_several_states_side_by_side(wide, tmp_path):
    state = wide.state_dict()
    ema = {f"ema.{name}": value * 1 for name, value in state.items()}
    path = written({**state, **ema}, tmp_path / "both.pt")
    record = structrep.convert_checkpoint(path, tmp_path / "deploy.pt", wide, norms="keep")
    assert list(record.entries) == ["(all)", "ema"]
    found = torch.load(tmp_path / "deploy.pt")
    assert set(found) == {*Plain().state_dict(), *(f"ema.{name}" for name in Plain().state_dict())}
    with pytest.raises(BadInput, match="2 state dicts"):
        structrep.convert_checkpoint(path, tmp_path / "one.safetensors", wide)
    compiled = {f"_orig_mod.{name}": value for name, value in state.items()}
    with pytest.raises(BadInput, match="are the same but for wrappers"):
        structrep.convert_checkpoint(written({**state, **compiled}, path), tmp_path / "new.pt", wide)


def test_what_looks_like_weights(wide, tmp_path):
    state = wide.state_dict()
    content = {"model": state, "callbacks": {"ema": state}, "optimizer_state": {"exp_avg": state}}
    record = structrep.convert_checkpoint(written(content, tmp_path / "a.pt"), tmp_path / "b.pt", wide)
    assert list(record.entries) == ["model"]
    assert list(torch.load(tmp_path / "b.pt")) == ["model"]
    with pytest.raises(BadInput, match="no state dict"):
        structrep.convert_checkpoint(written({"callbacks": state}, tmp_path / "c.pt"), tmp_path / "d.pt", wide)


def test_numbers_that_a_model_cannot_have(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1))
    model[3].weight = model[0].weight
    apart = {name: value.clone() for name, value in model.state_dict().items()}
    apart["3.weight"] += 1
    with pytest.raises(BadInput, match=r"tied to the weights of 0\.weight"):
        structrep.convert_checkpoint(written(apart, tmp_path / "a.pt"), tmp_path / "b.pt", model)
    whole = {name: value.to(torch.int8) for name, value in model.state_dict().items()}
    with pytest.raises(BadInput, match=r"as torch\.int8, and the model as torch\.float32"):
        structrep.convert_checkpoint(written(whole, tmp_path / "a.pt"), tmp_path / "b.pt", model)
    plain = nn.Sequential(nn.Conv2d(3, 3, 1))
    with pytest.raises(BadInput, match="nothing to merge"):
        structrep.convert_checkpoint(written(plain.state_dict(), tmp_path / "a.pt"), tmp_path / "b.pt", plain)


class Held:
    """What a checkpoint should not hold."""


def test_bad_input(wide, tmp_path):
    state = wide.state_dict()
    good = written(state, tmp_path / "good.pt")
    taken = tmp_path / "taken.pt"
    taken.write_text("mine")
    fewer = {name: value for name, value in state.items() if name != "fc.bias"}
    other = {**state, "fc.bias": torch.zeros(7)}
    cases = [
        (tmp_path / "none.pt", "new.pt", "is not there"),
        (tmp_path, "new.pt", "no folder of torch.distributed.checkpoint"),
        (good, "new.onnx", "has the suffix '.onnx'"),
        (good, "taken.pt", "exists: force its replacement"),
        (good, "nowhere/new.pt", "there is no folder"),
        (written({"model": fewer}, tmp_path / "fewer.pt"), "new.pt", "only in the model: fc.bias"),
        (written({"net": {"a": {**state, "b": X}}}, tmp_path / "more.pt"), "new.pt", "only in the file: b"),
        (written(other, tmp_path / "other.pt"), "new.pt", "fc.bias 5 in the model, 7 in the file"),
        (written({"epoch": 3}, tmp_path / "epoch.pt"), "new.pt", "no state dict"),
        (written(Plain().state_dict(), tmp_path / "plain.pt"), "new.pt", "only in the model"),
        (written({**state, "held": Held()}, tmp_path / "held.pt"), "new.pt", "reading that could run any code"),
    ]
    before = {path.name: hashlib.sha256(path.read_bytes()).digest() for path in tmp_path.iterdir()}
    for source, out, told in cases:
        with pytest.raises(BadInput, match=told):
            structrep.convert_checkpoint(source, tmp_path / out, wide)
    assert before == {path.name: hashlib.sha256(path.read_bytes()).digest() for path in tmp_path.iterdir()}
    structrep.convert_checkpoint(good, taken, wide, force=True)
    structrep.convert_checkpoint(tmp_path / "held.pt", tmp_path / "new.pt", wide, trusted=True)
    assert isinstance(torch.load(tmp_path / "new.pt", weights_only=False)["held"], Held)
