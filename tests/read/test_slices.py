"""Channels taken out of a value: by chunk, split or an index."""

import pytest
import torch
from torch import nn

import structrep
from tests.support.models import settled
from tests.support.truth import EXACT, check, relative_error, says

X = torch.randn(2, 4, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Cut(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.code = forward
        self.wide, self.other = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 3, 1)
        self.norm = nn.BatchNorm2d(6)
        self.narrow = nn.Conv2d(2, 5, 1)

    def forward(self, x):
        return self.code(self, x)


def convs(model):
    return sum(isinstance(m, nn.Conv2d) for m in model.modules())


def halves(self, x):
    a, b = self.norm(self.wide(x)).chunk(2, 1)
    return a + b


def parts(self, x):
    a, b = torch.split(self.norm(self.wide(x)), [2, 4], dim=1)
    return a + b[:, 2:] - b[:, :-2]


def sized(self, x):
    a, b = self.norm(self.wide(x)).split(3, dim=-3)
    return a + b + self.other(x)


def indexed(self, x):
    return self.norm(self.wide(x))[:, 1:4] + self.other(x)


@pytest.mark.parametrize(("forward", "gone"), [(halves, 0), (parts, 0), (sized, 1), (indexed, 1)])
def test_slices_of_one_convolution_merge(forward, gone):
    model = settled(Cut(forward))
    deploy = structrep.reparameterize(model)
    assert relative_error(deploy(X), model(X)) < EXACT
    assert isinstance(deploy.norm, nn.Identity) or deploy.norm is None
    assert convs(model) - convs(deploy) == gone
    merged = next(m for m in deploy.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3))
    assert merged.out_channels == (2 if forward is parts else 3)


def both_used(self, x):
    a, b = self.norm(self.wide(x)).chunk(2, 1)
    return a * b.sigmoid()


def rows(self, x):
    a, b = self.norm(self.wide(x))[..., :4].chunk(2, 2)
    return a - b


def uneven(self, x):
    a, b, c = self.norm(self.wide(x)).chunk(4, 1)
    return a + b + c


def before(self, x):
    return self.narrow(x[:, 1:3]) + self.narrow(x[:, :2])


@pytest.mark.parametrize(("forward", "merges", "refused"), [(both_used, 1, ""), (uneven, 1, ""), (before, 0, "Shared")])
def test_slices_that_stay(forward, merges, refused):
    model = settled(Cut(forward))
    deploy = says(structrep.plan(model), merges, refused).reparameterize()
    assert relative_error(deploy(X), model(X)) < EXACT


def test_a_slice_of_pixels_is_none_of_channels():
    model = settled(Cut(rows))
    with pytest.raises(RuntimeError):
        model(X)  # 3 rows and 2
    even = X[:, :, :4]
    deploy = says(structrep.plan(model), 1, "Costlier").reparameterize()
    assert relative_error(deploy(even), model(even)) < EXACT


class Features(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.dim, self.a = dim, nn.Linear(4, 6)

    def forward(self, x):
        one, two = self.a(x).chunk(2, self.dim)
        return one - two


@pytest.mark.parametrize(("dim", "shape"), [(-1, (2, 3, 4)), (1, (2, 6, 4)), (1, (2, 4))])
def test_slices_of_features(dim, shape):
    model = settled(Features(dim))
    x = torch.randn(shape, dtype=torch.float64)
    deploy = structrep.reparameterize(model)
    assert relative_error(deploy(x), model(x)) < EXACT
    assert sum(p.numel() for p in deploy.parameters()) == (15 if dim == -1 else 30)


class Weighed(nn.Module):
    """Two branches, stacked, each with a number."""

    def __init__(self, how):
        super().__init__()
        self.how, self.a, self.b = how, nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.w, self.t = nn.Parameter(torch.tensor([0.3, -1.7])), nn.Parameter(torch.tensor(0.2))

    def forward(self, x):
        branches, w = [self.a(x), self.b(x)], self.w
        if self.how == "lerp":
            return torch.lerp(*branches, self.t)
        if self.how == "first":
            return (torch.stack(branches) * w.view(2, 1, 1, 1, 1)).sum(0)
        if self.how == "second":
            return torch.mean(w.softmax(0).reshape(2, 1, 1, 1) * torch.stack(branches, 1), dim=1)
        if self.how == "last":
            return (torch.stack(branches, -1) * w).sum(-1)
        if self.how == "one number":
            return (torch.stack(branches) * self.t).sum(0)
        if self.how == "another dim":  # the width has two pixels
            return (torch.stack(branches)[..., :2] * w).sum(0)
        if self.how == "more than stacked":
            return (torch.stack(branches) * w.view(2, 1, 1, 1, 1, 1)).sum(0)
        if self.how == "for each channel":
            return (torch.stack(branches) * torch.cat([w, w]).view(1, 1, 4, 1, 1)).sum(0)
        if self.how == "summed elsewhere":
            return (torch.stack(branches) * w.view(2, 1, 1, 1, 1)).sum(1)
        return (torch.stack(branches) * w[:1].view(1, 1, 1, 1, 1)).prod(0)


WEIGHED = {
    "lerp": 1, "first": 1, "second": 1, "last": 1, "one number": 1, "another dim": 0, "more than stacked": 0,
    "for each channel": 0, "summed elsewhere": 0, "multiplied": 0,
}  # fmt: skip


@pytest.mark.parametrize("how", WEIGHED)
def test_branches_that_are_weighed_as_a_stack(how):
    check(Weighed(how), X, merges=WEIGHED[how])
    check(Weighed(how), X, merges=WEIGHED[how], ways=("alone",))


class Means(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how = how
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        if self.how == "lerp":
            return torch.lerp(self.a(x), self.b(x), 0.25)
        stacked = torch.stack([self.a(x), x, self.b(x)])
        return stacked.mean(0) if self.how == "mean" else torch.sum(stacked, dim=0)


@pytest.mark.parametrize("how", ["lerp", "mean", "sum"])
def test_weighted_sums(how):
    model = settled(Means(how))
    deploy = structrep.reparameterize(model)
    assert relative_error(deploy(X), model(X)) < EXACT
    assert convs(deploy) == 3  # the layers of the other ways stay
    model.how = deploy.how = "sum"
    if how != "mean":
        assert relative_error(deploy(X), model(X)) < EXACT
    else:
        with pytest.raises(ValueError, match=r"self.how='mean', and self.how is sum now"):
            deploy(X)
