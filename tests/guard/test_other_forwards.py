"""Other forwards of a model give what they gave, also where they look at what forward merges across."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import structrep
from structrep.blocks.dbb import NormPad
from tests.support.models import conv, settled
from tests.support.truth import CLOSE, EXACT, SAME, check, relative_error, says

X = torch.randn(2, 4, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Block(nn.Sequential):
    """Ends and starts with a convolution: two of them are a chain."""

    def __init__(self):
        super().__init__(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.blocks = nn.Sequential(nn.Sequential(Block(), Block()), nn.Sequential(Block(), Block()))
        self.head = nn.Conv2d(4, 3, 1)

    def forward_features(self, x):
        return self.blocks(self.norm(self.stem(x)).relu())

    def forward(self, x):
        return self.head(self.forward_features(x))


class Stages(Net):
    """Values between stages, and the features."""

    def forward_intermediates(self, x, indices=None):
        x = self.norm(self.stem(x)).relu()
        found = []
        for index, stage in enumerate(self.blocks):
            x = stage(x)
            if indices is None or index in indices:
                found.append(x)
        return found


class BeforeTheNorm(Net):
    def forward_stem(self, x):
        return self.stem(x)


class Indirectly(Net):
    """The blocks are handed to somebody."""

    def forward_all(self, x):
        x = self.norm(self.stem(x)).relu()
        return torch.cat(list(running(x, self.blocks[0])), 1)


def running(x, blocks):
    for block in blocks:
        x = block(x)
        yield x


class Yolo(nn.Module):
    """As ultralytics' Conv: a forward for after the norm was folded."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.SiLU()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))

    def forward_fuse(self, x):
        return self.act(self.conv(x))


def test_a_forward_for_the_converted_model_is_none_that_stands_in_the_way():
    model = settled(Yolo())
    deploy = structrep.reparameterize(model)
    assert isinstance(deploy.bn, nn.Identity)
    assert relative_error(deploy.forward_fuse(X), model(X)) < EXACT


class DropsTwice(nn.Module):
    """One dropout for two places, as in timm's MLPs: what reads it differs from call to call."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.drop = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Dropout()
        self.scale = nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, x):
        return self.scale * self.drop(self.b(self.drop(self.a(x).relu())))


class Scaled(Stages):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(DropsTwice(), DropsTwice())


class NotFollowed(Net):
    def forward_some(self, x):
        x = self.norm(self.stem(x)).relu()
        for stage in self.blocks:
            x = stage(x)
            if float(x.sum()) > 1e9:
                return x
        return x


@pytest.mark.parametrize(
    ("make", "method", "convs"),
    # ten convolutions; three pairs of them meet where nobody looks: within the two stages, and between
    [(Net, "forward_features", 7), (Stages, "forward_intermediates", 8), (BeforeTheNorm, "forward_stem", 7),
     (Scaled, "forward_intermediates", 6), (Indirectly, "forward_all", 9), (NotFollowed, "forward_some", 8)],
)  # fmt: skip
def test_other_forwards(make, method, convs):
    model = settled(make())
    deploy = structrep.reparameterize(model)
    assert relative_error(deploy(X), model(X)) < EXACT
    mine, truth = getattr(deploy, method)(X), getattr(model, method)(X)
    pairs = zip(mine, truth, strict=True) if isinstance(truth, list) else [(mine, truth)]
    for one, two in pairs:
        assert relative_error(one, two) < EXACT
    assert sum(isinstance(m, nn.Conv2d) for m in deploy.modules()) == convs
    if make is Scaled:
        assert deploy.blocks[0].scale is None
    stays = [make in (BeforeTheNorm, NotFollowed)]
    assert [isinstance(deploy.norm, nn.BatchNorm2d)] == stays


def test_the_plan_says_which_method_stands_in_the_way():
    plan = says(structrep.plan(settled(BeforeTheNorm())), 4, "Shared")
    reasons = [r.reason for r in plan.refusals if r.kind == "Shared" and "norm" in r.layers]
    assert len(reasons) == 1
    assert "BeforeTheNorm.forward_stem may look at what stem gives" in reasons[0]


class Early(Net):
    """Gives back what stands between the stem and its norm, if asked to."""

    def forward(self, x, stem_only: bool = False):
        x = self.stem(x)
        if stem_only:
            return x
        return self.head(self.blocks(self.norm(x).relu()))


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Early()

    def forward(self, x, stem_only=False):
        return self.inner(x, stem_only=stem_only)


@pytest.mark.parametrize("make", [Early, Outer])
def test_a_flag_that_gives_back_what_stands_in_a_merge_keeps_it_from_being_done(make):
    model = settled(make())
    deploy = structrep.reparameterize(model)
    for flag in (False, True):
        assert relative_error(deploy(X, stem_only=flag), model(X, stem_only=flag)) < SAME
    assert sum(isinstance(m, nn.BatchNorm2d) for m in deploy.modules()) == 1  # that of the stem


class Around(nn.Module):
    """Never turns the flag of its part."""

    def __init__(self):
        super().__init__()
        self.inner = Early()

    def forward(self, x):
        return self.inner(x).relu()


def test_a_flag_of_a_part_that_the_model_never_turns_is_guarded():
    model = settled(Around())
    deploy = structrep.reparameterize(model)
    assert relative_error(deploy(X), model(X)) < SAME
    assert not any(isinstance(m, nn.BatchNorm2d) for m in deploy.modules())
    with pytest.raises(ValueError, match="stem_only"):
        deploy.inner(X, stem_only=True)


class Verbose(nn.Module):
    """A flag in a forward that is written anew: it is an error to turn it then, not a reason to merge nothing."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x, apart=False):
        a, b = self.a(x), self.b(x)
        return (a, b) if apart else a + b


