"""A scale goes through whatever moves or averages the numbers of each channel, and into the layer at the other end; not
where channels are mixed, divided otherwise from size to size, or beside a border that is made up."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from einops.layers.torch import Rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import structrep
from tests.support.models import settled
from tests.support.truth import EXACT, followed_or_told, relative_error

X = torch.randn(2, 4, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A norm before what takes it, and one behind what makes it."""

    def __init__(self, how, before, behind, forward):
        super().__init__()
        self.norm, self.how = nn.BatchNorm2d(before), how
        self.last, self.first = behind
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


def ahead(self, x):
    return self.last(self.how(self.norm(x.relu())))


def back(self, x):
    return self.norm(self.how(self.first(x)))


def shuffled(x):
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


AHEAD = {  # what stands between the norm and the layer, and that
    "flattened": (lambda x: x.flatten(1), nn.Linear(192, 5)),
    "tokens": (lambda x: x.flatten(2).transpose(1, 2), nn.Linear(4, 5)),
    "reflected": (lambda x: F.pad(x.flatten(2).transpose(1, 2).mT, (1, 1), mode="reflect"), nn.Conv1d(4, 5, 3)),
    "nn.ReplicationPad1d": (lambda x: nn.ReplicationPad1d(1)(x.flatten(2)), nn.Conv1d(4, 5, 3)),
    "permuted tokens": (lambda x: x.reshape(x.shape[0], 4, -1).permute(2, 0, 1), nn.Linear(4, 5)),
    "global average": (lambda x: x.mean((2, 3)), nn.Linear(4, 5)),
    "average that keeps dims": (lambda x: x.mean((-2, -1), keepdim=True), nn.Conv2d(4, 5, 1)),
    "adaptive pool, flattened": (lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1), nn.Linear(4, 5)),
    "pool of four, flattened": (lambda x: F.adaptive_avg_pool2d(x, 2).flatten(1), nn.Linear(16, 5)),
    "average of a dim": (lambda x: x.mean(3), nn.Conv1d(4, 5, 3)),
    "average pool": (lambda x: F.avg_pool2d(x, 2, count_include_pad=False, padding=1).tanh(), None),
    "channel shuffle": (shuffled, nn.Conv2d(4, 5, 1)),
    "nn.ChannelShuffle": (nn.ChannelShuffle(2), nn.Conv2d(4, 5, 1)),
    "pixel unshuffle": (lambda x: F.pixel_unshuffle(x, 2), nn.Conv2d(16, 5, 1)),
    "nearest": (lambda x: F.interpolate(x, scale_factor=2), nn.Conv2d(4, 5, 3)),
    "bilinear": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), nn.Conv2d(4, 5, 3)),
    "nn.Upsample": (nn.Upsample(scale_factor=2), nn.Conv2d(4, 5, 1)),
    "maximum": (lambda x: F.max_pool2d(x, 3, 2, 1), nn.Conv2d(4, 5, 3)),
    "nn.MaxPool2d": (nn.MaxPool2d(2), nn.Conv2d(4, 5, 1)),
    "some channels": (lambda x: x[:, 1:3], nn.Conv2d(2, 5, 1)),
    "some pixels": (lambda x: x[:, :, ::2, 1:], nn.Conv2d(4, 5, 1)),
    "turned": (lambda x: x.flip(1), nn.Conv2d(4, 5, 1)),
}
BACK = {
    "pixel shuffle": (lambda x: F.pixel_shuffle(x, 2), nn.Conv2d(4, 16, 3, padding=1), 4),
    "nn.PixelShuffle": (nn.PixelShuffle(2), nn.Conv2d(4, 8, 1), 2),
    "channel shuffle": (shuffled, nn.Conv2d(4, 6, 3), 6),
    "nearest": (lambda x: F.interpolate(x, scale_factor=3), nn.Conv2d(4, 6, 3), 6),
    "maximum": (nn.MaxPool2d(2), nn.Conv2d(4, 6, 3), 6),
    "adaptive pool": (lambda x: F.adaptive_avg_pool2d(x, 2), nn.Conv2d(4, 6, 3, padding=1), 6),
    "turned": (lambda x: x.flip(1), nn.Conv2d(4, 6, 1), 6),
}
MIXED = {  # channels are mixed, or of another number for another size
    "as rows": (lambda x: x.reshape(x.shape[0], -1, 4), nn.Linear(4, 5)),
    "average of channels": (lambda x: x.mean(1, keepdim=True), nn.Conv2d(1, 5, 1)),
    "border of zeros": (lambda x: F.avg_pool2d(x, 3, 1, 1), nn.Conv2d(4, 5, 1)),
    "padded with zeros": (lambda x: F.pad(x.flatten(2).transpose(1, 2).mT, (1, 1)), nn.Conv1d(4, 5, 3)),
    "padded with a channel": (lambda x: F.pad(x.transpose(2, 3), (0, 0, 0, 0, 0, 1)), nn.Conv2d(5, 5, 1)),
    "rolled rows": (lambda x: x.flatten(1).roll(1, 1).view_as(x), nn.Conv2d(4, 5, 1)),
    "sum": (lambda x: x.sum((2, 3)), nn.Linear(4, 5)),
    "sine": (lambda x: x.sin(), nn.Conv2d(4, 5, 1)),
    "rows of channels": (lambda x: x.transpose(1, 2), nn.Conv2d(6, 5, 1)),
}


