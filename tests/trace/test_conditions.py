"""Questions about values: what is followed for every input, what is left as it is, and where they cost no merge."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import structrep
from tests.support.models import Two, Written, bn, conv, made, noise, settled
from tests.support.truth import CLOSE, EXACT, check, relative_error, says

X = noise(2, 4, 6, 7)


# --- forwards of two branches ----------------------------------------------------------------------------------


def maybe(x):
    if x.max() > 1e6:
        return x
    return None


def collect(found, x):
    if x.max() < 1e6:
        found.append(x)


def split(x, n, dim=1):
    if x.shape[2] == 6:
        return x[:, ::2], x[:, 1::2]
    return x[:, :n], x[:, n:]


def may_be_none(self, x):
    y = self.both(x)
    return y if maybe(x) is None else y * 3


def device_as_text(self, x):
    return self.both(x) * (2 if "cpu" in str(x.device) else 3)


def as_a_key(self, x):
    return self.both(x) * {torch.float64: 2.0}.get(x.dtype, 3.0)


def several(self, x):
    parts = self.both(x).relu().chunk(2, 1)
    return torch.cat(parts, 1) if isinstance(parts, (tuple, list)) else parts


def largest(self, x):
    y = self.both(x).max(1)
    return y[0] if isinstance(y, tuple) else y


def caught_condition(self, x):
    try:
        k = 2.0 if x.mean() > -100 else 3.0
    except Exception:
        k = 5.0
    return self.both(x) * k


def caught_number(self, x):
    k = 1
    with contextlib.suppress(Exception):
        k = int(x.shape[1])
    return self.both(x) * k


def collected(self, x):
    found = []
    collect(found, self.both(x))
    return found


def like_torchs(self, x):
    return split(self.a(x), 2, 1)[0]


def loses_nothing(self, x):
    p = F.adaptive_avg_pool2d(x, 1)
    return torch.zeros_like(x) + (self.a(p) + self.b(p))


def viewed_by_shape(self, x):
    return self.both(x) * len(x.view(x.shape).shape)


def keepdims(self, x):
    *_, h, _w = self.a(x).mean(1, keepdims=True).shape
    return self.both(x) * h


def a_number_of_all(self, x):
    return torch.cat([self.a(x), self.b(x.relu())], 1) * 0.5


def by_name(self, x):
    y = torch.stack(tensors=[self.a(x), self.b(x)]).sum(0)
    return torch.chunk(input=torch.flatten(input=y, start_dim=0, end_dim=1), chunks=2, dim=1)[0]


def unused_slices(self, x):
    self.a(x.relu())[:, 0:2][:, 0:2]
    return self.b(x - x) - x


def caught_raise(self, x):
    y = self.both(x)
    try:
        if x.shape[2] < 8:
            raise ValueError
        return y
    except ValueError:
        return y * 2


def may_return_first(self, x):
    if x.shape[2] < 8:
        if self.training is False:
            return self.a(x)
        raise ValueError
    return self.both(x)


def own_parameters(self, x):
    return self.both(x) * sum(p.sum() for p in self.parameters())


def named_device(self, x, device=None):
    return self.both(x) + torch.zeros(x.shape[0], 1, 1, 1, device=torch.device("cpu"), dtype=x.dtype)


def named_inf(self, x, inf=None):
    return self.both(x).clamp(-float("inf"), 5.0)


def names_what_it_refuses(self, x):
    if type(x) is not torch.Tensor:
        raise ValueError(x)
    return self.both(x)


def asks_for_an_attribute(self, x):
    return (self.a(x) + self.b(x)) * (2.0 if getattr(x, "mask", None) is not None or hasattr(x, "tensors") else 1.0)


# Each with how many merges there are, and for what others are refused.
FORWARDS = {
    may_be_none: (1, "Untraceable"),
    device_as_text: (1, ""),
    as_a_key: (0, "Untraceable"),
    several: (1, ""),
    largest: (0, "Untraceable"),
    caught_condition: (1, "ExampleOnly Untraceable"),
    caught_number: (0, "Untraceable"),
    collected: (1, "Untraceable"),
    like_torchs: (0, "Untraceable"),
    loses_nothing: (1, ""),
    viewed_by_shape: (0, "Untraceable"),
    keepdims: (0, "Shared"),
    a_number_of_all: (0, ""),
    by_name: (1, "Costlier Incompatible"),
    unused_slices: (2, ""),
    caught_raise: (1, "Untraceable"),
    may_return_first: (1, "Untraceable"),
    own_parameters: (1, ""),
    named_device: (1, ""),
    named_inf: (1, ""),
    names_what_it_refuses: (0, "Untraceable"),
    asks_for_an_attribute: (1, ""),
}


@pytest.mark.parametrize("forward", FORWARDS, ids=lambda forward: forward.__name__)
def test_forwards(forward):
    merges, refused = FORWARDS[forward]
    check(made(forward), X, merges=merges, refused=refused, ways=("alone", "in place"))


class Raises(Two):
    def forward(self, x):
        if x.dim() == 4 and x.shape[1] != 4:
            raise ValueError("four channels, please")
        if not (x.dim() == 3 or x.dim() == 4) or 0 < x.shape[1] < 3:
            raise ValueError("more, please")
        if x.dim() not in (3, 4) or not any([x.dim() == 3, x.dim() == 4]):
            raise ValueError("dims, please")
        return self.both(x)


class AsksBetween(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = conv(4, 8), conv(8, 4, 1)

    def forward(self, x):
        y = self.a(x)
        if y.shape[1] != 8:
            raise ValueError("eight channels, please")
        return self.b(y)


def test_conditions_whose_parts_may_be_either():
    check(Raises(), X, merges=1, refused="Untraceable", ways=("alone", "in place"))


def test_a_shape_that_is_checked_in_the_middle():
    check(AsksBetween(), X, merges=0)


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
    check(AsksForItsShape(after), noise(2, 4, 5, 3), merges=1)


class Between(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 1, 1), nn.Conv2d(1, 8, 1)
        self.c = nn.Conv2d(8, 1, 1)

    def forward(self, x):
        y = self.b(x)
        channels = y.shape[1]
        return self.c(y) * channels


def test_a_shape_that_would_change():
    """The shape between two convolutions is that of neither end."""
    check(Between(), noise(2, 1, 5, 3), merges=0)


# --- data and modes ------------------------------------------------------------------------------------------


class Branching(nn.Module):
    """Data-dependent control flow in one submodule, plain blocks around it."""

    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Sequential(conv(), bn(4)), nn.Sequential(conv(), bn(4))

        def forward(self, x):
            return self.a(x) if x.sum() > 0 else self.b(x)

    def __init__(self):
        super().__init__()
        self.first, self.gate, self.last = nn.Sequential(conv(), bn(4)), Branching.Gate(), nn.Sequential(conv(), bn(4))

    def forward(self, x):
        return self.last(torch.tanh(self.gate(torch.tanh(self.first(x)))))


class Root(Branching):
    def forward(self, x):
        y = self.first(x)
        return self.last(y) if y.mean() > 0 else self.gate(y)


@pytest.mark.parametrize("make", [Branching, Root])
def test_data_dependent_control_flow_is_left_alone(make):
    inputs = X, -X, noise(1, 4, 1, 1), -noise(1, 4, 1, 1)
    check(make(), *inputs, merges=4, refused="Untraceable", ways=("alone", "in place"), norm=0)
    (refusal, *_) = structrep.plan(Branching().eval()).refusals
    assert (refusal.kind, refusal.where) == ("Untraceable", "gate")


def test_data_dependent_control_flow_is_known_for_an_example():
    check(Branching(), X, -X, merges=4, ways=("with an example",), norm=0)


def test_training_flag_is_read_in_eval():
    model = Written(lambda m, x: m.n(m.c(x)) if not m.training else x, c=conv(), n=bn(4))
    check(model, X, merges=1, conv=1, norm=0)


# --- code that takes its parts apart --------------------------------------------------------------------------


class Normed(nn.Module):
    """A convolution and a norm, between which something looks."""

    def __init__(self):
        super().__init__()
        self.c, self.n = conv(), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.n(self.c(x))


class Loops(nn.Module):
    def __init__(self):
        super().__init__()
        self.s = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x):
        found = []
        for layer in self.s:
            x = layer(x)
            found.append(x)
            if x.mean() > 100:
                break
        return found[0]


class Aliases(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Normed()

    def forward(self, x):
        if x.mean() > 100:
            return x
        block = self.block
        y = block.c(x)
        return block.n(y) + y


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.m, self.head = conv(), nn.Sequential(conv(), nn.BatchNorm2d(4))

    def forward(self, x, aux=False):
        y = self.m(x)
        return self.head[0](y) if aux else y


@pytest.mark.parametrize(
    ("cls", "given", "merges", "refused"),
    [(Loops, X, 0, "Isolated Untraceable"), (Aliases, X, 1, "Untraceable"), (Heads, (X, True), 0, "")],
)
def test_parts_that_code_takes_apart(cls, given, merges, refused):
    check(cls(), given, merges=merges, refused=refused, ways=("alone", "in place"))


class Yields(nn.Module):
    def __init__(self):
        super().__init__()
        self.s = nn.Sequential(conv(), nn.BatchNorm2d(4))

    def forward(self, x):
        for layer in self.s:
            x = layer(x)
            yield x


def test_a_forward_that_yields():
    model = settled(Yields())
    deploy = says(structrep.plan(model), 0, "Untraceable").reparameterize()
    for mine, truth in zip(deploy(X), model(X), strict=True):
        assert relative_error(mine, truth) < EXACT


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
    model = nn.Sequential(Unfollowable(), nn.ReLU(), Stops(), Unfollowable())
    check(model, X, merges=2, refused="Untraceable", ways=("alone", "in place"), within=CLOSE, conv=2)
