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
from structrep.proof import relative_error
from structrep.registry import default
from tests.models import example_input, settled

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


@pytest.fixture(scope="module")
def converted(device):
    """Models and their deploy models, made once."""
    made = {}

    def make(name):
        if name not in made:
            torch.manual_seed(0)
            model = settled(timm.create_model(name, num_classes=100)).float().to(device).requires_grad_(False)
            x = torch.randn(8, 3, 128, 128, device=device)
            plan = structrep.plan(model, x)
            plan.prove()
            made[name] = model, plan, plan.apply(), x
        return made[name]

    return make


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("rule", FAMILIES, ids=lambda rule: rule.name)
def test_a_rule_s_example(rule, how, device, measured):
    torch.manual_seed(0)
    model = settled(nn.Sequential(rule.example())).float()
    x = example_input(rule, model).float().to(device)
    model.to(device)
    plan = structrep.plan(model, x)
    assert {p.device.type for p in plan.apply().parameters()} == {device.type}
    found = plan.verify(x, device=device, **HOW[how])
    measured.errors.append((rule.name, how, found.error, found.noise))
    assert found.ok, found


@pytest.mark.parametrize("rule", FAMILIES, ids=lambda rule: rule.name)
def test_a_rule_s_example_where_tensors_are_made_there_by_default(rule, device):
    model = settled(nn.Sequential(rule.example()))
    x = example_input(rule, model)
    truth = model(x)
    with device:
        deploy = structrep.reparameterize(model.to(device), x.to(device))
    assert {one.device.type for one in deploy.state_dict().values()} == {device.type}
    assert relative_error(deploy(x.to(device)).cpu(), truth) < 1e-12


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", MODELS)
def test_a_model(name, how, device, converted, measured):
    _, plan, deploy, x = converted(name)
    found = plan.verify(x[:2], deploy, device=device, **HOW[how])
    measured.errors.append((name, how, found.error, found.noise))
    assert found.ok, found


@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0", "resnet18"])
def test_compiled(name, device, converted, measured):
    model, _, deploy, x = converted(name)
    truth = copy.deepcopy(model).double()(x.double())
    noise = relative_error(torch.compile(copy.deepcopy(model))(x), truth)
    error = relative_error(torch.compile(copy.deepcopy(deploy))(x), truth)
    measured.errors.append((name, "compiled", error, noise))
    assert error <= 8 * noise


@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0", "resnet18"])
def test_as_a_cuda_graph(name, device, converted, measured, timed):
    if device.type != "cuda":
        pytest.skip("graphs are CUDA's")
    model, _, deploy, x = converted(name)
    graphs = [captured(one, x) for one in (model, deploy)]
    truth = copy.deepcopy(model).double()(x.double())
    noise, error = (relative_error(replay(), truth) for replay in graphs)
    measured.errors.append((name, "CUDA graph", error, noise))
    measured.latencies.append((name, "float32, CUDA graph", *timed(*graphs)))
    assert error <= 8 * noise


def captured(model, x):
    """A model as a CUDA graph; a function that runs it and gives its output."""
    given = x.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(3):
            model(given)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        result = model(given)

    def replay():
        graph.replay()
        return result

    return replay


@pytest.mark.parametrize("how", ["float32", "float16", "float16, channels last"])
@pytest.mark.parametrize("name", MODELS)
def test_latency(name, how, device, converted, measured, timed):
    model, _, deploy, x = converted(name)
    dtype = HOW[how].get("dtype", torch.float32)
    memory = torch.channels_last if "channels last" in how else torch.contiguous_format
    both = [copy.deepcopy(one).to(dtype).to(memory_format=memory) for one in (model, deploy)]
    given = x.to(dtype).contiguous(memory_format=memory)
    with torch.no_grad():
        before, after = timed(*(lambda one=one: one(given) for one in both))
    measured.latencies.append((name, how, before, after))
