"""A forward that is written anew enters the contexts that it was written with: gradients, inference mode, autocast."""

import inspect

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import structrep
from tests.support import models
from tests.support.models import Two, settled
from tests.support.truth import EXACT, relative_error, says

X = torch.randn(2, 4, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Flagged(Two):
    """With a third layer, a norm and a flag."""

    def __init__(self):
        super().__init__()
        self.c, self.n, self.flag = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), False


def both(model, x):
    return model.n(model.a(x)) + model.b(x)


def made(forward):
    return models.made(forward, Flagged)


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


@pytest.mark.parametrize("forward", FORWARDS.values(), ids=FORWARDS)
def test_a_written_forward_enters_what_it_was_written_with(forward):
    for inputs in ((), (X,)):
        model = made(forward)
        deploy = structrep.reparameterize(model, *inputs)
        assert isinstance(deploy.n, nn.Identity) or deploy.n is None
        for one, other in zip(gradient(model), gradient(deploy), strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                assert (one.requires_grad, one.is_inference()) == (other.requires_grad, other.is_inference())
                assert relative_error(other, one) < EXACT


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
    deploy = says(structrep.plan(model), 1, "Unreadable").apply()
    model.flag = deploy.flag = True
    assert [one is None for one in gradient(model)] == [one is None for one in gradient(deploy)]
    assert relative_error(deploy(X), model(X)) < EXACT


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
        assert relative_error(deploy(X), model(X)) < EXACT
    with torch.enable_grad():
        assert not deploy(X.clone().requires_grad_()).requires_grad


# --- modes ------------------------------------------------------------------------------------------------------------


class Doubled(TorchFunctionMode):
    """Convolutions give twice what they did."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        given = function(*args, **(kwargs or {}))
        return given * 2 if getattr(function, "__name__", "") == "conv2d" else given


class DoubledBelow(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = function(*args, **(kwargs or {}))
        return given * 2 if function is torch.ops.aten.convolution.default else given


def in_part(mode):
    def forward(self, x):
        with mode():
            y = self.a(x)
        return self.n(y)

    return forward


def as_a_whole(mode):
    def forward(self, x):
        with mode():
            return self.n(self.a(x))

    return forward


def around_a_block(mode):
    def forward(self, x):
        with mode():
            return self.block(x)

    return forward


@pytest.mark.parametrize("mode", [Doubled, DoubledBelow])
@pytest.mark.parametrize("make", [in_part, as_a_whole, around_a_block])
def test_a_mode_may_change_what_anything_does(make, mode):
    for inputs in ((), (X,)):
        torch.manual_seed(0)
        model = type("Made", (Flagged,), {"forward": make(mode)})()
        if make is around_a_block:
            model.block = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
        settled(model)
        plan = structrep.plan(model, *inputs)
        assert not plan.merges
        assert any(f"runs in {mode.__qualname__}" in str(one) for one in plan.refusals)


def test_beside_a_mode_a_forward_is_not_written_anew():
    def forward(self, x):
        with Doubled():
            y = self.c(x)
        return y + both(self, x)

    model = made(forward)
    plan = structrep.plan(model, X)
    assert relative_error(plan.apply()(X), model(X)) < EXACT
    assert [merge.edit for merge in plan.merges] == ["edit"]


def test_gradients_switched_off_by_what_torch_itself_calls():
    def forward(self, x):
        before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        y = self.a(x)
        torch._C._set_grad_enabled(before)
        return self.n(y)

    model = made(forward)
    plan = structrep.plan(model)
    assert not plan.merges
    assert model(X).requires_grad


class RunsItselfUnderAutocast(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.n = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.n(self.c(x))


def test_a_norm_under_the_models_own_autocast_stays_with_that_reason():
    plan = structrep.plan(RunsItselfUnderAutocast().eval())
    assert not plan.merges
    assert ["runs under autocast" in refusal.reason for refusal in plan.refusals] == [True]


class OutOfAutocast(nn.Module):
    """As EfficientViT's attention: something is computed out of autocast, on whatever device the input is."""

    def __init__(self):
        super().__init__()
        self.qkv, self.mix, self.norm = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.qkv(x).relu()
        with torch.autocast(device_type=y.device.type, enabled=False):
            y = y / (y.sum(1, keepdim=True) + 1)
        return self.norm(self.mix(y))


def test_autocast_for_the_device_of_a_value_keeps_nothing_out():
    model, x = settled(OutOfAutocast()), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    plan = structrep.plan(model)
    assert [(merge.where, merge.edit) for merge in plan.merges] == [("mix", "swap")]
    assert not plan.refusals
    assert relative_error(plan.apply()(x), model(x)) < 1e-14
