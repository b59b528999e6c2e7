"""structrep in training code that exists: two lines in a script, a callback in a trainer, and the examples of both."""

import csv
import importlib
import random
import re
import subprocess
import sys
from pathlib import Path

import lightning.pytorch
import pytest
import pytorch_lightning
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
import torchmetrics
import torchvision
import transformers as hf
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from torch.utils.data import DataLoader, TensorDataset

import structrep
from structrep.blocks import MobileOneBlock2d
from structrep.errors import BadInput
from structrep.integrations.lightning import ReparameterizeOnExport
from structrep.integrations.transformers import ReparameterizeOnExport as TrainerExport
from tests.support import ROOT
from tests.support.truth import relative_error

EXAMPLES = ROOT / "examples"
GRAY = torch.rand(16, 1, 32, 32, generator=torch.Generator().manual_seed(0))


def shapes(state):
    return {name: tuple(value.shape) for name, value in state.items()}


def identical(one, two):
    """Bit by bit."""
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


@torch.no_grad()
def agree(deploy, trained, x, by=1e-5):
    return relative_error(deploy.eval()(x), trained.eval()(x)) < by


class Logits(nn.Module):
    """Those of a classifier of transformers."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).logits


def python(*arguments, folder):
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert not done.returncode, done.stderr
    return done.stdout


# ---- a script


SCRIPT = """
import sys

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.down = nn.Conv2d(8, 8, 3, stride=2, bias=False)
        self.norm2, self.head = nn.BatchNorm2d(8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x)
        x = (self.norm(self.conv(x)) + x).relu()
        return self.head(self.norm2(self.down(x)).relu().mean((2, 3)))


torch.manual_seed(0)
torch.set_num_threads(1)
images, labels = torch.randn(64, 1, 12, 12), torch.randint(0, 3, (64,))
model = Net()
if sys.argv[1] == "train":
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    for epoch in range(5):
        for x, y in zip(images.split(16), labels.split(16)):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    torch.save(model.eval()(images), "trained.pt")
    torch.save(model.state_dict(), "model.pt")
else:
    model.load_state_dict(torch.load("model.pt"))
    torch.save(model.eval()(images), "tested.pt")
"""
LINES = {
    "    optimizer = ": "    model = structrep.expand(model, 'repvgg')\n",
    "    torch.save(model.state_dict()": "    model = structrep.reparameterize(model, norms='keep')\n",
}


def test_two_lines_in_a_script_that_knows_nothing_of_structrep(tmp_path):
    patched = f"import structrep\n{SCRIPT}\nprint(*sys.modules)"
    for before, line in LINES.items():
        assert patched.count(before) == 1
        patched = patched.replace(before, line + before)
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "patched.py").write_text(patched)
    loaded = python("patched.py", "train", folder=tmp_path).split()
    assert "structrep" in loaded
    assert not {"lightning", "pytorch_lightning", "transformers"} & set(loaded), "who trains without them needs none"
    python("script.py", "test", folder=tmp_path)  # the script as it was takes the weights
    assert relative_error(torch.load(tmp_path / "tested.pt"), torch.load(tmp_path / "trained.pt")) < 1e-5


# ---- examples


@pytest.fixture
def example(monkeypatch):
    """An example, as a module, with a tenth of its data."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def load(name):
        module, digits = importlib.import_module(name), importlib.import_module("demo").digits
        monkeypatch.setattr(module, "digits", lambda: tuple(part[::10] for part in digits()))
        return module

    return load


def test_the_plain_loop(example):
    loop = example("loop")
    trained, deploy = loop.main(epochs=1)
    assert structrep.expand_layers(trained)
    assert shapes(deploy.state_dict()) == shapes(loop.make().state_dict())
    assert agree(deploy, trained, GRAY)


