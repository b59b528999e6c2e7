"""Deploy models on the GPU: every rule's example and ten models, in every dtype and memory format, compiled, as a CUDA
graph; and how long they take."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import nn

import structrep
from structrep.algebra import precision
from structrep.registry import default
from tests.needs.gpu.near import Error
from tests.support.models import example_input, settled
from tests.support.truth import relative_error

pytestmark = pytest.mark.gpu

HOW: dict[str, dict[str, Any]] = {
    "float32": {},
    "float32, TF32": {"tf32": True},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "autocast to float16": {"autocast": torch.float16},
    "float32, channels last": {"channels_last": True},
    "float16, channels last": {"channels_last": True, "dtype": torch.float16},
}
FAMILIES = [rule for rule in default if not rule.law]
MODELS = [
    "repvgg_a0", "mobileone_s0", "fastvit_t8", "repvit_m0_9", "repghostnet_050", "resnet18", "mobilenetv3_small_100",
    "efficientnet_b0", "densenet121", "regnetx_002",
]  # fmt: skip


def rounding(how: dict[str, Any]) -> float:
    """The largest relative rounding of one number in a setting: TensorFloat-32 has ten bits, as float16."""
    coarse = torch.float16 if how.get("tf32") else how.get("autocast") or how.get("dtype") or torch.float32
    return torch.finfo(coarse).eps


def calibrated(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """A settled model of which no number overflows in float16: its norms know the variance of what they are given.

    None makes its input larger, or what sets two inputs apart would be rounding's.
    """

    def widen(norm: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        variance = args[0].transpose(0, 1).flatten(1).var(1)
        norm.running_var = torch.maximum(norm.running_var, variance)

    model = settled(model).float()
    norms = [one for one in model.modules() if isinstance(one, nn.modules.batchnorm._NormBase)]
    hooks = [norm.register_forward_pre_hook(widen) for norm in norms]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return model


@pytest.fixture(scope="module")
def converted(device):
    """Models and their deploy models, made once."""
    made = {}

    def make(name):
        if name not in made:
            torch.manual_seed(0)
            x = torch.randn(8, 3, 128, 128)
            model = calibrated(timm.create_model(name, num_classes=100), x).to(device).requires_grad_(False)
            x = x.to(device)
            plan = structrep.plan(model, x)
            plan.prove()
            assert plan.merges, name
            assert bool(model(x[:2]).isfinite().all()), name  # or there is nothing to compare
            made[name] = model, plan, plan.apply(), x
        return made[name]

    return make


@pytest.mark.parametrize("rule", FAMILIES, ids=lambda rule: rule.name)
def test_a_rule_s_example(rule, device, results):
    torch.manual_seed(0)
    model = settled(nn.Sequential(rule.example())).float()
    x = example_input(rule, model).float().to(device)
    model.to(device)
    plan = structrep.plan(model, x)
    assert plan.merges
    assert bool(model(x).isfinite().all())  # or there is nothing to compare
    assert {p.device.type for p in plan.apply().parameters()} == {device.type}
    wrong = []
    for how, settings in HOW.items():
        found = plan.verify(x, device=device, **settings)
        near = Error(found.error, found.noise, rounding(settings))
        results.error(rule.name, how, near)
        if near.why_not or not found.ok:
            wrong.append(f"{how}: {near.why_not}\n{found}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("rule", FAMILIES, ids=lambda rule: rule.name)
def test_a_rule_s_example_where_tensors_are_made_there_by_default(rule, device):
    model = settled(nn.Sequential(rule.example()))
    x = example_input(rule, model)
    truth = model(x)
    with device:
        plan = structrep.plan(model.to(device), x.to(device))
        deploy = plan.reparameterize(x.to(device))
    assert plan.merges
    assert {one.device.type for one in deploy.state_dict().values()} == {device.type}
    assert relative_error(deploy(x.to(device)).cpu(), truth) < 1e-12


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", MODELS)
def test_a_model(name, how, device, converted, results):
    _, plan, deploy, x = converted(name)
    found = plan.verify(x[:2], deploy, device=device, **HOW[how])
    near = Error(found.error, found.noise, rounding(HOW[how]))
    results.error(name, how, near)
    assert not near.why_not, f"{near.why_not}\n{found}"
    assert found.ok, found


@pytest.mark.alone
@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0", "resnet18"])
def test_compiled(name, device, converted, results):
    model, _, deploy, x = converted(name)
    with precision.whole(), torch.no_grad():
        near = errors(model, x, *(torch.compile(copy.deepcopy(one))(x) for one in (model, deploy)))
    results.error(name, "compiled", near)
    assert not near.why_not, near.why_not


@pytest.mark.alone
@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0", "resnet18"])
def test_as_a_cuda_graph(name, device, converted, results, timed):
    if device.type != "cuda":
        pytest.skip("graphs are CUDA's")
    model, _, deploy, x = converted(name)
    with precision.whole():
        graphs = [Captured(one, x) for one in (model, deploy)]
        near = errors(model, x, *(replay() for replay in graphs))
    results.error(name, "CUDA graph", near)
    results.latency(name, "float32, CUDA graph", *timed(*graphs))
    assert not near.why_not, near.why_not


def errors(model, x, *outputs):
    """How far what the training-time model and its deploy model gave is from the truth, in float32."""
    truth = copy.deepcopy(model).double()(x.double())
    noise, error = (relative_error(one, truth) for one in outputs)
    return Error(error, noise, torch.finfo(torch.float32).eps)


class Captured:
    """A model as a CUDA graph, which reads the memory of the input that it was captured with, as long as it lives."""

    def __init__(self, model, x):
        self.input = x.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(stream):
            for _ in range(3):
                model(self.input)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(self.graph):
            self.output = model(self.input)

    def __call__(self):
        self.graph.replay()
        return self.output


@pytest.mark.alone
@pytest.mark.parametrize("how", ["float32", "float16", "float16, channels last"])
@pytest.mark.parametrize("name", MODELS)
def test_latency(name, how, device, converted, results, timed):
    model, _, deploy, x = converted(name)
    dtype = HOW[how].get("dtype", torch.float32)
    memory = torch.channels_last if "channels last" in how else torch.contiguous_format
    both = [copy.deepcopy(one).to(dtype).to(memory_format=memory) for one in (model, deploy)]
    given = x.to(dtype).contiguous(memory_format=memory)
    with torch.no_grad():
        before, after = timed(*(lambda one=one: one(given) for one in both))
    results.latency(name, how, before, after)
