"""Checkpoints as training code writes them, made into those that the plain model reads."""

import argparse
import copy
import hashlib
import json
import re
from types import SimpleNamespace

import lightning.pytorch as lightning
import pytest
import safetensors.torch
import timm
import torch
import torchvision
import transformers
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import nn
from torch.distributed import checkpoint as sharded

import structrep
from structrep.blocks import RepVGGBlock2d
from structrep.deliver import checkpoint
from structrep.errors import BadInput
from tests.support.models import settled
from tests.support.truth import relative_error

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


def test_a_sharded_checkpoint(wide, tmp_path):
    for nested in (False, True):
        state = dict(wide.state_dict())
        content = {"model": state, "optim": {"state": {"conv.weight": torch.zeros(3)}}, "step": 7} if nested else state
        folder = tmp_path / str(nested)
        sharded.save(content, checkpoint_id=folder / "step-7")
        structrep.convert_checkpoint(folder / "step-7", folder / "deploy.safetensors", wide, norms="keep")
        state = safetensors.torch.load_file(folder / "deploy.safetensors")
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


# --- what torch loads, and what others leave in a file


class Tied(nn.Module):
    """Two layers of one weight behind a block, and an index as a model of windows has it."""

    def __init__(self):
        super().__init__()
        self.block, self.one, self.two = RepVGGBlock2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.two.weight = self.one.weight
        self.register_buffer("order", torch.tensor([2, 0, 3, 1]))
        self.register_buffer("mask", torch.tensor([True, False, True, True]))

    def forward(self, x):
        x = self.two(self.one(self.block(x).relu()).relu())[:, self.order]
        return x * self.mask[:, None, None]


