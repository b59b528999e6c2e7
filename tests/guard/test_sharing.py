"""One layer, parameter or value in several places: what merges is right in all of them, and else it stays."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import structrep
from tests.support.models import Written, bn, conv, noise, randomised, settled
from tests.support.truth import CLOSE, EXACT, call, check, equal, relative_error, says

X, TINY = noise(2, 4, 5, 6), noise(1, 4, 1, 1)


def tied_weights():
    model = Written(lambda m, x: m.n1(m.a(x)) + F.relu(m.n2(m.b(x))), a=conv(), b=conv(), n1=bn(4), n2=bn(4))
    model.b.weight = model.a.weight
    return model


def tied_bias():
    model = Written(lambda m, x: m.n1(m.a(x)) + F.relu(m.n2(m.b(x))), a=conv(), b=conv(), n1=bn(4), n2=bn(4))
    model.b.bias = model.a.bias
    return model


def tied_norms():
    """Two norms that share their statistics and affines."""
    model = Written(lambda m, x: F.relu(m.n2(m.b(F.relu(m.n1(m.a(x)))))), a=conv(), b=conv(), n1=bn(4), n2=bn(4))
    model.n2.weight, model.n2.bias = model.n1.weight, model.n1.bias
    model.n2.running_mean, model.n2.running_var = model.n1.running_mean, model.n1.running_var
    return model


def weight_read_elsewhere():
    """The weight of a conv that merges is also a regulariser's input."""
    return Written(lambda m, x: (m.n(m.c(x)), m.c.weight.pow(2).sum()), c=conv(), n=bn(4))


def weight_scales_elsewhere():
    return Written(lambda m, x: m.n(m.c(x)) * m.c.weight.mean(), c=conv(), n=bn(4))


def two_names():
    """One conv and one norm, registered twice, called once."""
    model = Written(lambda m, x: F.relu(m.n(m.c(x))), c=conv(), n=bn(4))
    model.again, model.norm_again = model.c, model.n
    return model


def two_names_both_called():
    model = Written(lambda m, x: m.n(m.c(x)) + F.relu(m.again(x)), c=conv(), n=bn(4))
    model.again = model.c
    return model


class Siamese(nn.Module):
    """One backbone on two inputs."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(conv(3, 4), bn(4), nn.ReLU(), conv(4, 4), bn(4))
        self.head = nn.Linear(8, 2)

    def forward(self, a, b):
        a, b = self.backbone(a).mean((2, 3)), self.backbone(b).mean((2, 3))
        return self.head(torch.cat([a, b], 1))


class SiameseHalf(Siamese):
    """The backbone on one input, its first conv alone on the other."""

    def forward(self, a, b):
        return self.backbone(a).mean(), self.backbone[0](b)


class Recurrent(nn.Module):
    """One block, three times in a row, in its own forward's sum."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.na, self.nb = conv(), conv(k=1), bn(4), bn(4)

        def forward(self, x):
            return self.na(self.a(x)) + self.nb(self.b(x)) + x

    def __init__(self, times=3):
        super().__init__()
        self.block, self.times = Recurrent.Block(), times

    def forward(self, x):
        for _ in range(self.times):
            x = torch.tanh(self.block(x))
        return x


class RecurrentLinear(Recurrent):
    """The same without the tanh: three blocks in a row are one linear map, but share their weights."""

    def forward(self, x):
        for _ in range(self.times):
            x = self.block(x)
        return x


class NestedShare(nn.Module):
    """A block inside two different containers, each called twice."""

    def __init__(self):
        super().__init__()
        block = nn.Sequential(conv(), bn(4))
        self.one = nn.Sequential(block, nn.ReLU())
        self.two = nn.Sequential(block, nn.Sigmoid())

    def forward(self, x):
        return self.two(self.one(x)) + self.one(self.two(x))


class ReachesIn(nn.Module):
    """A parent that uses its block's inner layers on its own."""

    def __init__(self):
        super().__init__()
        self.block = Recurrent.Block()

    def forward(self, x):
        return torch.tanh(self.block(x)) + self.block.a(x)