def test_a_forward_that_is_written_anew_refuses_other_flags():
    model = settled(Verbose())
    deploy = structrep.reparameterize(model)
    assert relative_error(deploy(X), model(X)) < SAME
    assert sum(isinstance(m, nn.Conv2d) for m in deploy.modules()) == 1
    with pytest.raises(ValueError, match="apart"):
        deploy(X, apart=True)


class Unfollowable(Net):
    """A flag whose forward depends on values: it says nothing against the merges."""

    def forward(self, x, probe=False):
        if probe and x.sum() > 0:
            x = -x
        return super().forward(x)


def test_a_flag_that_cannot_be_followed_keeps_nothing_from_being_merged():
    model = settled(Unfollowable())
    deploy = structrep.reparameterize(model)
    for flag in (False, True):
        assert relative_error(deploy(X, probe=flag), model(X, probe=flag)) < SAME
    assert not any(isinstance(m, nn.BatchNorm2d) for m in deploy.modules())


class SumFromZero(nn.Module):
    """MobileOne's way to add up branches, of which this block has one, and no skip."""

    def __init__(self, branches):
        super().__init__()
        pairs = (nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)) for _ in range(branches))
        self.branches, self.drop, self.act = nn.ModuleList(pairs), nn.Identity(), nn.ReLU()

    def forward(self, x):
        skip = out = 0
        for branch in self.branches:
            out += branch(x)
        out = self.drop(out)
        out += skip
        return self.act(out)


