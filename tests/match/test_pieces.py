"""Pieces of a fixed size, all numbers of which one layer takes at once, as in RepMLP."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import structrep
from tests.foreign.repmlp import RepMLPBlock
from tests.support.models import settled
from tests.support.truth import EXACT, relative_error


@pytest.mark.parametrize(
    ("block", "size"),
    [
        (RepMLPBlock(8, 8, 4, 4, (1, 3), 2), (8, 12)),
        (RepMLPBlock(8, 8, 4, 3, (1, 3, 5), 8), (4, 3)),
        (RepMLPBlock(6, 6, 5, 5, (3,), 1), (10, 5)),
        (RepMLPBlock(4, 4, 2, 6, (1,), 4), (4, 6)),
    ],
)
def test_the_published_block_becomes_its_deploy_form(block, size):
    for inplace in (False, True):
        model = settled(nn.Sequential(block))
        x = torch.randn(3, block.C, *size, dtype=torch.float64)
        truth = model(x)
        plan = structrep.plan(model)
        assert [merge.rules for merge in plan.merges] == [("repmlp",)]
        deploy = structrep.reparameterize(model, x, inplace=inplace)[0]
        assert relative_error(deploy(x), truth) < EXACT
        assert type(deploy) is not RepMLPBlock
        assert isinstance(deploy, RepMLPBlock)
        assert deploy.fc3.bias is not None
        left = [name for name, child in deploy.named_children() if list(child.parameters())]
        assert left == ["down", "up", "fc3"]
        assert not structrep.plan(deploy).merges


class Cut(nn.Module):
    """Pieces of 4x4 pixels, a matrix on all their numbers, a convolution beside it, in several ways."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.whole, self.norm = nn.Conv2d(32, 32, 1), nn.BatchNorm2d(2)
        stride = 2 if how == "stride" else 1
        self.conv = nn.Conv2d(2, 2, 3, padding=1, stride=stride)
        self.seen = None

    def forward(self, x):
        base = x.reshape(-1, 2, 4, 4)
        wide = self.whole(base.reshape(-1, 32, 1, 1)).reshape(-1, 2, 4, 4)
        small = base
        if self.how == "turned":
            small = base.transpose(2, 3).reshape(-1, 2, 4, 4)
        if self.how == "transposed result":
            wide = wide.transpose(2, 3)
        if self.how == "other base":
            small = (base * base).reshape(-1, 2, 4, 4)
        local = self.conv(small.reshape(-1, 2, 4, 4))
        if self.how == "kept":
            self.seen = local
        if self.how == "stride":
            local = local.repeat(1, 1, 2, 2)
        if self.how == "relu":
            local = local.relu()
        if self.how == "added twice":
            return self.norm(wide) + local + local.exp()
        if self.how == "wide used":
            return wide * (wide + local)
        if self.how == "spread":
            return self.whole(base.reshape(-1, 32, 1, 1)).sum(1, keepdim=True).reshape(-1, 1, 1, 1) + local
        if self.how == "norm behind":
            return self.norm(wide + local)
        return self.norm(wide) - local


SPOILED = ["turned", "transposed result", "other base", "stride", "relu", "added twice", "wide used", "kept", "spread"]


@pytest.mark.parametrize("how", ["", *SPOILED])
def test_what_is_not_of_the_same_pieces_stays(how):
    model = settled(Cut(how))
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    deploy = structrep.reparameterize(model)
    assert relative_error(deploy(x), model(x)) < EXACT
    assert (deploy.conv is not None) == bool(how)
    if how == "kept":
        assert torch.equal(deploy.seen, model.seen)


sizes = st.integers(1, 4)


@given(st.integers(1, 3), st.integers(1, 2), sizes, sizes, st.sampled_from([(1, 1), (3, 1), (2, 3), (3, 3)]), st.data())
def test_unrolled_is_a_homomorphism(width, groups, height, breadth, kernel, data):
    """(f >> g) and (f + g) of one size unroll to the chain and the sum of what f and g unroll to."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    channels, size = width * groups, (height, breadth)
    pad = tuple((k // 2, k - 1 - k // 2) for k in kernel)
    f, other = (
        structrep.ConvMap(draw(channels, width, *kernel), draw(channels), pad=pad, groups=groups) for _ in range(2)
    )
    g = structrep.ConvMap(draw(channels, channels, 1, 1), draw(channels))
    x = draw(2, channels, *size)
    assert torch.allclose(f.unrolled(size)(x.flatten(1)), f(x).flatten(1), rtol=0, atol=1e-12)
    assert (f + other).unrolled(size).distance(f.unrolled(size) + other.unrolled(size)) < EXACT
    assert (f >> g).unrolled(size).distance(f.unrolled(size) >> g.unrolled(size)) < 1e-11
    assert f.unrolled(size).geometry.groups == groups


def test_a_sum_that_spreads_one_of_its_values_is_none_of_pieces():
    class Spread(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.norm, self.conv = nn.Linear(16, 16), nn.BatchNorm2d(16), nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, x):
            p = x.reshape(-1, 1, 4, 4)
            y = self.norm(self.fc(p.reshape(-1, 16)).reshape(-1, 16, 1, 1))
            return y + self.conv(p.reshape(-1, 1, 4, 4))

    model = settled(Spread())
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    assert relative_error(structrep.reparameterize(model)(x), model(x)) < EXACT
