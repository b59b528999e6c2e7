"""Programs that were once converted wrongly, each the smallest of its kind; all against their float64 selves."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import structrep
from tests.support.models import settled
from tests.support.truth import relative_error

X = torch.randn(2, 4, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Two(nn.Module):
    """Two branches, which some forward adds."""

    def __init__(self):
        super().__init__()
        self.c, self.d = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)


def made(forward, base=Two):
    return settled(type("Made", (base,), {"forward": forward})())


def same(model, *inputs, **named):
    deploy = structrep.reparameterize(model)
    with torch.no_grad():
        assert relative_error(deploy(*inputs, **named), model(*inputs, **named)) < 1e-12
    return deploy


def says_so(model, traced, *inputs, **named):
    """Equal where it was traced; elsewhere equal, or an error that says what it was reparameterized for."""
    deploy = same(model, *traced)
    with torch.no_grad():
        truth = model(*inputs, **named)
        try:
            assert relative_error(deploy(*inputs, **named), truth) < 1e-12
        except ValueError as error:
            if "reparameterized for" not in str(error):
                raise


def test_a_parameter_that_a_later_call_reads_stays():
    class Helper(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.b = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))

        def lin(self, x, bias):
            return F.linear(x, self.w, self.b if bias else None)

        def forward(self, x):
            return self.lin(self.lin(x, False).relu(), True)

    deploy = same(settled(Helper()), torch.randn(2, 4, dtype=torch.float64))
    assert deploy.b is not None


def per_channel_fill(self, x):
    y = F.pad(self.p(x) * self.g, (1, 2, 2, 1), value=0.5)
    return self.n(self.a(y) - self.b(y)).relu()


class PerChannel(nn.Module):
    def __init__(self):
        super().__init__()
        self.p = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.g = nn.Parameter(torch.randn(1, 4, 1, 1))
        self.a, self.b = (nn.Conv2d(4, 4, 2, groups=4, bias=False) for _ in range(2))
        self.n = nn.BatchNorm2d(4)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_merge_that_no_layer_can_do_is_refused_before_anything_changes(inplace):
    model = made(per_channel_fill, PerChannel)
    with torch.no_grad():
        truth = model(X)
        assert relative_error(structrep.reparameterize(model, inplace=inplace)(X), truth) < 1e-12


def with_tensor_default(self, x, t=torch.ones(1)):  # noqa: B008
    return self.c(x) + self.d(x)


def with_function_default(self, x, act=torch.relu):
    return act(self.c(x) + self.d(x))


@pytest.mark.parametrize("forward", [with_tensor_default, with_function_default])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_forward_that_cannot_be_written_is_left_and_the_model_with_it(forward, inplace):
    model = made(forward)
    with torch.no_grad():
        truth = model(X)
        assert relative_error(structrep.reparameterize(model, inplace=inplace)(X), truth) < 1e-12
        assert relative_error(model(X), truth) < 1e-12


def copy_then_write(self, x):
    y = x * 1
    y += 1.0
    return (self.c(x) + self.d(x)).relu() + y


def write_a_sum_with_zero(self, x):
    t = torch.tanh(x)
    y = t + 0
    y.add_(1.0)
    return (self.c(t) + self.d(t)) * y


def power(self, x):
    h = x.tanh()
    k = h
    h **= 2
    return self.c(k) + self.d(k)


def floor(self, x):
    h = x.tanh() * 9
    k = h
    h //= 2
    return torch.relu(self.c(k) + self.d(k))


def write_a_copy_of_a_view(self, x):
    t = torch.tanh(x)
    y = t.chunk(2, 1)[0] + 0
    y[:, 0] = 1.0
    return (self.c(t) + self.d(t)).relu() * y.sum()


@pytest.mark.parametrize("forward", [write_a_copy_of_a_view, copy_then_write, write_a_sum_with_zero, power, floor])
def test_values_written_in_place(forward):
    model = made(forward)
    given = X.clone()
    same(model, given)
    assert torch.equal(given, X)


def test_arguments_that_were_constants():
    def scales(self, x, scales=(1.0, 2.0)):
        return self.c(x) * scales[0] + self.d(x) * scales[1]

    def more(self, x, *more):
        y = self.c(x) + self.d(x)
        for z in more:
            y = y * z
        return y

    def named(self, x, **named):
        return (self.c(x) + self.d(x)) * named.get("scale", 1.0)

    says_so(made(scales), (X,), X, scales=(3.0, 4.0))
    says_so(made(more), (X,), X, X)
    says_so(made(named), (X,), X, scale=3.0)


def test_calls_that_differ_in_their_result():
    def block(self, x, order):
        both = [self.c(x) + self.d(x), x.relu()]
        return both[order[0]], both[order[1]]

    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.b = made(block)

        def forward(self, x):
            a, _ = self.b(x, (0, 1))
            c, _ = self.b(a.tanh(), (1, 0))
            return c

    same(settled(Parent()), X)


def dropped_weights(self, x):
    return F.conv2d(x, F.dropout(self.c.weight, 0.5, True), padding=1) + self.d(x)


def gumbel(self, x):
    return self.c(x) * F.gumbel_softmax(self.d.bias, dim=0)[0] + self.d(x)


@pytest.mark.parametrize("forward", [dropped_weights, gumbel])
def test_random_weights_are_drawn_at_every_call(forward):
    model = made(forward)
    deploy = structrep.reparameterize(model)
    with torch.no_grad():
        torch.manual_seed(random.randrange(1000))
        assert relative_error(deploy(X), deploy(X)) > 1e-3


def test_modes_switched_as_the_forward_runs():
    class Switching(Two):
        def __init__(self):
            super().__init__()
            self.n = nn.BatchNorm2d(4)

        def forward(self, x):
            self.n.train()
            y = self.n(self.c(x))
            self.n.eval()
            return y

    model = settled(Switching())
    deploy = structrep.reparameterize(model)
    with torch.no_grad():
        assert relative_error(deploy(X), model(X)) < 1e-12


def autocast(self, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return self.c(x) + self.d(x)


def test_autocast_goes_on():
    model = made(autocast).float()
    assert structrep.reparameterize(model)(X.float()).dtype == torch.bfloat16


def third(self, x):
    return (self.c(x) * 0.3 + 0.1 - self.d(x) / 3).relu()


def test_numbers_that_float32_cannot_hold_merge():
    model = made(third)
    plan = structrep.plan(model)
    plan.prove()
    assert len(plan.merges) == 1
    same(model, X)


def stacked(self, x):
    return torch.stack([self.c(x), self.d(x)]).sum(0)


def test_a_sum_of_a_stack_merges():
    model = made(stacked)
    assert len(structrep.plan(model).merges) == 1
    same(model, X)


def sizes(self, x):
    return F.avg_pool2d(self.c(x) + self.d(x), x.shape[2:])


def out_argument(self, x):
    a = torch.empty_like(x)
    torch.add(self.c(x), self.d(x), out=a)
    return a


@pytest.mark.parametrize("forward", [sizes, out_argument])
def test_arguments_that_depend_on_the_input(forward):
    same(made(forward), X)


def test_a_pad_wider_than_the_smallest_input_of_the_merged_layer():
    def forward(self, x):
        return self.r(x)[:, :, 1:-1, 1:-1].relu()

    class Reflected(nn.Module):
        def __init__(self):
            super().__init__()
            self.r = nn.Conv2d(4, 4, 1, padding=2, padding_mode="reflect")

    same(nn.Sequential(nn.BatchNorm2d(4), made(forward, Reflected)).double().eval(), X)


def asks_for_an_attribute(self, x):
    return (self.c(x) + self.d(x)) * (2.0 if getattr(x, "mask", None) is not None or hasattr(x, "tensors") else 1.0)


def test_a_traced_value_has_no_attribute_that_tensors_lack():
    same(made(asks_for_an_attribute), X)


def from_zeros(self, x):
    total = torch.zeros_like(x)
    total = total + self.c(x)
    return total + self.d(x)


def from_zeros_in_place(self, x):
    total = torch.zeros_like(x)
    for branch in (self.c, self.d):
        total += branch(x)
    return total


def zeros_read_again(self, x):
    zeros = torch.zeros_like(x)
    return (zeros + self.c(x)) * 2 + self.d(x) * (zeros + 1)


@pytest.mark.parametrize("forward", [from_zeros, from_zeros_in_place, zeros_read_again])
def test_sums_that_start_from_zeros(forward):
    model = made(forward)
    same(model, X)
    assert len(structrep.plan(model).merges) == (forward is not zeros_read_again)


@pytest.mark.parametrize("pad", [nn.CircularPad1d, nn.ReflectionPad1d, nn.ReplicationPad1d])
def test_a_pad_that_copies_pixels_and_then_a_crop(pad):
    """torch's pad layers crop first and copy then; the formula copies first."""
    model = settled(nn.Sequential(pad((3, 0)), nn.ConstantPad1d((0, -1), 0.0), nn.Conv1d(1, 1, 2)))
    for size in (4, 5, 9):
        same(model, torch.randn(2, 1, size, dtype=torch.float64))