class Frozen(nn.Module):
    """A norm of a detector's backbone, which takes checkpoints of batch norms."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), torchvision.ops.FrozenBatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x))


def without(state, *ends):
    return {name: value for name, value in state.items() if not name.endswith(ends)}


OTHERWISE = {
    "without counters": lambda state: without(state, "num_batches_tracked"),
    "without some counters": lambda state: without(state, "dense.norm.num_batches_tracked"),
    "what thop counts": lambda state: state
    | {"total_ops": torch.zeros(1), "total_params": torch.zeros(1)}
    | {f"block.dense.{name}": torch.zeros(1, dtype=torch.float64) for name in ("total_ops", "conv.total_params")},
    "half": lambda state: {name: value.half() for name, value in state.items()},
    "bfloat16": lambda state: {name: value.bfloat16() for name, value in state.items()},
    "counters past half precision": lambda state: {
        name: torch.tensor(100_000).half() if name.endswith("tracked") else value for name, value in state.items()
    },
    "tied weights once": lambda state: without(state, "two.weight"),
    "the other of the tied": lambda state: without(state, "one.weight"),
    "all of it": lambda state: {
        name: value.half() for name, value in without(state, "two.weight", "tracked").items()
    } | {"one.total_ops": torch.zeros(1)},
}  # fmt: skip


@pytest.mark.parametrize("wrapped", ["", "module.", "_orig_mod.", "model.module."])
@pytest.mark.parametrize("kind", OTHERWISE)
def test_what_is_taken_as_torch_takes_it(kind, wrapped, tmp_path):
    model, fresh = trained(Tied()), Tied()
    before = copy.deepcopy(fresh.state_dict())
    state = {wrapped + name: value for name, value in OTHERWISE[kind](dict(model.state_dict())).items()}
    content = {"epoch": 3, "net": state, "ema": {**state}} if wrapped == "module." else state
    entry = {"entry": "net.module"} if wrapped == "module." else {}
    path = written(content, tmp_path / "train.pt")
    structrep.convert_checkpoint(path, tmp_path / "deploy.pt", fresh, **entry)
    deploy = torch.load(tmp_path / "deploy.pt")
    prefix = "" if entry or wrapped == "_orig_mod." else wrapped
    plain = structrep.reparameterize(trained(Tied())).to(deploy[f"{prefix}one.weight"].dtype)
    plain.load_state_dict({name.removeprefix(prefix): value for name, value in deploy.items()})
    assert not any("total" in name for name in deploy)
    assert torch.equal(plain.order, model.order)
    assert torch.equal(plain.mask, model.mask)
    bound = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-1}[plain.one.weight.dtype]
    assert relative_error(plain.float()(X), model(X)) < bound
    assert all(torch.equal(value, before[name]) for name, value in fresh.state_dict().items())
    given = Tied()
    found = checkpoint.weights_in(checkpoint.read(path, given), given, path)
    checkpoint.load(given, found[0], path)
    assert relative_error(given.eval().float()(X), model(X)) < bound
    assert {value.dtype for name, value in given.state_dict().items() if name.endswith("tracked")} == {torch.int64}


def test_counters_are_kept_where_they_are_whole(tmp_path):
    model = Tied().train()
    model(X), model(X)
    given = Tied()
    state = {name: value.half() for name, value in model.state_dict().items()}
    checkpoint.load(given, checkpoint.weights_in(state, given, tmp_path)[0], tmp_path)
    counts = [value for name, value in given.state_dict().items() if name.endswith("tracked")]
    assert [(value.dtype, value.item()) for value in counts] == [(torch.int64, 2)] * 2


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("order", torch.tensor([2.0, 0.0, 3.0, 1.5]), "order as torch.float32, and the model as torch.int64"),
        ("order", torch.tensor([2, 0, 3, 2049]).half(), "order as torch.float16, and the model as torch.int64"),
        ("order", torch.tensor([2, 0, 3, 300]).bfloat16(), "it was rounded"),
        ("mask", torch.tensor([1.0, 0.0, 2.0, 0.0]), "mask as torch.float32, and the model as torch.bool"),
        ("order", torch.tensor([float("nan"), 0, 3, 1]), "it was rounded"),
    ],
)
def test_integers_that_were_rounded(name, value, told, tmp_path):
    state = {**Tied().state_dict(), name: value}
    with pytest.raises(BadInput, match=told):
        structrep.convert_checkpoint(written(state, tmp_path / "a.pt"), tmp_path / "b.pt", Tied())


def test_names_that_a_module_takes_by_its_own_hook(tmp_path):
    frozen = trained(Frozen())
    batch = {**frozen.state_dict(), "norm.num_batches_tracked": torch.tensor(7)}
    path = written({"state_dict": batch}, tmp_path / "train.pt")
    structrep.convert_checkpoint(path, tmp_path / "deploy.pt", Frozen())
    deploy = structrep.reparameterize(Frozen().eval())
    deploy.load_state_dict(torch.load(tmp_path / "deploy.pt")["state_dict"])
    assert relative_error(deploy(X), frozen(X)) < 1e-5
    old = nn.Sequential(torch.nn.utils.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4))
    new = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)).eval()
    old = trained(old)
    given = new.state_dict()
    found = checkpoint.weights_in(old.state_dict(), new, tmp_path)
    checkpoint.load(new, found[0], tmp_path)
    assert given.keys() != old.state_dict().keys()
    assert relative_error(new(X), old(X)) < 1e-6


@pytest.mark.parametrize("prefix", ["", "module.", "model."])
@pytest.mark.parametrize("blocks", [False, True])
def test_the_weights_of_a_deploy_form_are_called_so(wide, blocks, prefix, tmp_path):
    model = wide if blocks else trained(Tied())
    cases = {
        "of the deploy form already: load them into structrep.reparameterize": structrep.reparameterize(model),
        "by their names, these are the weights of a deploy form already": nn.ModuleDict(
            {"block": nn.ModuleDict({"rbr_reparam": nn.Conv2d(3, 4, 3)})}
        ),
    }
    if blocks:
        cases["of the plain model, which has no blocks: load them before expand"] = Plain()
    for told, other in cases.items():
        content = {"state_dict": {prefix + name: value for name, value in other.state_dict().items()}}
        with pytest.raises(BadInput, match=told) as error:
            structrep.convert_checkpoint(written(content, tmp_path / "a.pt"), tmp_path / "b.pt", model)
        assert "only in the model: " in str(error.value)
    fewer = without(model.state_dict(), "dense.conv.weight")
    with pytest.raises(BadInput, match=r"only in the model: [a-z]+\.dense\.conv\.weight$"):
        structrep.convert_checkpoint(written(fewer, tmp_path / "a.pt"), tmp_path / "b.pt", model)
    assert not (tmp_path / "b.pt").exists()


# --- shards


def indexed(state, folder, of=3, suffix=".safetensors"):
    """Weights in several files, as transformers writes them."""
    folder.mkdir(exist_ok=True)
    names = sorted(state)
    files = {f"model-{part + 1:05}-of-{of:05}{suffix}": names[part::of] for part in range(of)}
    for file, part in files.items():
        written({name: state[name] for name in part}, folder / file)
    places = {name: file for file, part in files.items() for name in part}
    index = folder / f"model{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_an_index_of_weights(wide, tmp_path, suffix):
    state = {name: value.bfloat16() if "fc" in name else value for name, value in wide.state_dict().items()}
    index = indexed({f"model.{name}": value for name, value in state.items()}, tmp_path / "whole", suffix=suffix)
    for source in (index, index.parent):
        structrep.convert_checkpoint(source, tmp_path / "d.safetensors", wide, norms="keep", force=True)
        found = safetensors.torch.load_file(tmp_path / "d.safetensors")
        assert found["fc.weight"].dtype == torch.bfloat16
        assert relative_error(plain_of(found).float()(X), wide(X)) < 1e-2
        given = structrep.expand(Plain(), "repvgg")
        checkpoint.load(given, checkpoint.weights_in(checkpoint.read(source, given), given, source)[0], source)
        assert all(torch.equal(value, state[name]) for name, value in given.state_dict().items())
    record = structrep.convert_checkpoint(index, tmp_path / "d.pt", wide, norms="keep")
    assert list(record.entries) == ["model"]


def test_a_folder_as_transformers_writes_it(tmp_path):
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    model = trained(transformers.ResNetForImageClassification(config))
    for name, size in (("one", "5GB"), ("many", "20KB")):
        model.save_pretrained(tmp_path / name, max_shard_size=size)
        structrep.convert_checkpoint(
            tmp_path / name, tmp_path / f"{name}.pt", transformers.ResNetForImageClassification(config)
        )
        deploy = structrep.reparameterize(copy.deepcopy(model))
        deploy.load_state_dict(torch.load(tmp_path / f"{name}.pt"))
        x = torch.randn(1, 3, 32, 32)
        assert relative_error(deploy(x).logits, model(x).logits) < 1e-4
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    assert len(list((tmp_path / "one").glob("*.safetensors"))) == 1


def test_shards_that_are_none(wide, tmp_path):
    index = indexed(wide.state_dict(), tmp_path / "shards")
    good = json.loads(index.read_text())
    shard, secret = index.parent / "model-00002-of-00003.safetensors", tmp_path / "secret.safetensors"
    secret.write_bytes(shard.read_bytes())
    name = next(name for name, file in good["weight_map"].items() if file == shard.name)

    def refused(told, source=index):
        with pytest.raises(BadInput, match=told):
            structrep.convert_checkpoint(source, tmp_path / "deploy.pt", wide)
        with pytest.raises(BadInput, match=told):
            checkpoint.weights_in(checkpoint.read(source, wide), wide, source)

    outside = ("../secret.safetensors", str(secret), "sub/x.safetensors", "..", "", "config.json", 3)
    for file in outside:
        index.write_text(json.dumps({"weight_map": {**good["weight_map"], name: file}}))
        refused(re.escape(f"names {str(file)!r}, which is no file of weights beside it"))
    for text in ("no json", "[]", "{}", '{"weight_map": 3}', '{"weight_map": null}'):
        index.write_text(text)
        refused("is damaged, or no index of weights")
    fewer = {key: file for key, file in good["weight_map"].items() if key != name}
    index.write_text(json.dumps({"weight_map": fewer}))
    refused(f"only in the model: {name}")
    index.write_text(json.dumps({"weight_map": {**good["weight_map"], "odd": shard.name}}))
    refused(f"{shard.name} does not hold what {index.name} says: odd")
    index.write_text(json.dumps(good))
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    refused(f"{shard.name} is damaged, or no safetensors file")
    shard.unlink()
    refused(f"names {shard.name}, which is not there: it would hold .*{name}")
    indexed(wide.state_dict(), index.parent).rename(index.parent / "other.safetensors.index.json")
    index.write_text(json.dumps(good))
    refused(r"has 2 of \*\.safetensors\.index\.json: give one, model\..*, other\.", index.parent)
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(r"no folder of torch\.distributed\.checkpoint, .* and has no weights", empty)
    assert not (tmp_path / "deploy.pt").exists()


def test_the_command_unpickles_no_metadata_unless_it_is_trusted(wide, tmp_path):
    sharded.save(wide.state_dict(), checkpoint_id=tmp_path / "step-7")
    with pytest.raises(BadInput, match="reading its metadata could run any code: say --trusted"):
        checkpoint.read(tmp_path / "step-7", wide)
    assert checkpoint.read(tmp_path / "step-7", wide, trusted=True).keys() == wide.state_dict().keys()


class Held:
    """What a checkpoint should not hold."""


def test_a_checkpoint_that_holds_itself(wide, tmp_path):
    content = {"net": wide.state_dict(), "epoch": 3}
    content["self"] = content
    structrep.convert_checkpoint(written(content, tmp_path / "train.pt"), tmp_path / "new.pt", wide)
    deploy = torch.load(tmp_path / "new.pt")
    assert deploy["net"].keys() == structrep.reparameterize(wide).state_dict().keys()


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
