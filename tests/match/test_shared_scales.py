"""Norms that several layers take between them: all do, or none."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import structrep
from structrep.trace.follow import trace
from tests.support.models import noise, settled
from tests.support.truth import CLOSE, EXACT, distance, relative_error, says

X = torch.randn(2, 4, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def norms(model):
    return sum(isinstance(m, nn.modules.batchnorm._NormBase) for m in model.modules())


class Attention(nn.Module):
    """Queries, keys and values of one norm, whose input goes on as a skip."""

    def __init__(self, **value):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm2d(4), nn.Dropout()
        self.q, self.k = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, bias=False)
        self.v = nn.Conv2d(4, 4, **{"kernel_size": 1, **value})

    def forward(self, x):
        y = self.drop(self.norm(x))
        n, c, h, w = y.shape
        weights = (self.q(y) * self.k(y)).mean(1, keepdim=True).sigmoid()
        return x + (weights * self.v(y)).reshape(n, -1, h, w)[:, :c]


class Mixed(nn.Module):
    """As MixNet: kernels of several sizes on shares of the channels, one norm behind them all."""

    def __init__(self, norm=None):
        super().__init__()
        self.three, self.five = nn.Conv2d(1, 2, 3, padding=1, bias=False), nn.Conv2d(3, 5, 5, padding=2)
        self.norm = norm or nn.BatchNorm2d(7)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        a, b = x.split([1, 3], 1)
        return self.act(self.norm(torch.cat([self.three(a), self.five(b)], 1)))


class Functional(nn.Module):
    """The same, written out; a norm of their own on one branch."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, 3, 3))
        self.conv, self.own, self.norm = nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2), nn.BatchNorm2d(5)

    def forward(self, x):
        y = torch.cat([F.conv2d(x.relu(), self.weight, padding=1), self.own(self.conv(x.sigmoid()))], dim=1)
        n = self.norm
        return F.batch_norm(y, n.running_mean, n.running_var, n.weight, n.bias, False, 0.0, n.eps)