@pytest.mark.parametrize(("name", "ema"), [("resnet18", False), ("mnasnet0_5", True)])
def test_torchvision_takes_what_its_reference_script_wrote(example, tmp_path, name, ema):
    run = example("torchvision_reference").run
    options = ["--expand", "repvgg", "--model", name, "--output-dir", str(tmp_path), *["--model-ema"] * ema]
    run([*options, "--epochs", "1"])
    if ema:
        run([*options, "--epochs", "2", "--resume", str(tmp_path / "checkpoint.pth")])

    checkpoint = torch.load(tmp_path / "checkpoint.pth", weights_only=False)
    assert set(checkpoint) == {"model", "optimizer", "lr_scheduler", "epoch", "args"} | (
        {"model_ema"} if ema else set()
    )
    assert checkpoint["epoch"] == ema
    trained = structrep.expand(torchvision.models.get_model(name, num_classes=10), "repvgg")
    trained.load_state_dict(checkpoint["model"])
    if ema:
        average = AveragedModel(trained)
        average.load_state_dict(checkpoint["model_ema"])
        assert not identical(average.module.state_dict(), trained.state_dict())
        trained = average.module

    deploy = torchvision.models.get_model(name, num_classes=10)
    plain = shapes(deploy.state_dict())
    deploy.load_state_dict(torch.load(tmp_path / "deploy.pth"))
    assert shapes(torch.load(tmp_path / "deploy.pth")) == plain
    assert agree(deploy, trained, GRAY.expand(-1, 3, -1, -1))


@pytest.mark.parametrize("ema", [False, True])
def test_timm_takes_what_its_training_wrote(example, tmp_path, ema):
    options = ["--expand", "repvgg", "--epochs", "2", "--lr", "0.1", "--output", str(tmp_path)]
    example("timm_train").main(options + ["--model-ema"] * ema)
    plain = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    trained = structrep.expand(plain, "repvgg")
    best = tmp_path / "model_best.pth.tar"
    assert ("state_dict_ema" in torch.load(best, weights_only=False)) == ema
    timm.models.load_checkpoint(trained, str(best), use_ema=True)
    written = tmp_path / "deploy.pth.tar"
    deploy = timm.create_model("test_resnet", num_classes=10, in_chans=1, checkpoint_path=str(written))
    assert shapes(torch.load(written)) == shapes(plain.state_dict())
    assert agree(deploy, trained, GRAY)


def test_the_patch_of_timms_script_adds_what_the_example_runs():
    patch = (EXAMPLES / "timm_train.patch").read_text()
    example = (EXAMPLES / "timm_train.py").read_text()
    hunks = re.split(r"^@@ -\d+,(\d+) \+\d+,(\d+) @@\n", patch, flags=re.MULTILINE)[1:]
    added = []
    for old, new, lines in zip(hunks[::3], hunks[1::3], hunks[2::3], strict=True):
        kinds = [line[0] for line in lines.splitlines()]
        assert kinds.count(" ") == int(old)
        assert kinds.count(" ") + kinds.count("+") == int(new) == len(kinds)
        added += [
            line[1:].replace("'", '"') for line in lines.splitlines() if line.startswith("+") and "group" not in line
        ]
    assert sum("structrep." in line for line in added) == 2
    for line in added:
        assert line in example or "help=" in line, line


def test_the_lightning_example(example, tmp_path):
    module = example("lightning_callback")
    trained, export = module.main(tmp_path, epochs=1)
    deploy = module.Classifier.load_from_checkpoint(export.deploy_path)
    assert structrep.expand_layers(trained)
    assert shapes(deploy.state_dict()) == shapes(module.Classifier().state_dict())
    assert agree(deploy, trained, GRAY)
    assert export.metrics["deploy"] == pytest.approx(export.metrics["training-time"])


def test_the_transformers_example(example, tmp_path):
    trained, export = example("transformers_callback").main(tmp_path, epochs=1)
    deploy = hf.ResNetForImageClassification.from_pretrained(export.deploy_path)
    assert structrep.expand_layers(trained)
    assert shapes(deploy.state_dict()) == shapes(hf.ResNetForImageClassification(deploy.config).state_dict())
    assert agree(Logits(deploy), Logits(trained), GRAY)
    assert export.metrics["eval_deploy_loss"] == pytest.approx(export.metrics["eval_training_time_loss"], rel=1e-5)


# ---- Lightning