def norms(model):
    return sum(isinstance(one, nn.modules.batchnorm._NormBase) for one in model.modules())


def judged(model, x, inputs, left):
    deploy = structrep.reparameterize(copy.deepcopy(model), *inputs)
    assert norms(deploy) == left, structrep.plan(model, *inputs)
    assert relative_error(deploy(x), model(x)) < EXACT
    return deploy


@pytest.mark.parametrize("name", [name for name, (_, last) in AHEAD.items() if last is not None])
def test_a_norm_before_what_moves_numbers(name):
    for inputs in ((), (X,)):
        how, last = AHEAD[name]
        judged(settled(Net(how, 4, (copy.deepcopy(last), None), ahead)), X, inputs, left=0)


@pytest.mark.parametrize("name", BACK)
def test_a_norm_behind_what_moves_numbers(name):
    for inputs in ((), (X,)):
        how, first, channels = BACK[name]
        judged(settled(Net(how, channels, (None, copy.deepcopy(first)), back)), X, inputs, left=0)


@pytest.mark.filterwarnings("ignore::structrep.NothingMerged")
@pytest.mark.parametrize("name", MIXED)
def test_a_norm_before_what_mixes_them_stays(name):
    for inputs in ((), (X,)):
        how, last = MIXED[name]
        judged(settled(Net(how, 4, (copy.deepcopy(last), None), ahead)), X, inputs, left=1)


@pytest.mark.filterwarnings("ignore::structrep.NothingMerged")
@pytest.mark.parametrize("forward", [ahead, back])
def test_a_scale_below_zero_turns_the_largest_into_the_smallest(forward):
    model = settled(Net(nn.MaxPool2d(2), 4, (nn.Conv2d(4, 5, 1), nn.Conv2d(4, 4, 1)), forward))
    judged(model, X, (), left=0)
    model.norm.weight.data[2] *= -1
    judged(model, X, (), left=1)


@pytest.mark.filterwarnings("ignore::structrep.NothingMerged")
def test_a_shift_does_not_go_into_a_layer_that_pads():
    model = settled(Net(nn.Upsample(scale_factor=2), 4, (nn.Conv2d(4, 5, 3, padding=1), None), ahead))
    judged(model, X, (), left=1)