class ReadsShapes(nn.Module):
    """Asks a child of its block for the size of its weight, and its input for device, dtype and shape."""

    def __init__(self):
        super().__init__()
        self.block = Recurrent.Block()

    def forward(self, x):
        assert x.dim() == 4 and x.shape[1] == self.block.a.in_channels  # noqa: PT018
        n, c, h, w = x.shape
        scale = 1.0 / math.sqrt(self.block.a.weight.shape[1])
        return (self.block(x) * scale).reshape(n, c, h * w).to(x.dtype)


# How many merges there are, for what others are refused, the model, and what one call of the deploy model runs.
SHARED = {
    "conv called twice, once with a norm, once without": (0, "Shared",
        lambda: Written(lambda m, x: m.n(m.c(x)) + F.relu(m.c(x)), c=conv(), n=bn(4)), {"conv": 2, "norm": 1}),
    "conv called twice, each with its own norm": (0, "Shared",
        lambda: Written(lambda m, x: F.relu(m.n(m.c(x))) + F.relu(m.p(m.c(x))), c=conv(), n=bn(4), p=bn(4)),
        {"conv": 2, "norm": 2}),
    "conv and norm called twice together": (0, "Shared",
        lambda: Written(lambda m, x: m.n(m.c(F.relu(m.n(m.c(x))))), c=conv(), n=bn(4)), {"conv": 2}),
    "one conv feeding two norms": (0, "Isolated",
        lambda: Written(lambda m, x: F.relu(m.n(y := m.c(x))) * torch.tanh(m.p(y)), c=conv(), n=bn(4), p=bn(4)),
        {"norm": 2}),
    "one norm fed by two convs": (2, "",
        lambda: Written(lambda m, x: F.relu(m.n(m.c(x))) * torch.tanh(m.n(m.d(x))), c=conv(), d=conv(), n=bn(4)),
        {"conv": 2, "norm": 0}),
    "conv output used elsewhere too": (0, "Isolated",
        lambda: Written(lambda m, x: F.relu(m.n(y := m.c(x))) + y.abs(), c=conv(), n=bn(4)), {"conv": 1, "norm": 1}),
    "norm output used elsewhere too": (0, "Shared",
        lambda: Written(lambda m, x: m.n(m.p(y := m.n(m.c(x)))) + y.abs(), c=conv(), n=bn(4), p=bn(4)), {}),
    "branch of a sum used elsewhere too": (0, "",
        lambda: Written(lambda m, x: F.relu((y := m.c(x)) + m.d(x)) + y.abs(), c=conv(), d=conv(k=1)), {"conv": 2}),
    "one dropout between many layers": (1, "",
        lambda: Written(lambda m, x: m.o(m.n(m.o(m.c(x)))), c=conv(), n=bn(4), o=nn.Dropout(0.3)),
        {"conv": 1, "norm": 0}),
    "one activation between many layers": (2, "",
        lambda: Written(lambda m, x: m.o(m.n(m.c(m.o(m.p(m.d(x)))))), c=conv(), d=conv(), n=bn(4), p=bn(4),
                        o=nn.ReLU(inplace=True)), {"conv": 2, "norm": 0}),
    "one branch twice in a sum": (0, "Shared",
        lambda: Written(lambda m, x: m.c(x) + m.c(x) + m.d(x), c=conv(), d=conv(k=1)), {}),
    "a value added to itself": (1, "", lambda: Written(lambda m, x: m.n((y := m.c(x)) + y), c=conv(), n=bn(4)), {}),
    "tied weights": (2, "", tied_weights, {"norm": 0}),
    "tied bias": (2, "", tied_bias, {"norm": 0}),
    "tied norms": (2, "", tied_norms, {"norm": 0}),
    "a weight read elsewhere": (0, "Shared", weight_read_elsewhere, {}),
    "a weight that scales the output": (1, "", weight_scales_elsewhere, {}),
    "registered under two names": (1, "", two_names, {"conv": 1, "norm": 0}),
    "registered and called under two names": (0, "Shared", two_names_both_called, {"conv": 2}),
    "a block called three times": (1, "", Recurrent, {"conv": 3, "norm": 0, "add": 0}),
    "a linear block called three times in a row": (1, "", RecurrentLinear, {"norm": 0}),
    "a block in two containers, each called twice": (1, "", NestedShare, {"norm": 0}),
    "a child used by the parent too": (1, "Shared", ReachesIn, {}),
    "a child asked for its shape by the parent": (1, "Shared", ReadsShapes, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", SHARED)
def test_shared(name):
    merges, refused, make, ran = SHARED[name]
    check(make(), X, TINY, merges=merges, refused=refused, **ran)


@pytest.mark.parametrize(("make", "merges", "refused", "norms"), [(Siamese, 2, "", 0), (SiameseHalf, 1, "Shared", 1)])
def test_siamese(make, merges, refused, norms):
    check(make(), (noise(2, 3, 6, 5), noise(2, 3, 4, 7)), merges=merges, refused=refused, norm=norms)


def test_tied_parameters_of_untouched_layers_stay_tied():
    model = Written(lambda m, x: m.b(F.relu(m.a(F.relu(m.n(m.c(x)))))), a=conv(), b=conv(), c=conv(), n=bn(4))
    model.b.weight = model.a.weight
    deploy = check(model, X, merges=1)
    assert deploy.b.weight is deploy.a.weight


class Helper(nn.Module):
    """A method, called once without the bias and once with it."""

    def __init__(self):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))

    def lin(self, x, bias):
        return F.linear(x, self.w, self.b if bias else None)

    def forward(self, x):
        return self.lin(self.lin(x, False).relu(), True)


