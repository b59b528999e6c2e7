"""A forward that is written anew enters the contexts that it was written with: gradients, inference mode, autocast."""

import inspect

import pytest
import torch
from torch import nn

import structrep
from tests.models import relative_error, settled

X = torch.randn(2, 4, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Two(nn.Module):
    """Two branches, which some forward adds."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.n, self.flag = nn.BatchNorm2d(4), False


def both(model, x):
    return model.n(model.a(x)) + model.b(x)


def made(forward):
    torch.manual_seed(0)
    return settled(type("Made", (Two,), {"forward": forward})())


def gradient(model):
    """What a model gives, and its gradient, if it has one."""
    x = X.clone().requires_grad_()
    given = model(x)
    if given.requires_grad:
        given.sum().backward()
    return given, x.grad


def frozen(self, x):
    with torch.no_grad():
        return both(self, x)


@torch.no_grad()
def frozen_as_a_whole(self, x):
    return both(self, x).relu()


@torch.inference_mode()
def inferring(self, x):
    return both(self, x)


def frozen_body(self, x):
    with torch.no_grad():
        y = both(self, x)
        with torch.enable_grad():
            y = self.c(y)
    return y.relu()


def frozen_by_a_setting(self, x):
    with torch.set_grad_enabled(self.flag):
        y = both(self, x)
    return self.c(y)


def frozen_weight(self, x):
    with torch.no_grad():
        weight = self.c.weight * 2
    return nn.functional.conv2d(both(self, x).relu(), weight)


def one_detached_branch(self, x):
    return self.n(self.a(x).detach()) + self.b(x)


def detached(self, x):
    return self.n(self.a(x).detach()) + x


def in_its_own_dtype(self, x):
    with torch.autocast("cpu", enabled=False):
        return both(self, x)


def norm_in_its_own_dtype(self, x):
    with torch.autocast("cpu", enabled=False):
        y = self.n(self.a(x))
    return y.relu() + self.b(x)


FORWARDS = {one.__name__: one for one in (frozen, frozen_as_a_whole, inferring, frozen_body, frozen_by_a_setting,
            frozen_weight, one_detached_branch, detached, in_its_own_dtype, norm_in_its_own_dtype)}  # fmt: skip


@pytest.mark.parametrize("inputs", [(), (X,)], ids=["alone", "inputs"])
@pytest.mark.parametrize("forward", FORWARDS.values(), ids=FORWARDS)
def test_a_written_forward_enters_what_it_was_written_with(forward, inputs):
    model = made(forward)
    deploy = structrep.reparameterize(model, *inputs)
    assert isinstance(deploy.n, nn.Identity) or deploy.n is None
    for one, other in zip(gradient(model), gradient(deploy), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert (one.requires_grad, one.is_inference()) == (other.requires_grad, other.is_inference())
            assert relative_error(other, one) < 1e-12


@pytest.mark.parametrize("forward", [in_its_own_dtype, norm_in_its_own_dtype])
def test_out_of_autocast(forward):
    model = made(forward).float()
    deploy = structrep.reparameterize(model)
    with torch.autocast("cpu", torch.bfloat16):
        truth, found = model(X.float()), deploy(X.float())
    assert found.dtype == truth.dtype
    assert relative_error(found, truth) < (1e-5 if forward is in_its_own_dtype else 2e-2)


def test_blocks_stand_where_they_stood():
    source = inspect.getsource(type(structrep.reparameterize(made(frozen_body))).forward)
    assert "with torch.no_grad():\n        y = self.reparam_conv(x)" in source
    assert "        with torch.enable_grad():\n            y = self.c(y)" in source
    torch.jit.script(structrep.reparameterize(made(frozen)).float())


def test_a_context_that_hangs_on_a_setting_goes_on_hanging_on_it():
    model = made(frozen_by_a_setting)
    deploy = structrep.reparameterize(model)
    model.flag = deploy.flag = True
    assert [one is None for one in gradient(model)] == [one is None for one in gradient(deploy)]
    assert relative_error(deploy(X), model(X)) < 1e-12


def test_no_merge_across_contexts():
    def forward(self, x):
        y = self.a(x)
        with torch.no_grad():
            return self.n(y)

    plan = structrep.plan(made(forward))
    assert not plan.merges
    assert "a in none, n in torch.no_grad()" in str(plan.refusals[0].reason)


def test_a_mode_that_is_set_for_good_is_set_still():
    def forward(self, x):
        torch.set_grad_enabled(False)
        return both(self, x)

    with torch.no_grad():
        model = made(forward)
        plan = structrep.plan(model)
        assert [merge.rules for merge in plan.merges] == [("repvgg",)]
        deploy = plan.apply()
        assert relative_error(deploy(X), model(X)) < 1e-12
    with torch.enable_grad():
        assert not deploy(X.clone().requires_grad_()).requires_grad