class Launched(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names = [*getattr(self, "names", ()), func.overloadpacket.__name__]
        return func(*args, **(kwargs or {}))


def test_nothing_is_launched_for_a_sum_with_zero():
    model, x = settled(nn.Sequential(SumFromZero(1), SumFromZero(2))), torch.randn(2, 4, 8, 8, dtype=torch.float64)
    deploy = structrep.reparameterize(model)
    with torch.no_grad(), Launched() as launched:
        found = deploy(x)
    assert launched.names == ["convolution", "relu"] * 2
    assert relative_error(found, model(x)) < SAME
    alone = structrep.reparameterize(model[0])
    assert type(alone) is SumFromZero, "no forward is written anew for the sum alone"


# --- by whatever way another forward comes to a layer --------------------------------------------------------


class Normed(nn.Module):
    """A convolution and a norm, between which something looks."""

    def __init__(self):
        super().__init__()
        self.c, self.n = conv(), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.n(self.c(x))


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


WAYS_THERE = [ByHelper, Decorated, ByGetattr, ByChildren, ByForward, ByWeight, ByFunction, ByIndex, NormAlone, Weights]


@pytest.mark.parametrize("cls", WAYS_THERE)
def test_what_another_forward_uses_stays(cls):
    check(cls(), X, merges=0, refused="Shared", method="forward_features")
    check(cls(), X, merges=0, refused="Shared")


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
    check(TwoNames(), X, merges=0, refused="Shared", method="forward_features", within=SAME)


class ReadsANorm(nn.Module):
    """A part whose forward reads what its norm makes of 0, run by another forward as by this one."""

    def __init__(self):
        super().__init__()
        self.one, self.border = conv(4, 4, 1), NormPad(nn.BatchNorm2d(4), ((1, 1), (1, 1)))
        self.two = nn.Conv2d(4, 4, 3)

    def forward(self, x):
        return self.two(self.border(self.one(x)))

    def forward_intermediates(self, x):
        y = self(x)
        return [y, y.relu()]


class ReadsMore(ReadsANorm):
    def forward_intermediates(self, x):
        y = self(x)
        return [y, y * self.border.norm.bias.sum()]


class AsksMore(ReadsANorm):
    def forward_intermediates(self, x):
        y = self(x)
        return [y, y * (1 if type(self.border.norm) is nn.BatchNorm2d else 2)]


@pytest.mark.parametrize(
    ("cls", "merges", "refused"), [(ReadsANorm, 1, ""), (ReadsMore, 0, "Shared"), (AsksMore, 0, "Shared Costlier")]
)
def test_a_part_that_reads_its_own_parts(cls, merges, refused):
    """Another forward that runs the part reads of it what `forward` does, and is no hindrance: DBB in timm's ResNet."""
    check(cls(), X, merges=merges, refused=refused, method="forward_intermediates", within=CLOSE)
    check(cls(), X, merges=merges, refused=refused, within=CLOSE)


class ReadsItsParts(nn.Module):
    """A block that computes with the weights of its layers, and calls none."""

    def __init__(self):
        super().__init__()
        self.c, self.n = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        y, n = F.conv2d(x, self.c.weight, self.c.bias), self.n
        return F.batch_norm(y, n.running_mean, n.running_var, n.weight, n.bias).relu()


class ReadsInside(nn.Module):
    def __init__(self):
        super().__init__()
        self.b, self.h = ReadsItsParts(), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.h(self.b(x))

    def forward_alike(self, x):
        return self(x), self.h(self.b(x).neg())


class WalksOverNumbers(ReadsInside):
    def forward_loss(self, x):
        return self(x), sum(p.square().sum() for p in self.b.parameters())


class WalksOverParts(ReadsInside):
    def forward_loss(self, x):
        return [self(x), *(m(x) for m in self.b.modules() if isinstance(m, nn.Conv2d))]


class ReadsAPart(ReadsInside):
    def forward_loss(self, x):
        return self(x), self.b.c.weight.square().sum()


class RunsAPart(ReadsInside):
    def forward_loss(self, x):
        return self(x), self.b.c(x)


@pytest.mark.parametrize("cls", [WalksOverNumbers, WalksOverParts, ReadsAPart, RunsAPart])
def test_parts_that_a_block_reads_and_another_forward_uses(cls):
    check(cls(), X, merges=0, refused="Shared Isolated", method="forward_loss", within=CLOSE)


def test_parts_that_a_block_reads_and_another_forward_runs_as_a_whole():
    check(ReadsInside(), X, merges=1, method="forward_alike", within=CLOSE)


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
    check(Switched(way), X, merges=0, refused="Shared", within=CLOSE)
    check(Switched(way), X, merges=0, refused="Shared", method="forward_body", within=CLOSE)


class Between(nn.Module):
    """Layers, what stands between them and a norm, and another forward that gives that."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.d, self.n, self.wide = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(8)


class SumBetween(Between):
    def forward(self, x):
        return self.n(self.a(x) + self.b(x.tanh()))

    def forward_sum(self, x):
        return self.a(x) + self.b(x.tanh())


class StackBetween(Between):
    def forward(self, x):
        return self.wide(torch.cat([self.a(x), self.b(x.tanh())], 1))

    def forward_sum(self, x):
        return torch.cat([self.a(x), self.b(x.tanh())], 1)


class UpBetween(Between):
    def forward(self, x):
        return self.n(F.interpolate(self.a(x), scale_factor=2.0))

    def forward_sum(self, x):
        return F.interpolate(self.a(x), scale_factor=2.0)


class NormBetween(Between):
    def forward(self, x):
        y = self.n(x.relu())
        return self.c(y) * self.d(y)

    def forward_sum(self, x):
        return self.c(x.relu())


class NamedByDefault(Between):
    def forward(self, x):
        return self.n(self.a(x))

    def forward_sum(self, x, name="a"):
        return getattr(self, name)(x)


class OfTheTable(NamedByDefault):
    def forward_sum(self, x):
        return self._modules["a"](x)


@pytest.mark.parametrize("kind", [SumBetween, StackBetween, UpBetween, NormBetween, NamedByDefault, OfTheTable])
def test_what_another_forward_gives_of_what_stands_between(kind):
    check(kind(), X, merges=0, refused="Shared", method="forward_sum")


class SameBetween(SumBetween):
    def forward_sum(self, x):
        return self.n(self.a(x) + self.b(x.tanh())).relu()


class NamedByWhoCalls(NamedByDefault):
    def forward_sum(self, x, names=()):
        return self.n(self.a(x)).relu()

    def forward_plugin(self, x, names):
        for name in names:
            x = getattr(self, name)(x)
        return x


@pytest.mark.parametrize(("kind", "merges"), [(SameBetween, 2), (NamedByWhoCalls, 1)])
def test_another_forward_that_does_the_same(kind, merges):
    check(kind(), X, merges=merges, method="forward_sum")


class Both(nn.Module):
    """Two forwards with the same text."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.n = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.k, self.scale = nn.Parameter(torch.randn(4, 4, 1, 1)), nn.Parameter(torch.rand(4, 1, 1))


class Doubled(Both):
    def forward(self, x):
        return (self.a(x) * 2.0).relu()

    def forward_again(self, x):
        return (self.a(x) * 2.0).relu()


class Added(Both):
    def forward(self, x):
        return (self.a(x) + self.b(x)).relu()

    def forward_again(self, x):
        return (self.a(x) + self.b(x)).relu()


class Computed(Both):
    def forward(self, x):
        return self.n(F.conv2d(x, self.k * 2)).relu()

    def forward_again(self, x):
        return F.conv2d(x, self.k * 2)


class Sized(Both):
    """Cannot be followed."""

    def forward(self, x):
        return (self.a(x) + self.b(x)).relu()

    def forward_again(self, x):
        return self.a(x) + self.b(x) if float(x.sum()) > 1e9 else self.b(x) + self.a(x)


@pytest.mark.parametrize("kind", [Doubled, Added, Computed, Sized])
def test_text_of_another_forward_does_not_change_with_that_of_forward(kind):
    check(kind(), X, merges=0, refused="Shared", within=CLOSE, method="forward_again")


class Calls(Added):
    def forward_again(self, x):
        return self(x) * 2


class OtherParts(Added):
    def forward_again(self, x):
        return self.n(x) * self.scale


class Swaps(Both):
    """No text changes."""

    def forward(self, x):
        return self.n(self.a(x)).relu()

    def forward_again(self, x):
        return self.n(self.a(x)).tanh()


@pytest.mark.parametrize("kind", [Calls, OtherParts, Swaps])
def test_what_changes_for_another_forward_too(kind):
    check(kind(), X, merges=1, method="forward_again")
