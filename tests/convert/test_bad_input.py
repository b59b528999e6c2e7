"""Models that are odd, broken or huge: a clear error or a right answer, and the user's model as it was."""

import copy
import math
import sys

import pytest
import torch
from torch import nn

import structrep
from structrep.blocks import RepVGGBlock2d
from structrep.errors import BadInput, StructrepError, VerificationError
from tests.support.models import settled
from tests.support.truth import CLOSE, EXACT, relative_error, says

X = torch.randn(2, 3, 8, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def block(inside=3, out=4):
    torch.manual_seed(0)
    return settled(nn.Sequential(RepVGGBlock2d(inside, out, 3, padding=1), nn.ReLU()))


def unchanged(model, state):
    after = model.state_dict()
    return after.keys() == state.keys() and all(
        torch.equal(after[k].nan_to_num(), state[k].nan_to_num()) for k in state
    )


def test_weights_that_are_no_numbers():
    for example in (False, True):
        model = nn.Sequential(block(), block(4, 4))
        model[0][0].dense.conv.weight.data[0, 0, 1, 1] = math.nan
        state = copy.deepcopy(model.state_dict())
        deploy = structrep.reparameterize(model, X if example else None)
        assert unchanged(model, state)
        truth, found = model(X), deploy(X)
        assert torch.equal(truth.isfinite(), found.isfinite())
        assert relative_error(found, truth) < CLOSE
        assert isinstance(deploy[1][0], nn.Conv2d), "what is not touched by it is merged"
        assert any("only finite numbers can be merged" in r.reason for r in structrep.plan(model).refusals)


@pytest.mark.parametrize("number", [math.inf, -math.inf])
def test_weights_that_are_infinite(number):
    """Sums of infinities are numbers or none by the order of summands: with example inputs that is found out."""
    model = nn.Sequential(block(), block(4, 4))
    model[0][0].dense.conv.weight.data[0, 0, 1, 1] = number
    state = copy.deepcopy(model.state_dict())
    deploy = structrep.reparameterize(model)
    truth, found = model(X), deploy(X)
    both = truth.isfinite() & found.isfinite()
    assert relative_error(found[both], truth[both]) < CLOSE
    with pytest.raises(VerificationError):
        structrep.reparameterize(model, X)
    assert unchanged(model, state)


@pytest.mark.parametrize("what", [None, 1, "resnet18", nn.Conv2d, torch.ones(3), {"a": nn.ReLU()}, [nn.ReLU()], abs])
def test_what_is_no_model(what):
    with pytest.raises(BadInput, match=r"no torch.nn.Module instance"):
        structrep.reparameterize(what)


INPUTS = [
    torch.ones(2, 3), torch.ones(2, 4, 8, 8), torch.ones(2, 3, 1, 1, 1), (torch.ones(1, 3, 8, 8),) * 2, (X, X),
    {"y": torch.ones(1, 3, 8, 8)}, {"input": X, "more": 1}, torch.ones(1, 3, 8, 8, dtype=torch.int64), torch.ones(0),
    torch.ones(4), (torch.ones(0),), 3, "x", (), (None,), None.__class__,
]  # fmt: skip


@pytest.mark.parametrize("inputs", INPUTS)
def test_inputs_that_the_model_does_not_take(inputs):
    model = block()
    state = copy.deepcopy(model.state_dict())
    for inplace in (False, True):
        with pytest.raises(BadInput):
            structrep.reparameterize(model, inputs, inplace=inplace)
        assert unchanged(model, state)


def test_inputs_that_the_model_does_not_take_are_named():
    with pytest.raises(BadInput, match=r"\(1, 5, 6, 6\)"):
        structrep.plan(block(), torch.ones(1, 5, 6, 6, dtype=torch.float64))
    with pytest.raises(BadInput, match=r"str.*tensor"):
        structrep.plan(block(), "an image")


def test_an_empty_batch_and_an_empty_image():
    for shape in ((0, 3, 8, 8), (1, 3, 1, 1)):
        x = torch.zeros(shape, dtype=torch.float64)
        deploy = says(structrep.plan(block(), x), 1).reparameterize(x)
        assert deploy(x).shape == block()(x).shape
    with pytest.raises(StructrepError):
        structrep.reparameterize(nn.Sequential(nn.Conv2d(3, 4, 5), nn.BatchNorm2d(4)).eval(), torch.ones(1, 3, 2, 2))


class Cyclic(nn.Module):
    """A child that knows its parent, as detection heads do."""

    def __init__(self, registered):
        super().__init__()
        self.block = block()
        if registered:
            self.block.parent = self
        else:
            self.block.__dict__["parent"] = self

    def forward(self, x):
        return self.block[1](self.block[0](x))


def test_a_child_that_knows_its_parent():
    model = Cyclic(registered=False).eval()
    deploy = structrep.reparameterize(model, X)
    assert relative_error(deploy(X), model(X)) < CLOSE
    assert deploy.block.parent is deploy
    assert model.block.parent is model
    assert isinstance(deploy.block[0], nn.Conv2d)


def test_a_module_that_is_its_own_descendant():
    with pytest.raises(BadInput, match=r"block.parent is a module that holds it"):
        structrep.reparameterize(Cyclic(registered=True))


@pytest.mark.parametrize("count", [3_000])  # more than Python lets calls be nested
def test_thousands_of_layers(count):
    layers = [nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.ReLU()]
    model = settled(nn.Sequential(*(copy.deepcopy(layers[i % 3]) for i in range(count))))
    deploy = structrep.plan(model).apply()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in deploy.modules())
    x = torch.randn(1, 1, 2, 2, dtype=torch.float64)
    assert relative_error(deploy(x), model(x)) < 1e-9