def test_a_parameter_that_a_later_call_reads_stays():
    deploy = check(Helper(), noise(2, 4), merges=0)
    assert deploy.b is not None


ACT = nn.SiLU()


class SharesItsActivation(nn.Module):
    """As ultralytics' RepConv: one activation, held by the class, in every block."""

    act_of_all = ACT

    def __init__(self, tied=None):
        super().__init__()
        self.act = self.act_of_all
        self.c, self.d = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.gain = tied if tied is not None else nn.Parameter(torch.rand(4, 1, 1))

    def forward(self, x):
        return torch.maximum(self.act(self.c(x) + self.d(x)), self.gain)


def test_a_module_and_a_parameter_held_by_several_blocks():
    first = SharesItsActivation()
    model = nn.Sequential(first, SharesItsActivation(first.gain), SharesItsActivation(first.gain))
    deploy = check(model, X, merges=3)
    assert [block.d for block in deploy] == [None] * 3
    assert deploy[1].act is deploy[0].act
    assert deploy[2].gain is deploy[0].gain


# --- layers in plain lists --------------------------------------------------------------------------------


class Unregistered(nn.Module):
    """Layers in a plain list, which no state dict sees."""

    def __init__(self):
        super().__init__()
        self.hidden = [conv(), bn(4)]
        self.c, self.n = conv(), bn(4)

    def forward(self, x):
        for layer in self.hidden:
            x = layer.to(x.dtype).eval()(x)
        return self.n(self.c(torch.relu(x)))


class ListOfRegistered(nn.Module):
    """Registered layers called through a plain list that holds them too."""

    def __init__(self):
        super().__init__()
        self.c, self.n, self.d = conv(), bn(4), conv(k=1)
        self.order = [self.c, self.n]

    def forward(self, x):
        y = x
        for layer in self.order:
            y = layer(y)
        return y + self.d(x)


@pytest.mark.parametrize(
    ("make", "merges", "refused"), [(Unregistered, 1, "Untraceable"), (ListOfRegistered, 0, "Shared")]
)
def test_modules_in_plain_lists(make, merges, refused):
    model = make()
    call(randomised(model), X)  # which makes what no state dict sees float64
    deploy = check(model, X, merges=merges, refused=refused, ways=("alone", "in place"))
    assert equal(copy.deepcopy(deploy), deploy, X)


# --- values that leave otherwise than by the result -----------------------------------------------------------


class Normed(nn.Module):
    """A convolution and a norm, between which something looks."""

    def __init__(self):
        super().__init__()
        self.c, self.n = conv(), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.n(self.c(x))


class GivesAnObject(Normed):
    def forward(self, x):
        y = self.c(x)
        return SimpleNamespace(y=y, z=self.n(y))


