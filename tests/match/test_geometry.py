"""Layers whose strides, pads, sizes or groups agree, and those whose do not: the same for every size, or an error."""

import contextlib
import functools
import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import structrep
from tests.support.models import Written, bn, conv, noise, randomised
from tests.support.truth import EXACT, call, check, distance, says

SIZES = [(5, 6), (6, 5), (7, 7), (8, 8), (4, 9)]


def added(**layers):
    return Written(lambda m, x: functools.reduce(operator.add, [layer(x) for layer in m.children()]), **layers)


# How many merges there are, for what others are refused, and the model.
GEOMETRY = {
    "same with even kernels": (1, "", lambda: added(a=conv(k=4, padding="same"), b=conv(k=2, padding="same"), c=bn(4))),
    "same with even and odd": (0, "Costlier", lambda: added(a=conv(k=(4, 3), padding="same", dilation=2), b=conv(k=1))),
    "same, then a norm": (1, "", lambda: nn.Sequential(conv(k=4, padding="same"), bn(4))),
    "valid": (1, "", lambda: added(a=conv(k=3, padding="valid"), b=conv(k=3, padding=0))),
    "even kernel, padded on both sides": (1, "",
        lambda: added(a=conv(k=2, padding=1, dilation=2), b=conv(k=3, padding=1))),
    "average pool, counting the pad": (1, "", lambda: added(a=conv(), p=nn.AvgPool2d(3, 1, 1))),
    "average pool, not counting the pad": (0, "",
        lambda: added(a=conv(), p=nn.AvgPool2d(3, 1, 1, count_include_pad=False))),
    "average pool, ceil_mode": (0, "", lambda: added(a=conv(stride=2), p=nn.AvgPool2d(3, 2, 1, ceil_mode=True))),
    "average pool, its own divisor": (1, "", lambda: added(a=conv(), p=nn.AvgPool2d(3, 1, 1, divisor_override=2))),
    "average pool, then conv": (0, "Costlier", lambda: nn.Sequential(nn.AvgPool2d(2, 2), conv(k=1))),
    "conv, then average pool": (0, "Costlier", lambda: nn.Sequential(conv(k=1, padding=0), nn.AvgPool2d(2, 2))),
    "conv, then padded average pool": (0, "Costlier",
        lambda: nn.Sequential(conv(k=1, padding=0), nn.AvgPool2d(3, 2, 1))),
    "conv, then F.avg_pool2d": (0, "Costlier",
        lambda: Written(lambda m, x: F.avg_pool2d(m.c(x), 2), c=conv(k=2, padding=0))),
    "max pool": (0, "", lambda: added(a=conv(), p=nn.MaxPool2d(3, 1, 1))),
    # a 3x3 kernel takes 9 where these two take 6, once their norms are in them
    "3x1 and 1x3, depthwise, a norm each": (2, "Costlier", lambda: added(
        a=nn.Sequential(conv(k=(3, 1), padding=(1, 0), groups=4, bias=False), bn(4)),
        b=nn.Sequential(conv(k=(1, 3), padding=(0, 1), groups=4, bias=False), bn(4)))),
    "3x1, 1x3 and 3x3, depthwise, a norm each": (1, "", lambda: added(
        a=nn.Sequential(conv(k=(3, 1), padding=(1, 0), groups=4, bias=False), bn(4)),
        b=nn.Sequential(conv(k=(1, 3), padding=(0, 1), groups=4, bias=False), bn(4)),
        c=nn.Sequential(conv(groups=4, bias=False), bn(4)))),
    "stride 2, 3x3 and 1x1": (1, "", lambda: added(a=conv(stride=2), b=conv(k=1, stride=2))),
    "stride 2, 5x5 and 3x3": (1, "", lambda: added(a=conv(k=5, stride=2), b=conv(k=3, stride=2))),
    "1x1 conv with a bias, then zero padding": (1, "", lambda: nn.Sequential(conv(k=1), conv(k=3, bias=False))),
    "norm before a zero-padded conv": (0, "Inexact", lambda: nn.Sequential(bn(4), conv(k=3))),
    "norm before an unpadded conv": (1, "", lambda: nn.Sequential(bn(4), conv(k=3, padding=0))),
    "norm before a reflect-padded conv": (1, "", lambda: nn.Sequential(bn(4), conv(k=3, padding_mode="reflect"))),
    "norm, ZeroPad2d, conv": (1, "", lambda: nn.Sequential(bn(4), nn.ZeroPad2d(1), conv(k=3, padding=0))),
    "norm, ConstantPad2d, conv": (1, "", lambda: nn.Sequential(nn.ConstantPad2d(1, 0.7), conv(k=3, padding=0), bn(4))),
    "3x3 then 3x3, both padded": (0, "Inexact", lambda: nn.Sequential(conv(4, 8, bias=False), conv(8, 4, bias=False))),
    "1x3 then 3x1, padded per axis": (0, "Costlier", lambda: nn.Sequential(
        conv(k=(1, 3), padding=(0, 1), bias=False), conv(k=(3, 1), padding=(1, 0), bias=False))),
    "1x3 then 3x1, padded per axis, bias": (0, "Costlier", lambda: nn.Sequential(
        conv(k=(1, 3), padding=(0, 1)), conv(k=(3, 1), padding=(1, 0)))),
    "reflect and zeros": (0, "Inexact", lambda: added(a=conv(padding_mode="reflect"), b=conv())),
    "circular and replicate": (1, "Inexact",
        lambda: added(a=conv(padding_mode="circular"), b=conv(padding_mode="replicate"), c=bn(4))),
    "reflect and an average pool": (0, "Inexact",
        lambda: added(a=conv(padding_mode="reflect"), p=nn.AvgPool2d(3, 1, 1))),
    "groups that do not nest": (1, "", lambda: nn.Sequential(
        nn.Conv2d(12, 12, 1, groups=4), nn.Conv2d(12, 12, 1, groups=6), bn(12))),
    "transposed conv and norm": (1, "", lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, 2, groups=2), bn(6))),
    "upsample between": (0, "", lambda: nn.Sequential(conv(k=1), nn.Upsample(scale_factor=2), conv(k=1))),
    "pixel shuffle between": (0, "", lambda: nn.Sequential(conv(4, 16, 1), nn.PixelShuffle(2), conv(k=1))),
    "crop with a step": (0, "",
        lambda: Written(lambda m, x: m.a(x)[:, :, ::2, ::2] + m.b(x), a=conv(), b=conv(stride=2))),
    "crop of channels": (1, "", lambda: Written(lambda m, x: m.a(x)[:, 1:3] + m.b(x), a=conv(), b=conv(4, 2))),
    "a batch index": (1, "", lambda: Written(lambda m, x: m.n(m.a(x)[:1]), a=conv(), n=bn(4))),
    "crop to a fixed size": (1, "", lambda: Written(lambda m, x: m.n(m.a(x)[:, :, :3, :3]), a=conv(), n=bn(4))),
    "crop from the far end": (1, "",
        lambda: Written(lambda m, x: m.n(m.a(x)[:, :, -3:, :]), a=conv(), n=bn(4))),
    "broadcast of a pooled branch": (0, "", lambda: Written(
        lambda m, x: m.a(x) + m.b(x.mean((2, 3), keepdim=True)), a=conv(), b=conv(k=1))),
    "broadcast over channels": (0, "Incompatible",
        lambda: Written(lambda m, x: m.a(x) + m.b(x), a=conv(), b=conv(4, 1))),
    "broadcast against the input": (0, "Incompatible", lambda: Written(lambda m, x: m.b(x) + x, b=conv(4, 1))),
    "sizes that broadcast": (0, "Incompatible", lambda: Written(
        lambda m, x: m.a(x) + m.b(x), a=conv(k=1), b=nn.Conv2d(4, 4, (1, 1), stride=(99, 1)))),
    "concat of branches": (0, "Costlier",
        lambda: Written(lambda m, x: torch.cat([m.a(x), m.b(x), x], 1), a=conv(), b=conv(k=1))),
    "concat along the width": (0, "Unreadable",
        lambda: Written(lambda m, x: torch.cat([m.a(x), m.b(x)], 3), a=conv(), b=conv(k=1))),
    "concat along the batch": (0, "Unreadable",
        lambda: Written(lambda m, x: torch.cat([m.a(x), m.b(x)]), a=conv(), b=conv(k=1))),
    "scale per column, not per channel": (0, "", lambda: Written(
        lambda m, x: m.a(x)[:, :, :, :4] * torch.arange(4.0, dtype=x.dtype), a=conv())),
    "constant of another rank": (0, "", lambda: Written(lambda m, x: m.a(x) * torch.ones(1, 1, 4, 1, 1) * 2, a=conv())),
    "identity without a channel count": (0, "Costlier", lambda: Written(lambda m, x: x + x * 0.5, a=nn.Identity())),
    "identities and pools only": (0, "Costlier", lambda: added(a=nn.Identity(), p=nn.AvgPool2d(3, 1, 1))),
    "scalars only": (0, "Costlier", lambda: Written(lambda m, x: (x * 2 + 1) / 3 - x, a=nn.Identity())),
}  # fmt: skip