def small(pl):
    class Small(pl.LightningModule):
        def __init__(self, width=4, kind="plain"):
            super().__init__()
            self.save_hyperparameters()
            conv = {"plain": nn.Conv2d, "mobileone": MobileOneBlock2d}[kind]
            self.net = nn.Sequential(
                nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(),
                conv(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.2),
                nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 2),
            )  # fmt: skip
            self.right = torchmetrics.Accuracy("multiclass", num_classes=2)

        def training_step(self, batch, index):
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            self.log("train_loss", loss)
            return loss

        def validation_step(self, batch, index):
            logits = self.net(batch[0])
            self.right(logits, batch[1])
            self.log("val_right", self.right)
            self.log("val_loss", F.cross_entropy(logits, batch[1]))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)

    return Small


Small = small(lightning.pytorch)


def fit(callbacks, folder, pl=lightning.pytorch, block="repvgg", kind=Small, data=True, wrap=None, **options):
    """A module, trained, its trainer, and the random numbers that come next."""
    torch.manual_seed(0)
    random.seed(0)
    module = kind() if block else kind(kind="mobileone")
    if block:
        module.net = structrep.expand(module.net, block)
    pairs = TensorDataset(GRAY, torch.arange(16) % 2)
    trainer = pl.Trainer(
        callbacks=callbacks, default_root_dir=folder, accelerator="cpu", enable_progress_bar=False,
        enable_model_summary=False, **{"logger": False, "enable_checkpointing": False, "max_epochs": 3, **options},
    )  # fmt: skip
    given = module if wrap is None else wrap(module)
    trainer.fit(given, DataLoader(pairs, 8, shuffle=True), DataLoader(pairs, 8) if data else None)
    return module, trainer, (torch.rand(()).item(), random.random())


def loaded(export, kind=Small, **options):
    return kind.load_from_checkpoint(export.deploy_path, **options)


def test_a_lightning_training_is_not_disturbed(tmp_path):
    class Heard(lightning.pytorch.Callback):
        """What the callbacks of a trainer are told."""

        def __init__(self):
            self.calls = 0

        def on_validation_batch_end(self, *args):
            self.calls += 1

        def state_dict(self):
            return {"calls": self.calls}

    def others(folder):
        return [
            Heard(),
            EarlyStopping("val_loss", patience=2),
            ModelCheckpoint(folder, monitor="val_loss", save_top_k=1, save_weights_only=True),
        ]

    alone, beside = others(tmp_path / "alone"), others(tmp_path / "beside")
    options = {"enable_checkpointing": True}
    module, trainer, drawn = fit(alone, tmp_path, logger=CSVLogger(tmp_path, "alone"), **options)
    export = ReparameterizeOnExport("net")
    exported, its, drawn_then = fit([export, *beside], tmp_path, logger=CSVLogger(tmp_path, "beside"), **options)

    assert identical(exported.state_dict(), module.state_dict())
    assert drawn_then == drawn
    assert exported.training == module.training
    assert exported is its.lightning_module
    assert dict(its.callback_metrics) == dict(trainer.callback_metrics)
    for one, two in zip(beside, alone, strict=True):
        known, own = one.state_dict(), two.state_dict()
        assert {k: v for k, v in known.items() if "path" not in k and "best_k" not in k} == {
            k: v for k, v in own.items() if "path" not in k and "best_k" not in k
        }
    for part in ("fit_loop", "validate_loop"):
        assert str(getattr(its, part).state_dict()) == str(getattr(trainer, part).state_dict())

    resumable = torch.load(export.training_time_path, weights_only=False)
    assert resumable["optimizer_states"][0]["state"]
    assert identical(resumable["state_dict"], module.state_dict())
    deploy = loaded(export)
    assert shapes(deploy.state_dict()) == shapes(Small().state_dict())
    assert agree(deploy.net, exported.net, GRAY)
    assert export.deploy_path.parent == Path(its.log_dir)
    assert set(export.metrics["deploy"]) == {"val_right", "val_loss"}
    assert export.metrics["training-time"] == pytest.approx(
        {k: its.callback_metrics[k].item() for k in export.metrics["deploy"]}
    )
    assert export.metrics["deploy"] == pytest.approx(export.metrics["training-time"], rel=1e-5)

    (*rows, last), own = (list(csv.DictReader((Path(of.log_dir) / "metrics.csv").open())) for of in (its, trainer))
    assert [{name: row[name] for name in own[0]} for row in rows] == own
    assert float(last["deploy/val_loss"]) == pytest.approx(export.metrics["deploy"]["val_loss"])


