"""Values of which each channel is taken from one or another: `where` with a mask per channel, `masked_fill`, `lerp`."""

import pytest
import torch
from torch import nn

from tests.support.models import Written, conv, noise
from tests.support.truth import check

X = noise(2, 4, 6, 7)


def blend(run, mask=None, **more):
    """Two branches, and a mask of every second channel."""
    model = Written(run, a=conv(4, 6), b=conv(4, 6, k=1), **more)
    model.register_buffer("mask", (torch.arange(6) % 2 == 0).reshape(-1, 1, 1) if mask is None else mask)
    return model


MERGED = {
    "where": lambda m, x: torch.where(m.mask, m.a(x), m.b(x)),
    "where, of a value": lambda m, x: m.a(x).where(m.mask, m.b(x)),
    "where, turned around": lambda m, x: torch.where(~m.mask, m.a(x), m.b(x)),
    "where, with a batch dim": lambda m, x: torch.where(m.mask[None], m.a(x), m.b(x)),
    "where, of a threshold": lambda m, x: torch.where(m.a.bias.view(-1, 1, 1) > 0, m.a(x), m.b(x)),
    "lerp per channel": lambda m, x: torch.lerp(m.a(x), m.b(x), m.share),
    "lerp": lambda m, x: m.a(x).lerp(m.b(x), 0.3),
    "masked_fill": lambda m, x: (m.a(x) + m.b(x)).masked_fill(m.mask, 0.7),
    "where, or a constant": lambda m, x: torch.where(m.mask, m.a(x) + m.b(x), m.share),
    "where, or nothing": lambda m, x: torch.where(m.mask, 0.0, m.a(x) + m.b(x)),
}


@pytest.mark.parametrize("run", MERGED.values(), ids=MERGED)
def test_one_layer(run):
    model = blend(run)
    model.share = nn.Parameter(torch.rand(6, 1, 1))
    check(model, X, merges=1, conv=1)


STAYS = {
    "a mask per channel and row": (
        lambda m, x: torch.where(m.mask, m.a(x), m.b(x)), torch.arange(36).reshape(6, 6, 1) % 5 > 2,
    ),
    "a mask of the input": (lambda m, x: torch.where(x[:, :1] > 0, m.a(x), m.b(x)), None),
    "a mask that the forward writes to": (
        lambda m, x: torch.where(m.mask.logical_not_().clone(), m.a(x), m.b(x)), None,
    ),
    "infinite": (lambda m, x: m.a(x).masked_fill(m.mask, float("inf")) + m.b(x), None),
}  # fmt: skip


@pytest.mark.parametrize(("run", "mask"), STAYS.values(), ids=STAYS)
def test_two_stay(run, mask):
    model = blend(run, mask)
    deploy = check(model, X, merges=0, ways=("alone",))
    assert isinstance(deploy.a, nn.Conv2d)
    assert isinstance(deploy.b, nn.Conv2d)


def test_a_mask_per_pixel_stays():
    model = blend(lambda m, x: torch.where(m.mask, m.a(x), m.b(x)), torch.arange(7) > 2)
    check(model, X, merges=0, refused="Incompatible")


def test_channels_that_are_spread_stay():
    model = blend(lambda m, x: torch.where(m.mask, m.a(x), m.one(x)), one=conv(4, 1, k=1))
    check(model, X, merges=0, refused="Incompatible")


def test_a_mask_that_adds_dims_stays():
    model = blend(lambda m, x: torch.where(m.mask[None, None], m.a(x), m.b(x)))
    check(model, X, merges=0)


def test_only_one_branch_of_the_input_stays():
    """The other is of something else, so there is no one layer for both."""
    model = blend(lambda m, x: torch.where(m.mask, m.a(x), m.b(x.relu())))
    check(model, X, merges=0)