# What the example inputs tell beside the model: its sizes, and how many channels there are.
WITH_EXAMPLE = {"average pool, ceil_mode": (1, ""), "identities and pools only": (0, "Unreadable")}


@pytest.mark.parametrize("name", GEOMETRY)
def test_geometry(name):
    merges, refused, make = GEOMETRY[name]
    model = randomised(make())
    channels = next((m.in_channels for m in model.modules() if hasattr(m, "in_channels")), 4)
    truths = {}
    for size in SIZES:
        x = noise(2, channels, *size)
        with contextlib.suppress(RuntimeError):
            truths[x] = call(model, x)
    for example in (None, next(iter(truths))):
        told = (merges, refused) if example is None else WITH_EXAMPLE.get(name, (merges, refused))
        plan = says(structrep.plan(model, example), *told)
        deploy = plan.reparameterize(example)
        for x, truth in truths.items():
            assert distance(call(deploy, x), truth) <= EXACT
        for size in SIZES:
            if size not in [x.shape[2:] for x in truths]:
                with pytest.raises((RuntimeError, ValueError)):  # branches that do not agree on their size
                    call(deploy, noise(2, channels, *size))
        assert not structrep.plan(deploy).merges


def test_branches_whose_sizes_agree_only_for_some_inputs():
    """Stride 2 with other paddings: the sum exists for odd sizes only, and must not become one conv for all."""
    x = noise(1, 4, 5, 5)
    with pytest.raises(RuntimeError):
        call(randomised(added(a=conv(k=3, stride=2, padding=1), b=conv(k=3, stride=2, padding=0))), x)
    model = added(a=conv(k=2, stride=2, padding=0), b=conv(k=1, stride=2, padding=0))
    deploy = check(model, noise(1, 4, 6, 8), merges=0, refused="Incompatible", ways=("alone", "in place"))
    for each in (model, deploy):
        with pytest.raises(RuntimeError):
            call(each, x)


def test_unbatched_input():
    """(C, H, W) is legal for a conv; dim 1 is then not the channels."""
    x = noise(4, 5, 6)
    stacked = Written(lambda m, x: torch.cat([m.a(x), m.b(x)], 0), a=conv(), b=conv(k=1))
    check(stacked, x, merges=0, refused="Unreadable")
    stacked = Written(lambda m, x: torch.cat([m.a(x), m.b(x)], 1), a=conv(), b=conv(k=1))
    check(stacked, x, merges=0, refused="Incompatible", ways=("with an example",))