def test_a_dim_of_one_number_hides_nothing():
    """Of one pixel, rows of channels are channels; of more they are not."""
    model = settled(Net(lambda x: x.reshape(x.shape[0], -1, 4), 4, (nn.Linear(4, 5), None), ahead))
    x = X[:, :, :1, :1]
    assert norms(structrep.reparameterize(copy.deepcopy(model), x)) == 1
    large = structrep.reparameterize(copy.deepcopy(model), x)(X)
    assert relative_error(large, model(X)) < EXACT


def test_a_norm_that_two_ways_read():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.n, self.a, self.b = nn.BatchNorm2d(4), nn.Linear(4, 3), nn.Conv2d(4, 3, 1)

        def forward(self, x):
            y = self.n(x.relu())
            return self.a(y.mean((2, 3))) + self.b(F.max_pool2d(y, 2)).amax((2, 3))

    judged(settled(Two()), X, (X,), left=0)


STEPS = {
    "shuffle": shuffled,
    "flip": lambda x: x.flip(1),
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "pool": lambda x: F.avg_pool2d(x, 2),
    "turn": lambda x: x.transpose(2, 3),
    "roll": lambda x: x.roll(1, 2),
}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=4), st.booleans())
def test_several_in_a_row(names, example):
    def how(x):
        for name in names:
            x = STEPS[name](x)
        return x

    model = settled(Net(how, 4, (nn.Conv2d(4, 5, 1), None), ahead))
    x = X.repeat(1, 1, 4, 4)
    judged(model, x, (x,) if example else (), left=0)


class ChannelsLast(nn.LayerNorm):
    """As OverLoCK's: a layer norm between two of einops' permutations."""

    def forward(self, x):
        return rearrange(super().forward(rearrange(x, "b c h w -> b h w c")), "b h w c -> b c h w")


@pytest.mark.parametrize("example", [(), (X,)], ids=["alone", "inputs"])
def test_einops_moves_numbers_and_does_nothing_else(example):
    model = settled(nn.Sequential(ChannelsLast(4), nn.Conv2d(4, 5, 1)))
    plan = structrep.plan(model, *example)
    assert [one.where for one in plan.merges] == ["1"]
    assert not plan.refusals
    deploy = plan.apply()
    assert deploy[0].weight is None
    assert relative_error(deploy(X), model(X)) < EXACT


@pytest.mark.parametrize(("pattern", "sizes", "last", "left"), [
    ("b c h w -> b (h w) c", {}, nn.Linear(4, 5), 0),
    ("b c (h p) (w q) -> b (c p q) h w", {"p": 2, "q": 2}, nn.Conv2d(16, 5, 1), 0),
    ("b (g c) h w -> b (c g) h w", {"g": 2}, nn.Conv2d(4, 5, 1), 0),
    ("b c h w -> b h c w", {}, nn.Conv2d(6, 5, 1), 1),
    ("b c (h p) w -> b p (h w) c", {"p": 2}, nn.Conv2d(2, 5, 1), 1),
])  # fmt: skip
def test_patterns_of_einops(pattern, sizes, last, left):
    model = settled(Net(lambda x: rearrange(x, pattern, **sizes), 4, (last, None), ahead))
    judged(model, X, (X,), left=left)


def test_other_functions_of_einops():
    how = lambda x: repeat(reduce(x, "b c h w -> b c", "mean"), "b c -> b c h w", h=2, w=3)  # noqa: E731
    judged(settled(Net(how, 4, (nn.Conv2d(4, 5, 1), None), ahead)), X, (X,), left=0)
    how = lambda x: reduce(x, "b c h w -> b c", "max")  # noqa: E731
    judged(settled(Net(how, 4, (nn.Linear(4, 5), None), ahead)), X, (X,), left=1)
    judged(settled(Net(Rearrange("b c h w -> b h w c"), 4, (nn.Linear(4, 5), None), ahead)), X, (X,), left=0)