def test_a_pad_layer_that_copies_and_crops_at_once():
    model = settled(nn.Sequential(nn.CircularPad1d((3, -1)), nn.Conv1d(1, 1, 2)))
    same(model, torch.randn(2, 1, 6, dtype=torch.float64))


class AsksForItsShape(nn.Module):
    """As in attention: what a norm gives is read by a convolution, and its shape by the code."""

    def __init__(self, after: bool):
        super().__init__()
        self.after = after
        self.norm, self.conv = nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1)
        self.wide = nn.Conv2d(4, 4, 3)

    def forward(self, x):
        if self.after:
            y = self.conv(x)
            b, c, h, w = y.shape
            return (y * 2.0).reshape(b, c, h * w)
        y = self.norm(x)
        b, c, h, w = y.shape
        return self.conv(y).reshape(b, -1, h, w) + 0 * c


@pytest.mark.parametrize("after", [False, True])
def test_a_shape_that_is_asked_for(after):
    model = settled(AsksForItsShape(after))
    x = torch.randn(2, 4, 5, 3, dtype=torch.float64)
    deploy = structrep.reparameterize(model)
    assert len(structrep.plan(model).merges) == 1
    assert relative_error(deploy(x), model(x)) < 1e-12


def test_a_shape_that_would_change():
    """The shape between two convolutions is that of neither end."""

    class Between(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(8, 1, 1), nn.Conv2d(1, 8, 1)
            self.c = nn.Conv2d(8, 1, 1)

        def forward(self, x):
            y = self.b(x)
            channels = y.shape[1]
            return self.c(y) * channels

    model = settled(Between())
    x = torch.randn(2, 1, 5, 3, dtype=torch.float64)
    deploy = structrep.reparameterize(model)
    assert relative_error(deploy(x), model(x)) < 1e-12


def test_a_norm_that_stays_says_what_it_stands_between():
    class PreActivation(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.drop, self.conv = nn.BatchNorm2d(4), nn.Dropout(), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            y = x.sigmoid()
            return y + self.conv(self.drop(self.norm(y)).relu())

    (refusal,) = structrep.plan(settled(PreActivation())).refusals
    assert (refusal.kind, refusal.layers) == ("Isolated", ("norm",))
    assert "it scales what sigmoid gives, which add reads too, for relu" in refusal.reason


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


@pytest.mark.parametrize("inplace", [False, True])
def test_a_module_and_a_parameter_held_by_several_blocks(inplace):
    first = SharesItsActivation()
    model = settled(nn.Sequential(first, SharesItsActivation(first.gain), SharesItsActivation(first.gain)))
    truth = model(X)
    deploy = structrep.reparameterize(model, inplace=inplace)
    assert relative_error(deploy(X), truth) < 1e-12
    assert [block.d for block in deploy] == [None] * 3
    assert deploy[1].act is deploy[0].act
    assert deploy[2].gain is deploy[0].gain


class Spreads(nn.Module):
    """One channel, scaled by a number for each of two: what a scale per channel looks like, and is not."""

    def __init__(self):
        super().__init__()
        self.scale, self.conv = nn.Parameter(torch.randn(2, 1, 1)), nn.Conv2d(2, 2, 1)

    def forward(self, x):
        return self.conv(x[:, :1] * self.scale)


@pytest.mark.parametrize("example", [False, True])
def test_a_scale_that_spreads_one_channel_over_several(example):
    model, x = Spreads().double().eval(), torch.randn(2, 2, 3, 3, dtype=torch.float64)
    deploy = structrep.reparameterize(model, x if example else None)
    assert torch.equal(deploy(x), model(x))


class WritesToItsInput(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.conv, self.part = nn.Conv2d(4, 4, 1), part

    def forward(self, x):
        y = x[:, :4] if self.part else x
        y += y
        return self.conv(y)


@pytest.mark.parametrize("part", [False, True])
def test_what_is_written_to_the_input_goes_on_being_written(part):
    model = WritesToItsInput(part).double().eval()
    deploy = structrep.reparameterize(model)
    mine, theirs = X.clone(), X.clone()
    assert relative_error(deploy(mine), model(theirs)) < 1e-14
    assert torch.equal(mine, theirs)


class WritesToItself(nn.Module):
    """Its forward cannot be written anew; what is inside its parts merges all the same."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.block = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Sequential()
        self.register_buffer("mean", torch.randn(1, 4, 1, 1))
        self.shift = 0.5

    def forward(self, x):
        self.mean = self.mean * 1
        return self.norm(self.conv((x - self.shift) * 255.0))


def test_a_merge_that_cannot_be_written_leaves_the_smaller_ones():
    model = settled(WritesToItself())
    plan = structrep.plan(model)
    deploy = plan.apply()
    assert relative_error(deploy(X), model(X)) < 1e-13
    assert not isinstance(deploy.norm, nn.BatchNorm2d)
    assert {merge.edit for merge in plan.merges} <= {"swap", "edit"}  # what it changes, it changes still