class Nested(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.inner = Nested(depth - 1) if depth else nn.Identity()

    def forward(self, x):
        return self.inner(self.norm(self.conv(x)).relu())


def at_depth(depth, function):
    return function() if depth == 0 else at_depth(depth - 1, function)


@pytest.mark.parametrize("depth", [200, 700])
def test_modules_nested_deeply_by_a_caller_that_is_deep_itself(depth):
    """Where the model itself runs, whatever a trace puts around its calls."""
    model, limit = settled(Nested(20)), sys.getrecursionlimit()

    def plans():
        model(X)
        return structrep.plan(model), structrep.plan(model, X)

    for plan in at_depth(depth, plans):
        assert len(plan.merges) == 21
        assert not plan.refusals
    assert at_depth(depth, lambda: structrep.reparameterize(model, X)(X)).shape == model(X).shape
    assert sys.getrecursionlimit() == limit


def test_modules_nested_deeply():
    model = settled(Nested(60))
    deploy = structrep.reparameterize(model)
    assert relative_error(deploy(X), model(X)) < EXACT
    assert not any(isinstance(m, nn.BatchNorm2d) for m in deploy.modules())


class Redirects(nn.Module):
    """A wrapper that gives the attributes of what it wraps."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x):
        return self[1](self[0](x))

    def __getitem__(self, index):
        return self.inner[index]


class Claims(nn.Module):
    """Has every attribute."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__"):
                raise
            return 1

    def forward(self, x):
        return self.norm(self.conv(x)) * self.scale


class Refuses(nn.Module):
    """Lets nobody look at attributes that it does not know, nor set any."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.__dict__["closed"] = True

    def __setattr__(self, name, value):
        if self.__dict__.get("closed"):
            raise RuntimeError(f"{name} is set")
        super().__setattr__(name, value)

    def train(self, mode=True):
        return self

    def forward(self, x):
        return self.norm(self.conv(x)).relu() + 1


@pytest.mark.parametrize("make", [lambda: Redirects(block()), Claims, Refuses])
def test_attribute_tricks(make):
    model = make()
    for module in model.modules():
        module.__dict__["training"] = False
    settled(model)
    deploy = structrep.reparameterize(model, X)
    assert relative_error(deploy(X), model(X)) < CLOSE
    assert not any(isinstance(m, nn.BatchNorm2d) for m in deploy.modules())
    assert type(deploy).__name__ == type(model).__name__


class CannotBeCopied(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def __deepcopy__(self, memo):
        raise TypeError("a handle to a device")

    def forward(self, x):
        return self.conv(x)


def test_a_model_that_cannot_be_copied_is_an_error():
    with pytest.raises(BadInput, match=r"cannot be copied.*a handle to a device"):
        structrep.reparameterize(CannotBeCopied().eval())


def test_forwards_that_raise_or_need_more():
    class Raises(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = block()

        def forward(self, x):
            raise NotImplementedError("not today")

    model = Raises().eval()
    deploy = structrep.reparameterize(model)
    assert isinstance(deploy.inner[0], nn.Conv2d)  # the parts are worked on
    with pytest.raises(NotImplementedError, match="not today"):
        deploy(X)
    with pytest.raises(BadInput, match="not today"):
        structrep.reparameterize(model, X)


@pytest.mark.parametrize("setting", ["probe", "inexact_borders", "reserve"])
@pytest.mark.parametrize("given", [True, None, 3, [nn.ReLU()]])
def test_names_that_are_none(setting, given):
    with pytest.raises(BadInput, match=f"^{setting}=.*: give names of modules, or globs"):
        structrep.plan(nn.Sequential(nn.Conv2d(3, 3, 1)), X, **{setting: given})


def test_weights_in_float8_stay():
    """torch stores in it, and runs no layer."""
    model = block()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float8_e4m3fn)
    plan = structrep.plan(model)
    assert not plan.merges
    assert "rounded to float8_e4m3fn, which keeps 4 bits: cast the model to float32" in plan.refusals[0].reason
    assert model[0].dense.conv.weight.dtype == torch.float8_e4m3fn


def test_an_error_that_says_nothing_is_told_by_its_line():
    class Asserting(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            y = self.norm(self.conv(x))
            if type(x) is not torch.Tensor:
                raise AssertionError
            return y

    (untraced,) = structrep.plan(settled(Asserting())).refusals
    assert "AssertionError: raise AssertionError (test_bad_input.py, line " in untraced.reason
