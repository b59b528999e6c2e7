"""Published structures in the dress of other people's code, where that code asks for more than the family does."""

import pytest
import torch
from torch import nn

import structrep
from tests.support.models import settled
from tests.support.truth import relative_error


class Adapted(nn.Module):
    """A Linear with adapters, kept in dicts by name, that minds the dtypes of its weights."""

    def __init__(self, names):
        super().__init__()
        self.base = nn.Linear(8, 6)
        self.down = nn.ModuleDict({name: nn.Linear(8, 2, bias=False) for name in names})
        self.up = nn.ModuleDict({name: nn.Linear(2, 6, bias=False) for name in names})
        self.dropout = nn.ModuleDict({name: nn.Dropout(0.1) for name in names})
        self.scaling = dict.fromkeys(names, 2.0)

    def cast(self, x, dtype):
        return x if x.dtype == dtype else x.to(dtype=dtype)

    def forward(self, x):
        result = self.base(x)
        dtype = result.dtype
        for name in self.down:
            x = self.cast(x, self.down[name].weight.dtype)
            result = result + self.up[name](self.down[name](self.dropout[name](x))) * self.scaling[name]
        return result.to(dtype)


@pytest.mark.parametrize("names", [["default"], ["one", "two"]])
@pytest.mark.parametrize("shape", [(3, 8), (2, 5, 8)])
def test_adapters_by_name(names, shape):
    torch.manual_seed(0)
    model, x = settled(nn.Sequential(Adapted(names))), torch.randn(shape, dtype=torch.float64)
    plan = structrep.plan(model)
    assert [merge.rules for merge in plan.merges] == [("lora",)]
    deploy = plan.apply()
    assert relative_error(deploy(x), model(x)) < 1e-13
    assert sum(isinstance(m, nn.Linear) for m in deploy.modules()) == 1
    half = deploy.to(torch.bfloat16)
    assert half(x.to(torch.bfloat16)).dtype == torch.bfloat16


class Learnable(nn.Module):
    """PP-LCNetV3's block with another number of channels behind than before: its one-number affine is of the latter."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 6, 1, bias=False) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(3))
        self.scale, self.bias = nn.Parameter(torch.tensor([1.5])), nn.Parameter(torch.tensor([0.25]))

    def forward(self, x):
        out = 0
        for conv, norm in zip(self.convs, self.norms, strict=True):
            out = out + norm(conv(x))
        return self.scale * out + self.bias


def test_a_part_that_leaves_its_channels_open_has_those_of_its_place():
    torch.manual_seed(0)
    model, x = settled(Learnable()), torch.randn(1, 4, 3, 3, dtype=torch.float64)
    plan = structrep.plan(model)
    assert [merge.rules for merge in plan.merges] == [("pplcnetv3",)]
    assert relative_error(plan.apply()(x), model(x)) < 1e-13


@pytest.mark.parametrize(("slope", "convs"), [(1.0, 1), (0.5, 2)])
def test_a_leaky_curve_of_slope_1_is_none(slope, convs):
    torch.manual_seed(0)
    model = settled(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.LeakyReLU(slope), nn.Conv2d(4, 4, 1)))
    x = torch.randn(1, 4, 3, 3, dtype=torch.float64)
    deploy = structrep.reparameterize(model)
    assert relative_error(deploy(x), model(x)) < 1e-13
    assert sum(isinstance(m, nn.Conv2d) for m in deploy.modules()) == convs


class Unfollowable(nn.Module):
    """A block that reads its child's parameters, beside one that stops the trace, which starts again."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        shift = (
            self.norm.bias - self.norm.running_mean * self.norm.weight / (self.norm.running_var + self.norm.eps).sqrt()
        )
        return self.norm(self.two(x)) - shift.reshape(1, -1, 1, 1) + self.one(x)


class Stops(nn.Module):
    def forward(self, x):
        return -x if float(x.sum()) > 1e9 else x


def test_what_an_aborted_trace_saw_is_no_hindrance():
    torch.manual_seed(0)
    model = settled(nn.Sequential(Unfollowable(), nn.ReLU(), Stops(), Unfollowable()))
    x = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    deploy = structrep.reparameterize(model)
    assert relative_error(deploy(x), model(x)) < 1e-13
    assert sum(isinstance(m, nn.Conv2d) for m in deploy.modules()) == 2


conv = {"a": {}}  # a name that forwards use for something else


class LocalName(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(2))

    def forward(self, x):
        for conv in self.layers:
            x = conv(x)
        return x


def test_a_local_name_that_is_a_dict_outside():
    model, x = LocalName().double().eval(), torch.randn(1, 4, 3, 3, dtype=torch.float64)
    assert relative_error(structrep.reparameterize(model)(x), model(x)) < 1e-13


class RepBN(nn.Module):
    """A batch norm and a share of its input, on tokens: arXiv:2405.11582."""

    def __init__(self, channels):
        super().__init__()
        self.bn, self.alpha = nn.BatchNorm1d(channels), nn.Parameter(torch.tensor([0.7]))

    def forward(self, x):
        x = x.transpose(1, 2)
        x = self.bn(x) + self.alpha * x
        return x.transpose(1, 2)


@pytest.mark.parametrize("example", [False, True])
@pytest.mark.parametrize("make", [
    lambda: nn.Sequential(RepBN(8), nn.Linear(8, 8)),
    lambda: nn.Sequential(nn.Linear(8, 8), RepBN(8)),
    lambda: nn.Sequential(RepBN(8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), RepBN(8), nn.Linear(8, 8)),
])  # fmt: skip
def test_a_norm_of_tokens_goes_into_a_linear(make, example):
    torch.manual_seed(0)
    model, x = settled(make()), torch.randn(2, 5, 8, dtype=torch.float64)
    deploy = structrep.reparameterize(model, x if example else None)
    assert relative_error(deploy(x), model(x)) < 1e-13
    assert not any(isinstance(m, nn.BatchNorm1d) for m in deploy.modules())
    with pytest.raises((RuntimeError, IndexError)):
        model(x[0])


class Half(nn.Module):
    def __init__(self, dims):
        super().__init__()
        self.bn, self.linear, self.dims = nn.BatchNorm1d(8), nn.Linear(8, 8), dims

    def forward(self, x):
        return self.linear(self.bn(x.transpose(*self.dims)).relu().transpose(1, 2))


def test_a_norm_of_tokens_with_a_curve_behind_it_stays():
    model, x = settled(Half((1, 2))), torch.randn(2, 5, 8, dtype=torch.float64)
    deploy = structrep.reparameterize(model)
    assert relative_error(deploy(x), model(x)) < 1e-13
    assert isinstance(deploy.bn, nn.BatchNorm1d)