class Tokens(nn.Module):
    """A norm of an image made of tokens again, by sizes that the input has."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 6), nn.BatchNorm2d(6)

    def forward(self, x):
        tokens = self.linear(rearrange(x, "b c h w -> b (h w) c"))
        return self.norm(rearrange(tokens, "b (h w) c -> b c h w", h=x.shape[2]))


def test_what_einops_does_between_a_layer_and_a_norm_is_named():
    (refusal,) = structrep.plan(settled(Tokens()), X).refusals
    assert "linear is before it, but reduce stands between" in refusal.reason


SETTINGS = {  # what numbers are moved by, and another value of that
    "an order": (lambda s, x: s.norm(s.first(x)[:, s.by]), [1, 0, 3, 2], [0, 1, 2, 3]),
    "dims": (lambda s, x: s.norm(s.first(x).permute(s.by)), (0, 1, 3, 2), (0, 1, 2, 3)),
    "groups": (lambda s, x: s.norm(F.channel_shuffle(s.first(x), s.by)), 2, 4),
    "a dim": (lambda s, x: s.norm(s.first(x).flip(s.by)), 1, 2),
    "a number of places": (lambda s, x: s.norm(s.first(x).roll(s.by, 1)), 1, 2),
    "a pad": (lambda s, x: s.norm(F.avg_pool2d(s.first(x), 3, 1, s.by)), 0, 1),
    "a mode": (lambda s, x: s.norm(F.interpolate(s.first(x), scale_factor=2, mode=s.by)), "nearest", "bilinear"),
    "a size": (lambda s, x: s.norm(F.adaptive_avg_pool2d(s.first(x), s.by)), 1, 3),
    "a size before": (lambda s, x: s.last(s.norm(x.relu()).roll(s.by, 1)), 1, 2),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_what_numbers_are_moved_by_may_be_set(name):
    for inputs in ((), (X,)):
        forward, by, other = SETTINGS[name]
        model = settled(Net(None, 4, (nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)), forward))
        model.by = by
        deploy = judged(model, X, inputs, left=0)
        model.by = deploy.by = other
        assert followed_or_told(model, deploy, X)


ORDER = torch.tensor([1, 0, 3, 2])


@pytest.mark.filterwarnings("ignore::structrep.NothingMerged")
def test_an_order_that_is_a_tensor_is_none_to_go_by():
    """It may be written to later."""
    model = settled(Net(lambda x: x[:, ORDER], 4, (nn.Conv2d(4, 5, 1), None), ahead))
    judged(model, X, (X,), left=1)


def flipped_if_large(x):
    return x.flip(1) if x.shape[2] > 3 else x


@pytest.mark.filterwarnings("ignore::structrep.NothingMerged")
@pytest.mark.parametrize("forward", [ahead, back])
@pytest.mark.parametrize("by_size", [True, False])
def test_channels_that_are_moved_on_one_path(forward, by_size):
    """Elsewhere they would be in the other's order: where a condition decides, the merge is guarded, or left."""
    small = X[:, :, :2]
    layers = nn.Conv2d(4, 5, 1), nn.Conv2d(4, 4, 1)
    for example in ((X,), (small,), ()):
        model = settled(Net(flipped_if_large, 4, layers, forward))
        if not by_size:
            model.how = lambda x, model=model: x.flip(1) if model.turn else x
            model.turn = True
        deploy = structrep.reparameterize(copy.deepcopy(model), *example)
        for x in (X, small):
            assert relative_error(deploy(x), model(x)) < EXACT


class Turned(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.n, self.turn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), True

    def forward(self, x):
        y = self.c(x)
        if self.turn:
            y = y.flip(1)
        return self.n(y)


def test_channels_that_are_moved_by_a_setting():
    for inputs in ((), (X,)):
        model = settled(Turned())
        deploy = judged(model, X, inputs, left=0)
        model.turn = deploy.turn = False
        assert followed_or_told(model, deploy, X)


