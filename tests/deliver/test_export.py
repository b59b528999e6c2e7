"""Deploy models on their way out: ONNX, run by onnxruntime, and compiled by inductor."""

import hashlib
import shutil
import warnings

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from torch import nn

import structrep
from structrep.blocks import RepVGGBlock2d
from structrep.deliver.formats import checksum
from tests.foreign.cases import NETWORKS
from tests.match.test_shared_scales import Attention, Mixed
from tests.read.test_transposed import Up
from tests.support.models import settled, small
from tests.support.truth import CLOSE, relative_error, says
from tests.trace.test_follow import PadsItself


class Padded(nn.Module):
    """A forward with a function in it that was kept whole."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = PadsItself(3, 8, 3, 2, bias=False), nn.BatchNorm2d(8)

    def forward(self, x):
        return self.norm(self.conv(x)).relu()


def blocks():
    return nn.Sequential(RepVGGBlock2d(3, 8, 3, padding=1), nn.ReLU(), RepVGGBlock2d(8, 8, 3, 2, 1))


MODELS = {
    **{case.name: (case.make, (3, 12, 10)) for case in NETWORKS},
    "blocks": (blocks, (3, 9, 8)),
    "attention": (Attention, (4, 6, 5)),
    "mixed": (Mixed, (4, 6, 5)),
    "padded": (Padded, (3, 9, 8)),
    "up": (Up, (6, 5, 4)),
    "repghostnet": (lambda: small("repghostnet_050"), (3, 64, 64)),
}


def converted(name):
    make, size = MODELS[name]
    model = settled(make()).float()
    return model, structrep.reparameterize(model), torch.randn(2, *size, generator=torch.Generator().manual_seed(0))


def first(output):
    return next(iter(structrep.prove.run.tensors(output)))


@pytest.mark.parametrize("name", MODELS)
def test_onnx(name, tmp_path):
    """What onnxruntime makes of the exported deploy model is what the model gives."""
    model, deploy, x = converted(name)
    path = tmp_path / "deploy.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(deploy, (x,), path, dynamo=True, verbose=False)
        except Exception:
            with pytest.raises(Exception):  # noqa: B017, PT011
                torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
            pytest.skip("nor could the training-time model be exported")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    with torch.no_grad():
        truth = first(model(x)).numpy()
    assert np.abs(found - truth).max() <= 1e-4 * np.abs(truth).max()


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("name", ["blocks", "attention"])
def test_inductor(name):
    """torch.compile with its own code generator."""
    model, deploy, x = converted(name)
    torch._dynamo.reset()
    with torch.no_grad():
        found, truth = torch.compile(deploy)(x), model(x)
    assert float((found - truth).abs().max()) <= 1e-5 * float(truth.abs().max())


def test_what_is_left_to_merge_stops_an_export():
    model = settled(timm.create_model("repvgg_a0")).train()
    with pytest.raises(structrep.Unmerged, match=r"ByobNet has 22 merges left to do: stem.*and 14 more"):
        structrep.assert_merged(model)
    assert model.training
    deploy = structrep.reparameterize(model.eval())
    structrep.assert_merged(deploy)
    structrep.assert_merged(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()))


def test_the_checksum_is_of_names_dtypes_shapes_and_numbers():
    """Written down in files, so it stays what it was."""
    model = nn.Module()
    model.a = nn.Parameter(torch.arange(6.0).reshape(2, 3).t())
    model.register_buffer("b", torch.tensor([1.5, -2.0]).bfloat16())
    model.register_buffer("c", torch.tensor(True))
    model.register_buffer("d", torch.zeros(0, 3))
    model.register_buffer("e", torch.arange(8)[::2])
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    kept = "662229a312e47cf35a15e8956beeeada900e3c0ece7dff18c8772e2195a172ca"
    assert checksum(model) == digest.hexdigest() == kept
    model.e[0] = 1
    assert checksum(model) != kept


class Sized(nn.Module):
    """Two branches whose sizes agree for even inputs."""

    def __init__(self):
        super().__init__()
        self.conv, self.pool = nn.Conv2d(4, 4, 3, 2, 1), nn.AvgPool2d(2, 2, ceil_mode=True)

    def forward(self, x):
        return self.conv(x) + self.pool(x)


@pytest.mark.parametrize("make", [
    lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)), Sized,
    lambda: nn.Sequential(nn.Flatten(), nn.Linear(256, 4), nn.BatchNorm1d(4)),
])  # fmt: skip
def test_layers_of_a_deploy_model_can_be_scripted_and_traced_by_others(make):
    torch.manual_seed(0)
    model, x = settled(make()), torch.randn(1, 4, 8, 8, dtype=torch.float64)
    deploy = says(structrep.plan(model, x), 1).reparameterize(x)
    truth = model(x)
    assert relative_error(torch.fx.symbolic_trace(deploy)(x), truth) < CLOSE
    if not isinstance(model, Sized):  # whose forward is written anew, in terms that scripts do not know
        assert relative_error(torch.jit.script(deploy)(x), truth) < CLOSE