@pytest.mark.parametrize("first", [False, True])
def test_averaged_weights_are_exported(tmp_path, first):
    export, average = ReparameterizeOnExport("net", dirpath=tmp_path), WeightAveraging(avg_fn=get_ema_avg_fn(0.9))
    module, _, _ = fit([export, average] if first else [average, export], tmp_path)
    other, _, _ = fit([], tmp_path)
    assert not identical(module.state_dict(), other.state_dict())
    assert agree(loaded(export).net, module.net, GRAY)


def test_the_best_weights_are_exported_on_demand(tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="train_loss", mode="max", save_top_k=1)
    export = ReparameterizeOnExport("net", weights="best", dirpath=tmp_path)
    module, _, _ = fit([export, best], tmp_path, enable_checkpointing=True)
    assert export.training_time_path == Path(best.best_model_path)
    state = torch.load(best.best_model_path, weights_only=False)["state_dict"]
    assert not identical(state, module.state_dict())
    module.load_state_dict(state)
    assert agree(loaded(export).net, module.net, GRAY)


def test_what_was_written_with_branches_is_folded_on_demand(tmp_path):
    export = ReparameterizeOnExport(norms="fold", dirpath=tmp_path)
    module, _, _ = fit([export], tmp_path, block="")
    deploy = structrep.reparameterize(Small(kind="mobileone").eval())
    deploy.load_state_dict(torch.load(export.deploy_path, weights_only=False)["state_dict"])
    assert len(deploy.state_dict()) < len(Small().state_dict())
    assert agree(deploy.net, module.net, GRAY)


def test_pytorch_lightning_by_its_own_name(tmp_path):
    kind, export = small(pytorch_lightning), ReparameterizeOnExport(dirpath=tmp_path)
    module, _, _ = fit([export], tmp_path, pl=pytorch_lightning, kind=kind)
    assert agree(loaded(export, kind).net, module.net, GRAY)
    assert export.metrics["deploy"] == pytest.approx(export.metrics["training-time"], rel=1e-5)


def test_a_trial_run_writes_nothing(tmp_path):
    export = ReparameterizeOnExport("net", weights="best", dirpath=tmp_path)
    fit([export, ModelCheckpoint(tmp_path)], tmp_path, fast_dev_run=True, enable_checkpointing=True)
    assert (export.training_time_path, export.deploy_path) == (None, None)
    assert export.metrics["deploy"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("pl", "norms"), [(lightning.pytorch, "keep"), (pytorch_lightning, "fold")])
def test_a_compiled_module(tmp_path, pl, norms):
    """Lightning puts compiled steps on the module itself, where a copy's would go on running the original's."""

    class kind(small(pl)):
        def training_step(self, batch, index):  # dynamo does not take one that logs
            return F.cross_entropy(self.net(batch[0]), batch[1])

    torch.compiler.reset()
    export = ReparameterizeOnExport("net" if norms == "keep" else "", norms=norms, dirpath=tmp_path)
    module, trainer, drawn = fit([export], tmp_path, pl, kind=kind, wrap=lambda it: torch.compile(it, backend="eager"))
    other, _, drawn_then = fit([], tmp_path, pl, kind=kind)
    assert identical(module.state_dict(), other.state_dict())
    assert drawn == drawn_then
    assert module._compiler_ctx is not None
    trained = {name: trainer.callback_metrics[name].item() for name in ("val_right", "val_loss")}
    assert export.metrics["training-time"] == pytest.approx(trained)
    assert export.metrics["deploy"] == pytest.approx(trained, rel=1e-5)
    if norms == "keep":
        assert agree(loaded(export, kind).net, module.net, GRAY)


def test_without_data_to_validate_with(tmp_path):
    export = ReparameterizeOnExport("net", dirpath=tmp_path)
    module, _, _ = fit([export], tmp_path, data=False)
    assert export.metrics == {}
    assert agree(loaded(export).net, module.net, GRAY)