SIZES = {  # how numbers are moved, the layer behind, an example, and another size
    "rows first": (lambda x: x.transpose(1, 2).flatten(1), nn.Linear(192, 5), (2, 4, 6, 8), (2, 4, 8, 6)),
    "rows first, permuted": (
        lambda x: x.permute(0, 2, 1, 3).flatten(1), nn.Linear(192, 5), (2, 4, 6, 8), (2, 4, 12, 4)),
    "columns apart": (lambda x: x.reshape(x.shape[0], x.shape[3], 24), nn.Linear(24, 5), (2, 4, 6, 1), (2, 4, 6, 2)),
    "by a large size": (lambda x: x.roll(x.shape[3] // 30, 1), nn.Conv2d(4, 5, 1), (2, 4, 6, 8), (2, 4, 6, 34)),
    "by a remainder": (lambda x: x.roll(x.shape[2] % 2, 1), nn.Conv2d(4, 5, 1), (2, 4, 6, 8), (2, 4, 7, 8)),
    "from a remainder on": (lambda x: x[:, x.shape[2] % 2 :: 2], nn.Conv2d(2, 5, 1), (2, 4, 6, 8), (2, 4, 7, 8)),
    "by the batch": (lambda x: x.flip(1 + x.shape[0] % 2), nn.Conv2d(4, 5, 1), (2, 4, 6, 8), (3, 4, 6, 8)),
    "in groups by the height": (
        lambda x: x.view(x.shape[0], 2 + 2 * (x.shape[2] % 2), -1, *x.shape[2:]).transpose(1, 2).reshape(x.shape),
        nn.Conv2d(4, 5, 1), (2, 4, 6, 8), (2, 4, 7, 8)),
    "windows that leave a rest": (
        lambda x: F.avg_pool2d(x, 2, ceil_mode=True, divisor_override=4), nn.Conv2d(4, 5, 1), (2, 4, 6, 8),
        (2, 4, 7, 9)),
    "pieces that leave a rest": (
        lambda x: F.fold(F.unfold(x, 2, stride=2), x.shape[2:], 2, stride=2), nn.Conv2d(4, 5, 1), (2, 4, 6, 8),
        (2, 4, 7, 11)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::structrep.NothingMerged")
@pytest.mark.parametrize("name", SIZES)
def test_numbers_that_go_elsewhere_for_another_size(name):
    how, last, one, other = SIZES[name]
    model = settled(Net(how, 4, (copy.deepcopy(last), None), ahead))
    for example in (torch.randn(one, dtype=torch.float64), None):
        deploy = structrep.reparameterize(copy.deepcopy(model), *([] if example is None else [example]))
        for shape in (one, other):
            x = torch.randn(shape, dtype=torch.float64)
            assert relative_error(deploy(x), model(x)) < EXACT


TURNS = 1


def turned(x):
    return x.roll(TURNS, 1)


@pytest.mark.parametrize("change", ["a name of its file", "a keyword", "another function", "a size between two turns"])
def test_a_function_that_a_model_holds(change, monkeypatch):
    held = {"a keyword": functools.partial(torch.flip, dims=(1,)), "another function": torch.fliplr}
    model = settled(Net(None, 4, (None, nn.Conv2d(4, 4, 1)), lambda s, x: s.norm(s.by(s.first(x)))))
    model.by = held.get(change, turned)
    if change == "a size between two turns":
        model = settled(Net(None, 4, (nn.Conv2d(4, 5, 1), None), between_turns))
        model.by = 4
    deploy = structrep.reparameterize(copy.deepcopy(model), X)
    assert relative_error(deploy(X), model(X)) < EXACT
    if change == "a name of its file":
        monkeypatch.setitem(globals(), "TURNS", 2)
    for one in (model, deploy):
        if change == "a keyword":
            one.by = functools.partial(torch.flip, dims=(2,))
        elif change == "another function":
            one.by = torch.flipud
        elif change == "a size between two turns":
            one.by = 2
    assert followed_or_told(model, deploy, X)


def between_turns(self, x):
    y = F.adaptive_avg_pool2d(self.norm(x.relu()).transpose(1, 2), (self.by, 8))
    return self.last(F.interpolate(y, size=(4, 8)).transpose(1, 2))
