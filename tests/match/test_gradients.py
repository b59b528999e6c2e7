"""A forward that asks whether a value has a gradient, and computes the same either way.

Activation checkpointing (`if self.with_cp and x.requires_grad`) and frozen norms do, which is found out by following
them told otherwise. What does something else then is not merged across.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import structrep
from tests.support.models import noise
from tests.support.truth import check, relative_error

X = noise(2, 4, 6, 6)
WITH_GRADIENT = noise(2, 4, 6, 6).requires_grad_()


class Block(nn.Module):
    """A block as OpenMMLab writes them."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.relu, self.downsample, self.with_cp = nn.ReLU(inplace=True), None, True

    def forward(self, x):
        def _inner_forward(x):
            identity = x
            out = self.relu(self.norm1(self.conv1(x)))
            out = self.norm2(self.conv2(out))
            if self.downsample is not None:
                identity = self.downsample(x)
            out += identity
            return out

        if self.with_cp and x.requires_grad:
            out = checkpoint(_inner_forward, x, use_reentrant=False)
        else:
            out = _inner_forward(x)
        return self.relu(out)


class Reentrant(Block):
    def forward(self, x):
        def _inner_forward(x):
            return self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x))))) + x

        if self.with_cp and x.requires_grad:
            return checkpoint(_inner_forward, x, use_reentrant=True)
        return _inner_forward(x)


class Branches(Block):
    def forward(self, x):
        def _inner_forward(x):
            out = self.norm1(self.conv1(x)) + self.norm2(self.conv2(x))
            if self.downsample is not None:
                out += self.downsample(x)
            return out

        if self.with_cp and x.requires_grad:
            return checkpoint(_inner_forward, x, use_reentrant=False)
        return _inner_forward(x)


@pytest.mark.parametrize("block", [Block, Reentrant])
def test_activation_checkpointing_of_a_local_function(block):
    check(nn.Sequential(block(), block()), X, WITH_GRADIENT, merges=4, norm=0)


def test_branches_in_a_checkpointed_function():
    check(nn.Sequential(Branches(), Branches()), X, WITH_GRADIENT, merges=2, conv=2, norm=0)


def test_gradients_come_through_a_checkpoint():
    deploy = check(Reentrant(), X, merges=2, norm=0)
    deploy(X).sum().backward()
    assert all(one.grad is not None for one in deploy.parameters())


class Frozen(nn.BatchNorm2d):
    def forward(self, x):
        if x.requires_grad:
            return super().forward(x)
        return super().forward(x)


def test_a_norm_that_asks_and_does_the_same():
    check(nn.Sequential(nn.Conv2d(4, 4, 3), Frozen(4)), X, WITH_GRADIENT, merges=1, norm=0)


class Otherwise(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * (2 if x.requires_grad else 1)


class TwoOfThem(nn.Module):
    """The same for each of two questions alone, and another for both."""

    def __init__(self):
        super().__init__()
        self.a, self.n = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x, z):
        factor = 1
        if x.requires_grad and z.requires_grad:
            factor = 3
        return self.n(self.a(x)) * factor


def test_what_gradients_change_is_refused():
    check(nn.Sequential(nn.Conv2d(4, 4, 3), Otherwise(4)), X, WITH_GRADIENT, merges=0, refused="Isolated")


class Settings(Block):
    """Asks more of its module where there are gradients, which may be set to something else."""

    factor = 1

    def forward(self, x):
        def _inner_forward(x):
            return self.norm1(self.conv1(x)) + self.conv2(x)

        return _inner_forward(x) * self.factor if x.requires_grad else _inner_forward(x)


def test_settings_that_are_asked_for_gradients_alone():
    check(Settings(), X, WITH_GRADIENT, merges=0, refused="ExampleOnly")


SEEN = []


class Tells(Block):
    def forward(self, x):
        def _inner_forward(x):
            return self.norm1(self.conv1(x)) + self.conv2(x)

        if x.requires_grad:
            SEEN.append(1)
        return _inner_forward(x)


class ReturnsBefore(Block):
    def forward(self, x):
        def _inner_forward(x):
            return self.norm1(self.conv1(x)) + self.conv2(x)

        if x.requires_grad:
            return _inner_forward(x)
        SEEN.append(1)
        return _inner_forward(x)


@pytest.mark.parametrize("block", [Tells, ReturnsBefore])
def test_what_somebody_is_told_for_an_answer_goes_on_being_told(block):
    model = block().eval().double()
    SEEN.clear()
    deploy = structrep.plan(model).apply()
    SEEN.clear()
    for x in (X, WITH_GRADIENT):
        deploy(x)
    assert SEEN == [1]


def test_several_questions_are_taken_together():
    both = (WITH_GRADIENT, WITH_GRADIENT)
    check(TwoOfThem(), (X, X), (WITH_GRADIENT, X), (X, WITH_GRADIENT), both, merges=1)


class Rewritten(nn.Module):
    """A norm as detectron2 writes it: other operations where gradients are needed."""

    def __init__(self, channels):
        super().__init__()
        self.eps = 1e-5
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x):
        if x.requires_grad:
            return self.scaled(x)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)

    def scaled(self, x):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        bias = self.bias - self.running_mean * scale
        dtype = x.dtype
        return x * scale.reshape(1, -1, 1, 1).to(dtype) + bias.reshape(1, -1, 1, 1).to(dtype)


class NormInside(nn.Conv2d):
    def __init__(self, norm):
        super().__init__(4, 4, 3)
        self.norm = norm

    def forward(self, x):
        return F.relu(self.norm(F.conv2d(x, self.weight, self.bias)))


@pytest.mark.parametrize("around", [NormInside, lambda norm: nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), norm)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_norm_that_is_written_otherwise_for_gradients(around, dtype):
    torch.manual_seed(0)
    model = around(Rewritten(4)).to(dtype).eval()
    for inputs in ((), (X.to(dtype),)):
        plan = structrep.plan(model, *inputs)
        assert len(plan.merges) == 1, plan
        for x in (X.to(dtype), WITH_GRADIENT.to(dtype)):
            assert relative_error(plan.apply()(x), model(x)) < (1e-12 if dtype is torch.float64 else 1e-5)


def rows(self, x):
    return x * self.weight.reshape(1, 1, 4, 1) + self.bias.reshape(1, -1, 1, 1)


@pytest.mark.parametrize(
    "scaled",
    [
        lambda self, x: Rewritten.scaled(self, x) * 2,
        lambda self, x: Rewritten.scaled(self, x) * (1 + 1e-9),
        lambda self, x: Rewritten.scaled(self, x) + 1e-9,
        lambda self, x: Rewritten.scaled(self, x).relu(),
        lambda self, x: Rewritten.scaled(self, x.flip(1)),
        lambda self, x: F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=1e-4),
        rows,
    ],
)
def test_a_norm_that_is_another_for_gradients_stays(scaled):
    torch.manual_seed(0)
    model = NormInside(type("Otherwise", (Rewritten,), {"scaled": scaled})(4)).double().eval()
    for inputs in ((), (noise(2, 4, 6, 6),)):
        plan = structrep.plan(model, *inputs)
        assert not plan.merges
        assert any("requires_grad" in one.reason for one in plan.refusals)
        for x in (X, WITH_GRADIENT):
            assert torch.equal(plan.apply()(x), model(x))