@pytest.mark.parametrize(
    ("export", "options", "told"),
    [
        ({}, {"block": ""}, "Small has none: put them in before the optimizer"),
        ({"module": "right"}, {}, "MulticlassAccuracy has none"),
        ({"module": "right", "norms": "fold"}, {}, "there is nothing to merge in MulticlassAccuracy"),
        ({"module": "model"}, {}, "Small has no module named 'model'"),
        ({"weights": "best"}, {}, "the trainer has none"),
        ({"weights": "first"}, {}, "give 'last' or 'best'"),
    ],
)
def test_lightning_refuses_before_training(tmp_path, export, options, told):
    started = []

    class Step(lightning.pytorch.Callback):
        def on_train_batch_start(self, *args):
            started.append(args)

    with pytest.raises(BadInput, match=told):
        fit([ReparameterizeOnExport(**export), Step()], tmp_path, **options)
    assert not started


class Early(Small):
    """An optimizer made before the blocks."""

    def __init__(self, **options):
        super().__init__(**options)
        self.early = torch.optim.SGD(self.net.parameters(), 0.1)

    def configure_optimizers(self):
        return self.early


class Head(Small):
    def configure_optimizers(self):
        return torch.optim.SGD(self.net[-1].parameters(), 0.1)


class TwoOptimizers(Small):
    def __init__(self, **options):
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch, index):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self.net(batch[0]), batch[1]))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), 0.01) for part in (self.net[:4], self.net[4:])]


class NoOptimizer(Small):
    def configure_optimizers(self):
        return None


@pytest.mark.parametrize(
    ("kind", "told"), [(Early, "the optimizer has none of the .* make it of model.parameters"), (Head, "has 0 of the")]
)
def test_lightning_trains_no_blocks_without_an_optimizer_for_them(tmp_path, kind, told):
    with pytest.raises(BadInput, match=told):
        fit([ReparameterizeOnExport("net", dirpath=tmp_path)], tmp_path, kind=kind)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [TwoOptimizers, NoOptimizer])
@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
def test_several_optimizers_or_none(tmp_path, kind):
    export = ReparameterizeOnExport("net", dirpath=tmp_path)
    module, _, _ = fit([export], tmp_path, kind=kind, max_epochs=1)
    assert agree(loaded(export, kind).net, module.net, GRAY)


def test_a_block_that_cannot_be_merged_is_named(tmp_path):
    class Hook(lightning.pytorch.Callback):
        def on_train_start(self, trainer, pl_module):
            pl_module.net[3].register_forward_hook(lambda module, args, output: None)

    with pytest.raises(structrep.Unmerged, match=r"of the blocks in Sequential these cannot be merged: 3\n.*hook"):
        fit([Hook(), ReparameterizeOnExport("net")], tmp_path)


# ---- transformers


CONFIG = dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_channels=1, num_labels=2)


class Heard(hf.TrainerCallback):
    """What the callbacks of a trainer are told."""

    def __init__(self):
        self.calls = 0

    def on_prediction_step(self, *args, **kwargs):
        self.calls += 1


def train(folder, export=None, block="repvgg", early=False, **options):
    """A model, trained, its trainer, the callback, and the random numbers that come next."""
    hf.set_seed(0)
    model = hf.ResNetForImageClassification(hf.ResNetConfig(**CONFIG))
    optimizer = torch.optim.SGD(model.parameters(), 0.1) if early else None
    if block:
        model = structrep.expand(model, block)
    data = [{"pixel_values": image, "labels": index % 2} for index, image in enumerate(GRAY)]
    arguments = hf.TrainingArguments(
        str(folder), num_train_epochs=2, per_device_train_batch_size=8, use_cpu=True, disable_tqdm=True, report_to=[],
        **{"save_strategy": "epoch", "eval_strategy": "epoch", **options},
    )  # fmt: skip
    trainer = hf.Trainer(
        model, arguments, train_dataset=data, eval_dataset={"one": data[:8], "two": data[8:]},
        optimizers=(optimizer, None),
    )  # fmt: skip
    trainer.add_callback(Heard())
    callback = None
    if export is not None:
        callback = TrainerExport(trainer, **export)
        trainer.add_callback(callback)
    trainer.train()
    return model, trainer, callback, (torch.rand(()).item(), random.random())