class TwiceCalled(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Attention()

    def forward(self, x):
        return self.inner(self.inner(x) * 2)


@pytest.mark.parametrize("make", [Attention, Mixed, Functional, TwiceCalled, lambda: nn.Sequential(Mixed(), nn.ReLU())])
def test_all_take_their_part(make):
    for inplace in (False, True):
        model = settled(make())
        truth = model(X.clone())
        deploy = structrep.reparameterize(model, inplace=inplace)
        assert relative_error(deploy(X.clone()), truth) < EXACT
        assert norms(deploy) == 0 or make is Functional
        if make is Functional:
            assert deploy.norm is None
        plan = structrep.plan(deploy)
        assert not plan.merges


def refusals(model):
    return {refusal.kind for refusal in structrep.plan(model).refusals}


def stays(model, norm="norm", x=X):
    deploy = structrep.reparameterize(model)
    assert relative_error(deploy(x.clone()), model(x.clone())) < EXACT
    assert isinstance(deploy.get_submodule(norm), nn.BatchNorm2d)
    return deploy


def test_none_does_where_one_is_padded():
    model = settled(Attention(kernel_size=3, padding=1))
    deploy = stays(model)
    assert refusals(model) == {"Inexact"}
    assert torch.equal(deploy.q.weight, model.q.weight)


def test_none_does_where_one_is_hooked():
    model = settled(Attention())
    seen = []
    model.k.register_forward_hook(lambda module, args, output: seen.append(args))
    stays(model)
    mixed = settled(Mixed())
    mixed.five.register_forward_hook(lambda module, args, output: seen.append(args))
    stays(mixed)


def test_none_does_where_one_is_used_elsewhere():
    class Elsewhere(Attention):
        def forward(self, x):
            return super().forward(x) + self.k(x)

    stays(settled(Elsewhere()))

    class Seen(Mixed):
        def forward(self, x):
            a, b = x.split([1, 3], 1)
            y = self.three(a)
            return self.norm(torch.cat([y, self.five(b)], 1)) * y.mean()

    stays(settled(Seen()))


def test_none_does_where_what_is_normed_is_overwritten():
    class Overwrites(Attention):
        def forward(self, x):
            x = x * 1.5
            y = self.norm(x)
            q = self.q(y)
            x += 1
            return q * self.k(y) + x

    model = settled(Overwrites())
    stays(model)
    assert "Mutated" in refusals(model)


def test_none_does_where_the_code_of_one_cannot_be_written():
    """The value of one is read in a forward that also changes itself."""

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.calls = nn.Parameter(torch.randn(4, 4, 1, 1)), 0

        def forward(self, x):
            self.calls += 1
            return F.conv2d(x, self.weight)

    class Counted(Attention):
        def __init__(self):
            super().__init__()
            self.v = Counting()

    model = settled(Counted())
    deploy = structrep.reparameterize(model)  # whose text stays, and counts
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    assert relative_error(deploy(x), model(x)) < EXACT
    assert deploy.v.calls > 0


def test_one_layer_may_take_parts_of_two():
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.BatchNorm2d(4), nn.BatchNorm2d(5)
            self.a, self.b, self.c = nn.Conv2d(4, 3, 3), nn.Conv2d(4, 2, 3), nn.Conv2d(4, 1, 1)

        def forward(self, x):
            y = self.first(x.relu())
            return self.second(torch.cat([self.a(y), self.b(y)], 1)).relu(), self.c(y)

    model = settled(Chain())
    deploy = structrep.reparameterize(model)
    for mine, truth in zip(deploy(X), model(X), strict=True):
        assert relative_error(mine, truth) < EXACT
    assert norms(deploy) == 0


class GlobalResponse(nn.Module):
    """A global response norm of values (N, H, W, C), as ConvNeXt V2 and UniRepLKNet have it."""

    def __init__(self, channels):
        super().__init__()
        self.gamma, self.beta = (nn.Parameter(torch.randn(1, 1, 1, channels)) for _ in range(2))

    def forward(self, x):
        size = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        return (self.gamma * (size / (size.mean(dim=-1, keepdim=True) + 1e-6)) + 1) * x + self.beta


class Permute(nn.Module):
    def __init__(self, *dims):
        super().__init__()
        self.dims = dims

    def forward(self, x):
        return x.permute(self.dims)


class FeedForward(nn.Module):
    """Linears on the last dim, a norm and a scale on dim 1 behind them, as in UniRepLKNet (arXiv:2311.15599)."""

    def __init__(self, channels=4):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.first = nn.Sequential(Permute(0, 2, 3, 1), nn.Linear(channels, 7))
        self.act = nn.Sequential(nn.GELU(), GlobalResponse(7))
        self.second = nn.Sequential(nn.Linear(7, channels, bias=False), Permute(0, 3, 1, 2), nn.BatchNorm2d(channels))
        self.gamma = nn.Parameter(torch.randn(channels))

    def forward(self, x):
        y = self.second(self.act(self.first(self.norm(x.relu()))))
        return self.gamma.view(1, -1, 1, 1) * y + x


class TokenNorm(nn.Module):
    """RepBN (arXiv:2405.11582) of tokens (N, L, C)."""

    def __init__(self, channels):
        super().__init__()
        self.alpha, self.bn = nn.Parameter(torch.ones(1)), nn.BatchNorm1d(channels)

    def forward(self, x):
        x = x.transpose(1, 2)
        return (self.bn(x) + self.alpha * x).transpose(1, 2)


class Windows(nn.Module):
    """Attention in shifted windows of 3x3 tokens, behind a norm of tokens."""

    def __init__(self, channels=4):
        super().__init__()
        self.norm, self.qkv = TokenNorm(channels), nn.Linear(channels, 3 * channels)

    def forward(self, x):
        n, _, h, w = x.shape
        tokens = self.norm(x.flatten(2).transpose(1, 2))
        y = torch.roll(tokens.view(n, h, w, -1), shifts=(-1, -1), dims=(1, 2))
        y = y.view(n, h // 3, 3, w // 3, 3, y.shape[-1]).permute(0, 1, 3, 2, 4, 5).contiguous()
        q, k, v = self.qkv(y.view(-1, 9, y.shape[-1])).chunk(3, -1)
        return (q @ k.transpose(1, 2)).softmax(-1) @ v, tokens


def test_a_scale_is_taken_by_a_layer_whose_dims_are_moved():
    for example in (None, X):
        model = settled(FeedForward())
        deploy = structrep.reparameterize(model, example)
        assert relative_error(deploy(X), model(X)) < EXACT
        assert norms(deploy) == 0
        assert deploy.gamma is None
        assert deploy.act[1].beta is None
        assert deploy.second[0].bias is not None
        assert not structrep.plan(deploy).merges


def test_a_norm_of_tokens_goes_into_the_linear_behind_a_window_partition():
    model = settled(Windows())
    x = torch.randn(2, 4, 6, 9, dtype=torch.float64)
    deploy = structrep.reparameterize(model, x)
    for mine, truth in zip(deploy(x), model(x), strict=True):
        assert relative_error(mine, truth) < EXACT
    assert norms(deploy) == 1, "the tokens are an output too"

    class Alone(Windows):
        def forward(self, x):
            return super().forward(x)[0]

    model = settled(Alone())
    deploy = structrep.reparameterize(model, x)
    assert relative_error(deploy(x), model(x)) < EXACT
    assert norms(deploy) == 0
    assert not structrep.plan(deploy, x).merges


class Moved(nn.Module):
    """A Linear, some moves of its dims, a norm on dim 1 or a scale of the last, and its use."""

    def __init__(self, moves, channels=4, norm=True):
        super().__init__()
        self.linear, self.moves = nn.Linear(channels, channels), moves
        self.norm = nn.BatchNorm2d(channels)
        self.scale = None if norm else nn.Parameter(torch.randn(channels))

    def forward(self, x):
        y = self.moves(self.linear(x))
        return y * self.scale if self.scale is not None else self.norm(y)


@pytest.mark.parametrize(
    ("moves", "norm", "merges"),
    [
        (lambda y: y.permute(0, 3, 2, 1), True, True),
        (lambda y: y.transpose(1, 3), True, True),
        (lambda y: y.transpose(1, -1).flip(2), True, True),
        (lambda y: y.flip(3).permute(0, 3, 1, 2), True, True),  # channels in another order
        (lambda y: y.permute(0, 1, 3, 2), True, False),  # the norm is of other dims
        (lambda y: y.roll(1).permute(0, 3, 1, 2), True, True),
        (lambda y: y[..., :3].roll(1).permute(0, 3, 1, 2).repeat(1, 2, 1, 1)[:, :4], True, False),
        (lambda y: y.roll(1, 1).permute(0, 3, 1, 2), True, True),
        (lambda y: y.reshape(-1, 4), False, True),
        (lambda y: y.flatten(1, 2).roll(1, -2), False, True),
        (lambda y: y.transpose(2, 3), False, False),
        (lambda y: y.transpose(2, 3).reshape(-1, 4), False, False),
        (lambda y: y.permute(0, 3, 1, 2) + y.mean(), True, False),
        (lambda y: y.flip(1, 3).permute(0, 3, 1, 2), True, True),
        (lambda y: y.reshape(4, 4, 4, 2, 2).transpose(3, 4).reshape(4, 4, 4, 4), False, True),  # heads
        (lambda y: y.reshape(4, 16, 2, 2).flip(2).reshape(4, 4, 4, 4), False, True),
        (lambda y: y.reshape(4, 8, 2, 4).flip(1).reshape(4, 4, 4, 4).transpose(1, 2), False, True),
        (lambda y: y.reshape(4, 4, 2, 8).flip(3).reshape(4, 4, 4, 4), False, True),
        (lambda y: y.reshape(4, 4, 2, 2, 4).transpose(2, 4).reshape(4, 4, 4, 4), False, False),
    ],
)
def test_moves(moves, norm, merges):
    """All sizes are 4, so that a mistake of the dim would still run."""
    model = settled(Moved(moves, norm=norm))
    x = torch.randn(4, 4, 4, 4, dtype=torch.float64)
    plan = structrep.plan(model, x)
    deploy = structrep.reparameterize(model, x)
    assert relative_error(deploy(x), model(x)) < EXACT
    assert (norms(deploy) == 0 if norm else len(plan.merges) == 1) == merges


class Tokens(nn.Module):
    """Queries, keys and values of one norm of tokens (N, L, C), and an output of both."""

    def __init__(self, norm, **value):
        super().__init__()
        self.norm, self.q, self.k = norm, nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.v = nn.Linear(4, 4)

    def forward(self, x):
        y = self.norm(x)
        return x + (self.q(y) @ self.k(y).transpose(1, 2)).softmax(-1) @ self.v(y)


class OwnNorm(nn.LayerNorm):
    """As timm's: a layer norm with a forward of its own."""

    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class Written(nn.Module):
    """As in Llama: an RMS norm that is written out."""

    def __init__(self, channels, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(channels)), eps

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class Shown(Written):
    """Its text is about its weight."""

    def extra_repr(self):
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


def learned(module, seed=0):
    """With no weight or bias as it was initialized."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.uniform_(0.5, 1.5, generator=generator)
    return module.double().eval()


TOKENS = torch.randn(2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LayerNorm(4),
        lambda: nn.LayerNorm(4, bias=False),
        lambda: nn.RMSNorm(4),
        lambda: OwnNorm(4),
        lambda: Written(4),
        lambda: Shown(4),
        lambda: nn.Sequential(OwnNorm(4), nn.Dropout()),
    ],
)
def test_weight_and_bias_of_a_norm_of_tokens_go_into_the_linears(make):
    for inplace in (False, True):
        model = learned(Tokens(make()))
        truth, numbers = model(TOKENS), sum(p.numel() for p in model.parameters())
        own = sum(p.numel() for p in model.norm.parameters())
        deploy = structrep.reparameterize(model, inplace=inplace)
        assert relative_error(deploy(TOKENS), truth) < EXACT
        assert not list(deploy.norm.parameters())
        assert repr(deploy.norm) == repr(pickle.loads(pickle.dumps(deploy)).norm)
        biases = own > 4  # then the keys, which have no bias of their own, are given one
        assert sum(p.numel() for p in deploy.parameters()) == numbers - own + 4 * biases
        assert not structrep.plan(deploy).merges


@pytest.mark.parametrize("norm", [lambda: nn.GroupNorm(2, 4), lambda: nn.InstanceNorm2d(4, affine=True)])
def test_weight_and_bias_of_a_norm_of_images_go_into_the_convolution(norm):
    model = learned(nn.Sequential(nn.Conv2d(4, 4, 3), norm(), nn.Conv2d(4, 6, 1), nn.GELU()))
    deploy = structrep.reparameterize(model)
    assert relative_error(deploy(X), model(X)) < EXACT
    assert type(deploy[1]) is type(model[1])
    assert not list(deploy[1].parameters())
    assert not structrep.plan(deploy).merges


def test_a_functional_norm_gives_up_its_weight_and_bias():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias, self.linear = (
                nn.Parameter(torch.ones(4)),
                nn.Parameter(torch.ones(4)),
                nn.Linear(4, 3),
            )

        def forward(self, x):
            return self.linear(F.layer_norm(x, [4], weight=self.weight, bias=self.bias, eps=0.1))

    model = learned(Functional())
    deploy = structrep.reparameterize(model)
    assert relative_error(deploy(TOKENS), model(TOKENS)) < EXACT
    assert deploy.weight is None
    assert deploy.bias is None


class Elsewhere(nn.Module):
    """A norm of tokens that a Linear reads, and something else."""

    def __init__(self, how):
        super().__init__()
        self.norm, self.linear, self.how = nn.LayerNorm(4), nn.Linear(4, 4), how

    def forward(self, x):
        if self.how == "twice":
            return self.linear(self.norm(x)) + self.norm(x.exp()).relu()
        y = self.norm(x)
        if self.how == "kept":
            self.seen = y
        if self.how == "weight":
            return self.linear(y).relu() * self.norm.weight.sum()
        if self.how == "written":
            y += 1
        return self.linear(y) + (y if self.how == "skip" else 0)


@pytest.mark.parametrize("how", ["skip", "twice", "kept", "weight", "written"])
def test_a_norm_that_is_of_use_elsewhere_keeps_its_weight(how):
    model = learned(Elsewhere(how))
    deploy = structrep.reparameterize(model)
    assert relative_error(deploy(TOKENS), model(TOKENS)) < EXACT
    assert torch.equal(deploy.norm.weight, model.norm.weight)
    if how == "kept":
        assert torch.equal(deploy.seen, model.seen)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.GroupNorm(2, 4), nn.Conv2d(4, 3, 3, padding=1)),  # reads its bias outside
        nn.Sequential(nn.LayerNorm((6, 5)), nn.Conv2d(4, 3, 1)),  # a weight per pixel
        nn.Sequential(nn.LayerNorm(5), nn.Conv2d(4, 3, 1)),  # a weight per column
        nn.Sequential(nn.GroupNorm(2, 4), nn.Linear(5, 3)),  # channels, and then columns
    ],
)
def test_a_norm_whose_weight_is_none_of_the_layer_keeps_it(model):
    plan = structrep.plan(learned(model))
    assert not plan.merges
    deploy = plan.apply()
    assert relative_error(deploy(X), model(X)) < EXACT
    assert torch.equal(deploy[0].weight, model[0].weight)


def test_a_scale_that_its_module_keeps_stays():
    class Keeps(Attention):
        def forward(self, x):
            self.seen = self.norm(x)
            return self.q(self.seen) * self.k(self.seen)

    model = settled(Keeps())
    deploy = stays(model)
    assert torch.equal(deploy.seen, model.seen)


class Features(nn.Module):
    """A scale and who takes it, in two forwards, of which `forward_features` may be run alone."""

    def __init__(self, how):
        super().__init__()
        self.norm = nn.LayerNorm(4) if how == "tokens" else nn.BatchNorm2d(4)
        self.linear, self.a, self.b = nn.Linear(4, 4), nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)
        self.p, self.q, self.how = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), how

    def forward_features(self, x):
        if self.how in ("readers", "called readers"):
            return self.norm(x.relu())
        if self.how == "tokens":
            return self.norm(x)
        return self.linear(x).permute(0, 3, 1, 2) if self.how == "maker" else torch.cat([self.a(x), self.b(x)], 1)

    def forward(self, x):
        if self.how == "readers":
            y = self.norm(x.relu())
            return self.p(y) * self.q(y)
        y = self.forward_features(x)
        if self.how == "tokens":
            return self.linear(y)
        return self.p(y) * self.q(y) if self.how == "called readers" else self.norm(y)


@pytest.mark.parametrize("how", ["readers", "called readers", "tokens", "maker", "branches"])
def test_what_another_forward_gives_back_stays_what_it_is(how):
    model = learned(settled(Features(how)))
    x = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    deploy = structrep.reparameterize(model)
    assert relative_error(deploy(x), model(x)) < EXACT
    assert relative_error(deploy.forward_features(x), model.forward_features(x)) < EXACT
    assert any("forward_features" in refusal.reason for refusal in structrep.plan(model).refusals)


@pytest.mark.parametrize("make", [Attention, Mixed, FeedForward])
def test_verification_knows_of_scales_that_layers_took(make):
    model = settled(make()).float()
    found = structrep.plan(model, X.float()).verify(X.float())
    assert found.ok
    assert found.regions
    assert found.first_off is None


class Heads(nn.Module):
    """A norm of tokens, whose channels are mixed before a Linear takes them."""

    def __init__(self, mix):
        super().__init__()
        self.norm, self.linear, self.mix = nn.LayerNorm(4), nn.Linear(4, 4), mix

    def forward(self, x):
        return self.linear(self.mix(self.norm(x)))


@pytest.mark.parametrize(
    "mix",
    [
        lambda y: y.view(2, 4, 2, 2).transpose(1, 2).reshape(2, 4, 4),
        lambda y: y.view(2, 4, 2, 2).permute(0, 2, 1, 3).flatten(2).view(2, 4, 4),
        lambda y: y.view(2, 4, 4).flip(1, 2),
        lambda y: y.roll(1, 2),
        lambda y: y.reshape(2, 2, 4, 2).roll(1, 1).reshape(2, 4, 4),
    ],
)
def test_channels_that_are_mixed_are_followed_no_further(mix):
    for example in (False, True):
        model = learned(settled(Heads(mix)))
        x = torch.randn(2, 4, 4, dtype=torch.float64)
        deploy = structrep.reparameterize(model, x if example else None)
        assert relative_error(deploy(x), model(x)) < EXACT


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_parametrized_norm_keeps_its_weight(name):
    class Positive(nn.Module):
        def forward(self, w):
            return F.softplus(w)

    norm = nn.LayerNorm(4)
    torch.nn.utils.parametrize.register_parametrization(norm, name, Positive())
    model = learned(nn.Sequential(norm, nn.Linear(4, 4)))
    deploy = structrep.reparameterize(model)
    assert relative_error(deploy(TOKENS), model(TOKENS)) < EXACT


def rows(y):
    return y.permute(0, 2, 1)


def turned(y):
    return y.transpose(1, 2)


def by_hand(y, n):
    return F.batch_norm(y, n.running_mean, n.running_var, n.weight, n.bias, False, 0.0, n.eps)


# One norm of channels between two permutations, each with what it merges to.
BETWEEN = {
    "a convolution, turned there and back": (lambda s, x: turned(s.norm(turned(turned(s.conv(x))))), 1),
    "a Linear": (lambda s, x: rows(s.norm(rows(s.first(x)))), 1),
    "a Linear, transposed": (lambda s, x: turned(s.norm(turned(s.first(x)))), 1),
    "both": (lambda s, x: turned(s.norm(rows(s.first(x)))), 1),
    "a skip": (lambda s, x: x + rows(s.norm(rows(s.first(x)))), 1),
    "a Linear behind it": (lambda s, x: s.first(turned(s.norm(turned(x)))), 1),
    "a Linear behind it, permuted": (lambda s, x: s.first(rows(s.norm(rows(x)))), 1),
    "Linears on both sides": (lambda s, x: s.second(rows(s.norm(rows(s.first(x))))), 1),
    "Linears on both sides of an activation": (lambda s, x: s.second(rows(s.norm(rows(s.first(x)))).relu()), 1),
    "two Linears behind it": (lambda s, x: (lambda y: s.first(y) * s.second(y))(rows(s.norm(rows(x)))), 2),
    "a scale behind the norm": (lambda s, x: rows(s.norm(rows(s.first(x))) * s.gamma.view(1, -1, 1)), 1),
    "a scale behind the permutation": (lambda s, x: rows(s.norm(rows(s.first(x)))) * s.gamma, 1),
    "two norms": (lambda s, x: rows(s.other(rows(rows(s.norm(rows(s.first(x))))))), 1),
    "two norms in a row": (lambda s, x: rows(s.other(s.norm(rows(s.first(x))))), 1),
    "a norm and what it is given (RepBN)": (lambda s, x: (lambda t: rows(s.norm(t) + 0.5 * t))(rows(s.first(x))), 1),
    "a reshape": (lambda s, x: rows(s.norm(rows(s.first(x).reshape(-1, 4, 4)))), 1),
    "a norm by hand": (lambda s, x: rows(by_hand(rows(s.first(x)), s.norm)), 1),
    "a norm that is read twice": (lambda s, x: (lambda y: rows(y) * y.mean())(s.norm(rows(s.first(x)))), 1),
    "two permutations behind": (lambda s, x: (lambda y: (rows(y), turned(y) * 2))(s.norm(rows(s.first(x)))), 1),
    # The scale between is one of the last dim, which no permutation makes one of the channels.
    "a scale of the other dim": (lambda s, x: turned(s.norm(turned(s.first(x)) * s.gamma)), 0),
}


class Between(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how, self.conv = how, nn.Conv1d(4, 4, 3, padding=1)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm, self.other, self.gamma = nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.Parameter(torch.rand(4) + 0.5)

    def forward(self, x):
        return BETWEEN[self.how][0](self, x)


@pytest.mark.parametrize("how", BETWEEN)
def test_a_norm_between_two_permutations_is_merged_once(how):
    for verify in (False, True):
        model = settled(Between(how))
        x = torch.randn(4, 4, 4, dtype=torch.float64)  # of one size, so that a mistake of the dim would still run
        for example in (None, x):
            plan = structrep.plan(model, example)
            assert len(plan.merges) == BETWEEN[how][1]
            deploy = plan.reparameterize(example, verify=verify)
            assert distance(deploy(x), model(x)) < EXACT
            left = [module for module, _ in trace(deploy).calls if isinstance(module, nn.BatchNorm1d)]
            assert bool(left) == (not plan.merges)


def test_a_norm_that_was_probed_is_no_norm_of_each_value_too():
    norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    model = settled(nn.Sequential(nn.ReLU(), norm, nn.Conv2d(4, 4, 1), nn.ReLU()))
    plan = structrep.plan(model, X, probe="1")
    assert [merge.rules for merge in plan.merges] == [("fold_prenorm",)]
    assert relative_error(plan.reparameterize(X)(X), model(X)) < EXACT


class ByAPartsParameters(nn.Module):
    """A norm that is written, of a part that is never called: its scale goes into the next layer, once."""

    def __init__(self, holder):
        super().__init__()
        self.c, self.d = nn.Linear(4, 8), nn.Linear(8, 4)
        norm = nn.LayerNorm(8)
        self.n = norm if holder is nn.LayerNorm else holder()
        self.n.weight = nn.Parameter(torch.rand_like(norm.weight) + 0.5)
        self.n.bias = nn.Parameter(torch.randn_like(norm.bias))

    def forward(self, x):
        return self.d(F.layer_norm(self.c(x), (8,), self.n.weight, self.n.bias))


@pytest.mark.parametrize("holder", [nn.LayerNorm, nn.Module])
def test_a_norm_that_is_given_the_parameters_of_a_part(holder):
    for given in (False, True):
        torch.manual_seed(0)
        model, x = settled(ByAPartsParameters(holder)), torch.randn(2, 4, dtype=torch.float64)
        plan = structrep.plan(model, *((x,) if given else ()))
        assert len(plan.merges) == 1
        assert relative_error(plan.reparameterize()(x), model(x)) < EXACT


class Swapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.conv = nn.LayerNorm(4), nn.Conv1d(4, 6, 1)

    def forward(self, x):
        return self.conv(self.norm(x).transpose(1, 2))


def test_swapped_dims_that_only_an_example_tells():
    model, x = settled(Swapped()), noise(2, 5, 4)
    (refusal,) = says(structrep.plan(model), 0, "Isolated").refusals
    assert "structrep.plan(model, example_inputs)" in refusal.reason
    assert relative_error(says(structrep.plan(model, x), 1).apply()(x), model(x)) < CLOSE
