"""Programs that somebody wrote to break it, each of which did: the result equals the original, on every forward."""

import contextlib
import threading
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import structrep
from structrep.errors import BadInput
from structrep.prove.run import tensors
from tests.support.models import settled
from tests.support.truth import relative_error

X = torch.randn(2, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def conv(k=3, i=4, o=4, **options):
    return nn.Conv2d(i, o, k, padding=k // 2, **options)


class Two(nn.Module):
    """Two convolutions, which some forward adds."""

    def __init__(self):
        super().__init__()
        self.a, self.b = conv(1), conv(1)

    def both(self, x):
        return self.a(x) + self.b(x)


class Normed(nn.Module):
    """A convolution and a norm, between which something looks."""

    def __init__(self):
        super().__init__()
        self.c, self.n = conv(), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.n(self.c(x))


def check(model, *inputs, method="forward", inplace=False):
    model = settled(model)
    inputs = inputs or (X,)
    again = [x.clone() if torch.is_tensor(x) else x for x in inputs]
    truth = getattr(model, method)(*again)
    deploy = structrep.reparameterize(model, inplace=inplace)
    mine = getattr(deploy, method)(*[x.clone() if torch.is_tensor(x) else x for x in inputs])
    assert type(mine) is type(truth)
    pairs = list(zip(seen(mine), seen(truth), strict=True))
    assert pairs
    for one, two in pairs:
        assert one.shape == two.shape
        assert relative_error(one, two) < 1e-11
    return deploy


def seen(value):
    return list(tensors(vars(value) if isinstance(value, SimpleNamespace) else value))


# --- transposed convolutions of stride 1 are ordinary ones, and become ones ---------------------------


@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_transposed_convolution_of_stride_1_and_a_norm(padding, inplace):
    deploy = check(
        nn.Sequential(nn.ConvTranspose2d(4, 4, 3, padding=padding), nn.BatchNorm2d(4), nn.ReLU()), inplace=inplace
    )
    assert isinstance(deploy[1], nn.Identity)


# --- a convolution that uses its own parameters elsewhere ----------------------------------------------


class BiasElsewhere(nn.Conv2d):
    def forward(self, x):
        return F.relu(F.conv2d(x, self.weight)) + self.bias.view(1, -1, 1, 1)


class WeightElsewhere(nn.Conv2d):
    def forward(self, x):
        return F.relu(F.conv2d(x, self.weight, self.bias)) * self.weight.mean()


@pytest.mark.parametrize("cls", [BiasElsewhere, WeightElsewhere])
def test_parameters_used_twice(cls):
    check(nn.Sequential(nn.BatchNorm2d(4), cls(4, 4, 1)))


# --- values that leave otherwise than by the result ---------------------------------------------------


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


@pytest.mark.parametrize("cls", [GivesAnObject, Keeps, Lists])
def test_values_that_leave(cls):
    deploy = check(cls())
    if cls is Keeps:
        model = settled(Keeps())
        deploy = structrep.reparameterize(model)
        model(X), deploy(X)
        assert relative_error(deploy.feat, model.feat) < 1e-11


# --- parts that code takes apart ----------------------------------------------------------------------


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


@pytest.mark.parametrize(("cls", "more"), [(Loops, ()), (Aliases, ()), (Heads, (True,))])
def test_parts_that_code_takes_apart(cls, more):
    check(cls(), X, *more)


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
    for mine, truth in zip(structrep.reparameterize(model)(X), model(X), strict=True):
        assert relative_error(mine, truth) < 1e-11


# --- questions about traced values --------------------------------------------------------------------


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


def first(x):
    if x.max() > 1e6:
        return x.relu()
    return x[:, :2]


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


FORWARDS = [
    may_be_none, device_as_text, as_a_key, several, largest, caught_condition, caught_number, collected, like_torchs,
    loses_nothing, viewed_by_shape, keepdims, a_number_of_all, by_name, unused_slices, caught_raise, may_return_first,
    own_parameters, named_device, named_inf,
]  # fmt: skip


@pytest.mark.parametrize("forward", FORWARDS, ids=[f.__name__ for f in FORWARDS])
def test_forwards(forward):
    check(type("Made", (Two,), {"forward": forward})())


class Raises(Two):
    def forward(self, x):
        if x.dim() == 4 and x.shape[1] != 4:
            raise ValueError("four channels, please")
        if not (x.dim() == 3 or x.dim() == 4) or 0 < x.shape[1] < 3:
            raise ValueError("more, please")
        if x.dim() not in (3, 4) or not any([x.dim() == 3, x.dim() == 4]):
            raise ValueError("dims, please")
        return self.both(x)


def test_conditions_whose_parts_may_be_either():
    check(Raises())


class AsksBetween(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = conv(3, 4, 8), conv(1, 8, 4)

    def forward(self, x):
        y = self.a(x)
        if y.shape[1] != 8:
            raise ValueError("eight channels, please")
        return self.b(y)


def test_a_shape_that_is_checked_in_the_middle():
    check(AsksBetween())


# --- views and what they are of -----------------------------------------------------------------------


VIEWS = {
    "type_as": lambda x: x.type_as(x),
    "dropout2d": lambda x: F.dropout2d(x, 0.5, False),
    "tensor_split": lambda x: x.tensor_split(2, 1)[0],
    "kept whole": first,
}
BASES = {
    "view": lambda x: x.view(2, 4, 6, 6),
    "detach": lambda x: x.detach(),
    "slice": lambda x: x[:, :],
    "contiguous": lambda x: x.contiguous(),
}


class WritesToAView(Two):
    def __init__(self, view):
        super().__init__()
        self.view = VIEWS[view]

    def forward(self, x):
        x = x * 1.5
        view = self.view(x)
        p = self.a(x)
        view.mul_(2)
        return p + self.b(x)


class WritesToWhatAViewIsOf(Two):
    def __init__(self, view):
        super().__init__()
        self.view = BASES[view]

    def forward(self, x):
        x = x * 1.5
        z = self.view(x)
        p = self.a(z)
        x.mul_(2)
        return p + self.b(z)


@pytest.mark.parametrize(
    ("cls", "view"), [*((WritesToAView, v) for v in VIEWS), *((WritesToWhatAViewIsOf, v) for v in BASES)]
)
def test_writes_by_way_of_views(cls, view):
    check(cls(view))


# --- results that are more than their parts ------------------------------------------------------------


@dataclass
class Doubles:
    y: torch.Tensor

    def __post_init__(self):
        self.y = self.y * 2


@dataclass
class Counts:
    y: torch.Tensor
    n: int = field(init=False, default=3)


class Own(tuple):
    __slots__ = ()


@pytest.mark.parametrize("make", [Doubles, Counts, lambda y: Own((y,))], ids=["post_init", "no_init", "tuple"])
def test_results_with_code_of_their_own(make):
    check(type("Made", (Two,), {"forward": lambda self, x: make(self.both(x))})())


# --- other forwards -----------------------------------------------------------------------------------


class ByHelper(Normed):
    def _stem(self, x):
        return self.c(x)

    def forward_features(self, x):
        return self._stem(x)


class Decorated(Normed):
    @torch.no_grad()
    def forward_features(self, x):
        return self.c(x)


class ByGetattr(Normed):
    def forward_features(self, x):
        return getattr(self, "c")(x)  # noqa: B009


class ByChildren(Normed):
    def forward_features(self, x):
        found = []
        for module in self.children():
            x = module(x)
            found.append(x)
        return found[0]


class ByForward(Normed):
    def forward_features(self, x):
        return self.c.forward(x)


class ByWeight(Normed):
    def forward_features(self, x):
        return F.conv2d(x, self.c.weight, self.c.bias, padding=1)


def outside(module, x):
    return module.c(x)


class ByFunction(Normed):
    def forward_features(self, x):
        return outside(self, x)


class ByIndex(nn.Sequential):
    def __init__(self):
        super().__init__(conv(), nn.BatchNorm2d(4))

    def forward_features(self, x):
        return self[0](x)


class NormAlone(Normed):
    def forward_features(self, y):
        return self.n(y)


class Weights(nn.Module):
    def __init__(self):
        super().__init__()
        self.v, self.w = nn.Parameter(torch.randn(4, 4, 1, 1)), nn.Parameter(torch.randn(4, 4, 3, 3))

    def forward(self, x):
        return F.conv2d(F.conv2d(x, self.v), self.w, padding=1)

    def forward_features(self, x):
        return F.conv2d(x, self.v)


@pytest.mark.parametrize(
    "cls",
    [ByHelper, Decorated, ByGetattr, ByChildren, ByForward, ByWeight, ByFunction, ByIndex, NormAlone, Weights],
)
def test_other_forwards(cls):
    check(cls(), method="forward_features")
    check(cls())


class AsksItsLayers(nn.Module):
    """Forwards that go by what their layers are, which a merge changes."""

    def __init__(self, question):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.question = question

    def forward(self, x):
        x = self.norm(self.conv(x))
        return x.relu() if self._holds() else x

    def _holds(self):
        if self.question == "bias":
            return self.conv.bias is None
        if self.question == "type":
            return isinstance(self.norm, nn.BatchNorm2d)
        return self.norm.eps > 0


@pytest.mark.parametrize("question", ["bias", "type", "eps"])
def test_layers_that_a_forward_asks_about_stay(question):
    model = settled(AsksItsLayers(question))
    x = torch.randn(1, 4, 3, 3, dtype=torch.float64)
    plan = structrep.plan(model)
    assert relative_error(plan.apply()(x), model(x)) < 1e-14
    assert {refusal.kind for refusal in plan.refusals} == {"Shared"}


# --- questions and other ways to call --------------------------------------------------------------------------------


class Asking(nn.Module):
    """Forwards that go by what a layer is, each asking in another way; a merge would change the answer."""

    def __init__(self, how):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.layers = nn.ModuleList([self.conv])
        self.how = how

    @property
    def bare(self):
        return self.conv.bias is None

    def helper(self, layer):
        return layer.bias is None

    def forward(self, x):
        y = self.norm(self.conv(x))
        return y.relu() if getattr(self, f"by_{self.how}")() else y

    def by_alias(self):
        conv = self.conv
        return conv.bias is None

    def by_property(self):
        return self.bare

    def by_children(self):
        return any(isinstance(m, nn.BatchNorm2d) for m in self.children())

    def by_parameters(self):
        return len(list(self.conv.parameters())) == 1

    def by_helper(self):
        return self.helper(self.conv)

    def by_getattr(self):
        return getattr(self, "conv").bias is None  # noqa: B009

    def by_match(self):
        match self.norm:
            case nn.BatchNorm2d():
                return True
        return False


@pytest.mark.parametrize("how", ["alias", "property", "children", "parameters", "helper", "getattr", "match"])
def test_questions_asked_in_passing(how):
    model, x = settled(Asking(how)), torch.randn(1, 4, 3, 3, dtype=torch.float64)
    assert relative_error(structrep.reparameterize(model)(x), model(x)) < 1e-14


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x, mask=None):
        x = self.conv(x)
        if mask is not None:
            x = x * mask
        return self.norm(x)


def test_an_argument_that_is_none_by_default_may_be_a_tensor():
    model, x = settled(Masked()), torch.randn(1, 4, 3, 3, dtype=torch.float64)
    mask = torch.rand(1, 1, 3, 3, dtype=torch.float64)
    deploy = structrep.reparameterize(model)
    assert relative_error(deploy(x, mask), model(x, mask)) < 1e-14
    assert relative_error(deploy(x), model(x)) < 1e-14


class TwoNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.layers = nn.ModuleList([self.conv, self.norm])

    def forward_features(self, x):
        return self.layers[0](x)

    def forward(self, x):
        return self.norm(self.conv(x))


def test_a_layer_with_two_names_in_another_forward():
    model, x = settled(TwoNames()), torch.randn(1, 4, 3, 3, dtype=torch.float64)
    deploy = structrep.reparameterize(model)
    assert relative_error(deploy.forward_features(x), model.forward_features(x)) < 1e-14


class Called(nn.Conv2d):
    """Does more than its forward when it is called."""

    def __call__(self, x):
        return super().__call__(x) * 2 + 1


def test_a_call_that_does_more_than_the_forward():
    model = settled(nn.Sequential(Called(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    x = torch.randn(1, 4, 3, 3, dtype=torch.float64)
    assert relative_error(structrep.reparameterize(model)(x), model(x)) < 1e-14


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
    model, x = settled(make()), torch.randn(1, 4, 8, 8, dtype=torch.float64)
    deploy = structrep.reparameterize(model, x)
    for one, other in zip(deploy(x), model(x), strict=True):
        assert relative_error(one, other) < 1e-13


# --- verdicts --------------------------------------------------------------------------------------------------------


def test_verify_says_so_where_there_is_nothing_to_compare():
    class Counts(nn.Module):
        def forward(self, x):
            return x.shape[0]

    with pytest.raises(BadInput, match="no tensor that could be compared"):
        structrep.verify(Counts(), Counts(), torch.ones(1, 2))


def test_verify_of_a_model_that_draws_random_numbers():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.norm(self.conv(x)) + torch.randn_like(x)

    model, x = settled(Noisy()).float(), torch.randn(1, 4, 3, 3)
    deploy = structrep.reparameterize(model, x)
    deploy.conv.weight.data *= 1.5
    assert not structrep.verify(model, deploy, x).ok


def test_verify_of_complex_values():
    class Complex(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor = factor

        def forward(self, x):
            return torch.complex(x, self.factor * x)

    x = torch.randn(1, 4)
    assert structrep.verify(Complex(1.0), Complex(1.0), x).ok
    assert not structrep.verify(Complex(1.0), Complex(2.0), x).ok


def test_channels_last_in_three_dims():
    model, x = settled(nn.Sequential(nn.Conv3d(2, 3, 3), nn.BatchNorm3d(3))).float(), torch.randn(1, 2, 5, 5, 5)
    assert structrep.verify(model, structrep.reparameterize(model), x, channels_last=True).ok


def test_a_bias_before_a_transposed_convolution_is_no_border():
    model = settled(nn.Sequential(nn.Conv2d(4, 8, 1), nn.ConvTranspose2d(8, 4, 4, 2, 1)))
    assert not structrep.plan(model, inexact_borders="*").merges


def test_an_output_that_is_made_of_pads_alone_is_no_proof_against_a_merge():
    torch.manual_seed(0)
    model = settled(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, stride=2, padding=1, bias=False)))
    plan = structrep.plan(model)
    assert plan.merges
    plan.prove()
    assert plan.merges


def test_layers_of_a_deploy_model_can_be_scripted_and_traced_by_others():
    torch.manual_seed(0)
    x = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    shift = settled(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)))
    for model in (shift, settled(Sized()), settled(nn.Sequential(nn.Flatten(), nn.Linear(256, 4), nn.BatchNorm1d(4)))):
        deploy = structrep.reparameterize(model, x)
        truth = model(x)
        assert relative_error(torch.fx.symbolic_trace(deploy)(x), truth) < 1e-13
        if not isinstance(model, Sized):  # whose forward is written anew, in terms that scripts do not know
            assert relative_error(torch.jit.script(deploy)(x), truth) < 1e-13


class WritesToItsList(nn.Module):
    """As heads of detectors do, with the list of maps that they are given; and it cannot be followed."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), DoublesInPlace()

    def forward(self, x):
        x = self.norm(self.conv(x))
        return self.head([x, x + 1])


class DoublesInPlace(nn.Module):
    def forward(self, maps):
        for index in range(len(maps)):
            maps[index] = maps[index] * 2
        return maps if maps[0].sum() > 0 else maps[::-1]


def test_a_part_that_cannot_be_followed_may_write_to_a_list_that_it_is_given():
    model, x = settled(WritesToItsList()), torch.randn(1, 3, 8, 8, dtype=torch.float64)
    deploy = structrep.reparameterize(model, x)
    assert isinstance(deploy.norm, nn.Identity)
    for found, expected in zip(deploy(x), model(x), strict=True):
        assert relative_error(found, expected) < 1e-13


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x))


class WrittenBesideASum(nn.Module):
    """A sum with 0 is a value of its own, and what it is made of is written to afterwards."""

    def __init__(self, way):
        super().__init__()
        self.first, self.second, self.third = Pair(), Pair(), Pair()
        self.drop, self.act, self.way = nn.Identity(), nn.ReLU(inplace=True), way

    def forward(self, x):
        if self.way == "branches":  # for which the forward is written anew
            x = self.second(x) + self.third(x)
        a = self.first(x)
        if self.way == "view":
            z = 0 + a.view(a.shape)
        elif self.way == "dropout":
            z = 0 + F.dropout(a, 0.5, self.training)
        else:
            z = 0 + self.drop(a)
        self.act(a)
        return z


@pytest.mark.parametrize("way", ["branches", "view", "dropout", "identity"])
def test_a_sum_with_zero_stays_where_its_source_is_written_to(way):
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    branches = settled(WrittenBesideASum("branches"))
    model = branches if way == "branches" else nn.Sequential(branches, settled(WrittenBesideASum(way)))
    assert relative_error(structrep.reparameterize(model)(x), model(x)) < 1e-13


class Switched(nn.Module):
    """A forward of another name that looks at what its part gives by a way that no attribute of the part tells of."""

    def __init__(self, way):
        super().__init__()
        self.body, self.norm, self.tail, self.way = Body(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), way
        self.config = self.body.config

    def forward(self, x):
        return self.tail(self.norm(self.body(x)).relu())

    def forward_body(self, x):
        if self.way == "hook":
            seen = []
            handle = self.body.register_forward_hook(lambda module, given, y: seen.append(y))
            self.norm(self.body(x))
            handle.remove()
            return seen[0]
        self.config.early = True
        y = self.body(x)
        self.config.early = False
        return y


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.config = nn.Conv2d(4, 4, 3, padding=1), SimpleNamespace(early=False)

    def forward(self, x):
        y = self.conv(x)
        return y if self.config.early else y * 1.0


@pytest.mark.parametrize("way", ["hook", "config"])
def test_other_forwards_are_followed_into_what_they_run(way):
    model, x = settled(Switched(way)), torch.randn(2, 4, 8, 8, dtype=torch.float64)
    deploy = structrep.reparameterize(model)
    assert relative_error(deploy(x), model(x)) < 1e-13
    assert relative_error(deploy.forward_body(x), model.forward_body(x)) < 1e-13


def test_weights_written_past_their_version_are_those_that_are_merged():
    model, x = settled(nn.Sequential(Pair(), nn.ReLU())), torch.randn(2, 4, 8, 8, dtype=torch.float64)
    plan = structrep.plan(model)
    model[0].conv.weight.data.mul_(2)
    assert relative_error(plan.apply()(x), model(x)) < 1e-13


class Shares(nn.Module):
    """A list that two modules hold: one writes, the other reads."""

    def __init__(self):
        super().__init__()
        self.pair, self.kept = Pair(), []
        self.pair.kept = self.kept

    def forward(self, x):
        self.pair.kept.append(1)
        return self.pair(x) * self.kept.pop()


class Mixed:
    def __deepcopy__(self, memo):
        made = type(self)()
        made.load_state_dict(self.state_dict())
        return made.to(next(self.parameters())).eval()


class Locked(nn.Module, Mixed):
    def __init__(self):
        super().__init__()
        self.pair, self.lock = Pair(), threading.Lock()

    def forward(self, x):
        return self.pair(x)


@pytest.mark.parametrize("make", [Shares, Locked])
def test_models_are_copied_as_deepcopy_copies_them(make):
    model, x = settled(make()), torch.randn(2, 4, 8, 8, dtype=torch.float64)
    assert relative_error(structrep.reparameterize(model)(x), model(x)) < 1e-13