def test_a_training_of_transformers_is_not_disturbed(tmp_path):
    model, trainer, _, drawn = train(tmp_path / "alone")
    exported, its, export, drawn_then = train(tmp_path / "beside", {"each_save": True})
    assert identical(exported.state_dict(), model.state_dict())
    assert drawn_then == drawn
    assert exported.training == model.training
    assert its.model is exported
    heard = [one.calls for of in (its, trainer) for one in of.callback_handler.callbacks if isinstance(one, Heard)]
    assert heard[0] == heard[1] > 0
    timed = re.compile("runtime|per_second")
    records = [
        [{k: v for k, v in one.items() if not timed.search(k)} for one in of.state.log_history] for of in (its, trainer)
    ]
    assert records[0][:-1] == records[1]
    assert set(records[0][-1]) - {"epoch", "step"} == set(export.metrics)

    for name in ("one", "two"):
        measured = export.metrics[f"eval_deploy_{name}_loss"]
        assert measured == pytest.approx(export.metrics[f"eval_training_time_{name}_loss"], rel=1e-5)
    saved = sorted((tmp_path / "beside").glob("checkpoint-*"))
    assert len(saved) == 2
    for folder in (export.deploy_path, *(one / "deploy" for one in saved)):
        deploy = hf.ResNetForImageClassification.from_pretrained(folder)
        assert shapes(deploy.state_dict()) == shapes(
            hf.ResNetForImageClassification(hf.ResNetConfig(**CONFIG)).state_dict()
        )
    assert agree(Logits(hf.ResNetForImageClassification.from_pretrained(export.deploy_path)), Logits(exported), GRAY)
    again = structrep.expand(hf.ResNetForImageClassification(deploy.config), "repvgg")
    again.load_state_dict(safetensors.torch.load_file(export.training_time_path / "model.safetensors"))
    assert identical(again.state_dict(), exported.state_dict())


def test_mixed_precision_is_of_the_training_alone(tmp_path):
    model, trainer, export, _ = train(tmp_path, {}, bf16=True, save_strategy="no")
    deploy = hf.ResNetForImageClassification.from_pretrained(export.deploy_path)
    full = trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    assert agree(Logits(deploy), Logits(full), GRAY)
    assert {value.dtype for value in deploy.state_dict().values()} == {torch.float32, torch.int64}


def test_the_best_model_is_exported_where_the_trainer_loads_it(tmp_path):
    options = {"load_best_model_at_end": True, "metric_for_best_model": "eval_one_loss", "greater_is_better": False}
    model, trainer, export, _ = train(tmp_path, {}, learning_rate=0.02, **options)
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2"), "not the last"
    assert agree(Logits(hf.ResNetForImageClassification.from_pretrained(export.deploy_path)), Logits(model), GRAY)


class OfNoLibrary(nn.Module):
    """A model that knows nothing of transformers, but for what its trainer gives and wants."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2),
        )  # fmt: skip

    def forward(self, pixel_values, labels=None):
        logits = self.net(pixel_values)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"logits": logits} if loss is None else {"loss": loss, "logits": logits}


def test_a_model_of_no_library_is_saved_as_the_trainer_saves_it(tmp_path):
    hf.set_seed(0)
    model = structrep.expand(OfNoLibrary(), "repvgg")
    data = [{"pixel_values": image, "labels": index % 2} for index, image in enumerate(GRAY)]
    arguments = hf.TrainingArguments(
        str(tmp_path), max_steps=2, use_cpu=True, disable_tqdm=True, report_to=[], save_strategy="no"
    )
    trainer = hf.Trainer(model, arguments, train_dataset=data)
    export = TrainerExport(trainer)
    trainer.add_callback(export)
    trainer.train()
    deploy = OfNoLibrary()
    deploy.load_state_dict(safetensors.torch.load_file(export.deploy_path / "model.safetensors"))
    assert agree(deploy.net, model.net, GRAY)


def test_transformers_refuses_before_training(tmp_path):
    with pytest.raises(BadInput, match="ResNetForImageClassification has none: put them in before the optimizer"):
        train(tmp_path, {}, block="")
    assert not list(tmp_path.iterdir())
    with pytest.raises(BadInput, match=r"the optimizer has none of the .* make it of model\.parameters"):
        train(tmp_path, {}, early=True)
    assert not list(tmp_path.iterdir())
    with pytest.raises(BadInput, match="Sequential is no Trainer"):
        TrainerExport(nn.Sequential())