class Keeps(Normed):
    def forward(self, x):
        self.feat = self.c(x)
        return self.n(self.feat)


class Lists(Normed):
    def __init__(self):
        super().__init__()
        self.layers = [self.c, self.n]

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize(("cls", "refused"), [(GivesAnObject, "Isolated"), (Keeps, "Isolated"), (Lists, "Shared")])
def test_values_that_leave(cls, refused):
    check(cls(), X, merges=0, refused=refused, ways=("alone", "in place"))


def test_what_is_kept_in_an_attribute_is_what_it_was():
    model = randomised(Keeps())
    deploy = says(structrep.plan(model), 0, "Isolated").reparameterize()
    model(X), deploy(X)
    assert relative_error(deploy.feat, model.feat) < EXACT


# --- calls that differ ------------------------------------------------------------------------------------


class Sized(nn.Module):
    """Two branches whose sizes agree for even inputs."""

    def __init__(self):
        super().__init__()
        self.conv, self.pool = nn.Conv2d(4, 4, 3, 2, 1), nn.AvgPool2d(2, 2, ceil_mode=True)

    def forward(self, x):
        return self.conv(x) + self.pool(x)


class Twice(nn.Module):
    """One block on two sizes: what holds for the first need not for the second."""

    def __init__(self):
        super().__init__()
        self.block = Sized()

    def forward(self, x):
        return self.block(x).mean(), self.block(x[..., 1:, 1:]).mean()


class TwiceByMethod(Sized):
    def block(self, x):
        return self.conv(x) + self.pool(x)

    def forward(self, x):
        return self.block(x).mean(), self.block(x[..., 1:, 1:]).mean()


@pytest.mark.parametrize("make", [Twice, TwiceByMethod])
def test_a_block_that_is_called_with_two_sizes(make):
    """The example shows both."""
    check(make(), noise(1, 4, 8, 8), merges=0, refused="Shared", ways=("with an example",))


class Ordered(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.d = conv(), conv(k=1)

    def forward(self, x, order):
        both = [self.c(x) + self.d(x), x.relu()]
        return both[order[0]], both[order[1]]


class Reordered(nn.Module):
    def __init__(self):
        super().__init__()
        self.b = Ordered()

    def forward(self, x):
        a, _ = self.b(x, (0, 1))
        c, _ = self.b(a.tanh(), (1, 0))
        return c


def test_calls_that_differ_in_their_result():
    check(Reordered(), X, merges=0, refused="Shared")


class Bordered(nn.Module):
    """A border of its first layer's bias, which is computed at every call (FMEN's blocks)."""

    def __init__(self):
        super().__init__()
        self.wide, self.conv, self.back = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 6, 3), nn.Conv2d(6, 4, 1)

    def forward(self, x, border=1.0):
        y = self.wide(x)
        bias = self.wide.bias.view(1, -1, 1, 1) * border
        padded = F.pad(y, (1, 1, 1, 1))
        padded[:, :, :1] = bias
        padded[:, :, -1:] = bias
        padded[:, :, :, :1] = bias
        padded[:, :, :, -1:] = bias
        return self.back(self.conv(padded) + y) + x


class CalledTwice(nn.Module):
    def __init__(self, borders):
        super().__init__()
        self.part, self.borders = Bordered(), borders

    def forward(self, x):
        for border in self.borders:
            x = self.part(x, border).relu()
        return x


class UsedBeside(CalledTwice):
    def forward(self, x):
        return super().forward(x) * self.part.wide.bias.mean()


@pytest.mark.parametrize(
    ("model", "merges"),
    [(CalledTwice((1.0,)), 1), (CalledTwice((1.0, 1.0)), 1), (CalledTwice((1.0, 2.0)), 0), (UsedBeside((1.0, 1.0)), 0)],
)
@pytest.mark.filterwarnings("ignore::structrep.NothingMerged")
def test_constants_that_each_call_computes_anew(model, merges):
    model = settled(model)
    x = noise(2, 4, 6, 7)
    deploy = structrep.reparameterize(model, x)
    assert relative_error(deploy(x), model(x)) < CLOSE
    assert (sum(isinstance(one, nn.Conv2d) for one in deploy.modules()) == 1) == bool(merges)
