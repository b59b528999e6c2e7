"""Models whose weights are not on the CPU: on a device that is one by name alone, and refuses to meet tensors here."""

import contextlib

import pytest
import torch
from torch import nn

import structrep
from structrep.registry import default
from tests.support import pretend_device
from tests.support.models import example_input, settled, small
from tests.support.truth import CLOSE, relative_error

FAMILIES = [rule for rule in default if not rule.law]
MODELS = ["repvgg_a0", "fastvit_t8", "repghostnet_050", "test_vit"]


def test_tensors_of_two_devices_do_not_meet():
    with pretend_device.device() as there:
        model = nn.Conv2d(2, 2, 3).to(there)
        assert model.weight.device == there
        with pytest.raises(RuntimeError, match="same device"):
            model(torch.zeros(1, 2, 4, 4))


@pytest.mark.parametrize("rule", FAMILIES, ids=lambda rule: rule.name)
def test_a_rule_s_example(rule):
    for by_default in (False, True):
        model = settled(nn.Sequential(rule.example()))
        x = example_input(rule, model)
        truth = model(x)
        with pretend_device.device() as there, there if by_default else contextlib.nullcontext():
            model.to(there)
            plan = structrep.plan(model)
            plan.prove()
            assert [merge.rules for merge in plan.merges] == [(rule.name,)]
            deploy = plan.apply()
            assert {one.device for one in deploy.state_dict().values()} == {there}
            assert relative_error(deploy(x.to(there)).cpu(), truth) < CLOSE


@pytest.mark.parametrize("rule", FAMILIES, ids=lambda rule: rule.name)
def test_a_rule_s_example_on_a_device_without_float64(rule):
    model = settled(nn.Sequential(rule.example())).float()
    x = example_input(rule, model).float()
    expected = structrep.plan(model).apply().state_dict()
    with pretend_device.device(float64=False) as there:
        model.to(there)
        with pytest.raises(TypeError, match="float64"):
            x.to(there).double()
        plan = structrep.plan(model)
        plan.prove()
        assert [merge.rules for merge in plan.merges] == [(rule.name,)]
        for key, value in plan.apply().state_dict().items():
            assert value.device == there
            assert torch.equal(value.cpu(), expected[key])


@pytest.mark.parametrize("name", MODELS)
def test_a_model(name):
    torch.manual_seed(0)
    model = settled(small(name)).float()
    x = torch.randn(2, 3, 160, 160) if name == "test_vit" else torch.randn(2, 3, 64, 64)
    expected = structrep.plan(model, x).reparameterize(x)
    with pretend_device.device() as there:
        model.to(there)
        deploy = structrep.reparameterize(model, verify=False)
        assert {one.device for one in deploy.state_dict().values()} == {there}
        for key, value in deploy.state_dict().items():
            assert torch.equal(value.cpu(), expected.state_dict()[key]), key
