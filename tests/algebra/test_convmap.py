"""Maps as networks have them, by name: what their composites are, what is refused of them, and in which words."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from structrep.algebra import ConvMap, Geometry, concat
from structrep.errors import Incompatible, Inexact, Unreadable
from tests.support.maps import (
    EXACT,
    absolute,
    agree,
    amplification,
    chain,
    differs,
    formula,
    gap,
    pixels,
    sizes,
)

# --- what networks have, by name ----------------------------------------------------------------------------------


def weights(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def conv(o: int, i: int, *taps: int, bias: bool = False, **options: Any) -> ConvMap:
    return ConvMap(weights(o, i, *taps), weights(o, seed=1) if bias else None, **options)


def pad(channels: int, *sides: tuple[int, int], **options: Any) -> ConvMap:
    """Nothing but a pad or a crop."""
    return ConvMap(torch.ones(channels, 1, *[1] * len(sides)), pad=sides, groups=channels, **options)


SCALE, SHIFT = weights(4, seed=2), weights(4, seed=3)
WIDE, TALL = ((0, 0), (1, 1)), ((1, 1), (0, 0))
COMPOSITES = {
    "conv, batch norm": (conv(4, 3, 3, 3, pad=1, bias=True), ConvMap.scale(SCALE, SHIFT)),
    "1x1 without a bias, padded 3x3": (conv(4, 3, 1, 1), conv(2, 4, 3, 3, pad=1)),
    "padded 1x1 with a bias, unpadded 3x3": (conv(4, 3, 1, 1, pad=1, bias=True), conv(2, 4, 3, 3)),
    "1x1 with a bias, 3x3 padded with that bias": (
        conv(4, 3, 1, 1, bias=True),
        conv(2, 4, 3, 3, pad=1, fill=weights(4, seed=1)),
    ),
    "1x1 on a fill, 3x3 padded with what it gives": (
        conv(4, 3, 1, 1, pad=1, bias=True, fill=2.0),
        conv(2, 4, 3, 3, pad=1, fill=weights(4, seed=1) + 2 * weights(4, 3).sum(1)),
    ),
    "1x1 with a bias, reflecting 3x3": (conv(4, 3, 1, 1, bias=True), conv(2, 4, 3, 3, pad=1, border="reflect")),
    "batch norm with a shift, circular 3x3": (
        ConvMap.scale(SCALE, SHIFT),
        conv(2, 4, 3, 3, pad=1, border="circular"),
    ),
    "tall then wide": (conv(4, 3, 3, 1, pad=TALL), conv(2, 4, 1, 3, pad=WIDE)),
    "tall then wide, both reflecting": (
        conv(4, 3, 3, 1, pad=TALL, border="reflect", bias=True),
        conv(2, 4, 1, 3, pad=WIDE, border="reflect", bias=True),
    ),
    "tall without a pad, wide with a replicating one": (
        conv(4, 3, 3, 1, bias=True),
        conv(2, 4, 1, 3, pad=WIDE, border="replicate"),
    ),
    "padded 3x3, cropped": (conv(4, 3, 3, 3, pad=2, bias=True), pad(4, (-1, -1), (-1, -2))),
    "circular pad, cropped": (pad(3, (2, 0), (1, 1), border="circular"), pad(3, (0, -1), (-2, 0))),
    "reflecting pad, cropped": (pad(3, (2, 0), (1, 1), border="reflect"), pad(3, (0, -1), (-2, 0))),
    "pad, unpadded 3x3 of stride 2": (pad(3, (1, 2), (0, 1)), conv(2, 3, 3, 3, stride=2, bias=True)),
    "pad of a pad": (pad(3, (1, 2), (0, 1), fill=5.0), conv(2, 3, 3, 3, pad=1, fill=5.0)),
    "average pool, padded 3x3": (
        ConvMap(torch.full((3, 1, 2, 2), 0.25), stride=2, groups=3, pad=((0, 1), (0, 1))),
        conv(4, 3, 3, 3, pad=1),
    ),
    "1x1 of stride 2, padded 3x3": (conv(4, 3, 1, 1, stride=2), conv(2, 4, 3, 3, pad=1)),
    "depthwise with a multiplier, 1x1": (conv(6, 1, 3, 3, groups=3, pad=1, bias=True), conv(4, 6, 1, 1)),
    "1x1, depthwise of 2 groups": (conv(4, 3, 1, 1), conv(4, 2, 3, 3, groups=2, pad=1, dilation=2)),
    "4 groups, 6 groups": (conv(12, 2, 1, 1, groups=4), conv(6, 2, 3, 3, groups=6, pad=1)),
    "scale, then a pad with another constant": (ConvMap.scale(SCALE), conv(2, 4, 3, 3, pad=1, fill=SHIFT)),
    "a pad that a stride steps over": (conv(4, 3, 3, 3), conv(2, 4, 1, 1, stride=3, pad=((3, 0), (3, 0)))),
    "a fill that cancels the bias": (
        ConvMap(weights(4, 3, 1, 1), -0.1 * weights(4, 3).sum(1), pad=1, fill=0.1),
        conv(2, 4, 3, 3, pad=1),
    ),
    "linear, linear": (conv(4, 3, bias=True), conv(2, 4, bias=True)),
    "grouped linear, linear": (conv(4, 3, groups=2, bias=True), conv(2, 4, bias=True)),
    "1d": (conv(4, 3, 3, pad=((2, 1),), bias=True), conv(2, 4, 5, dilation=2, stride=2)),
    "3d": (conv(4, 3, 1, 1, 1), conv(2, 4, 3, 1, 3, pad=((1, 1), (0, 0), (1, 1)))),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPOSITES)
def test_composites_that_networks_have(name: str) -> None:
    f, g = COMPOSITES[name]
    merged = f >> g
    dims = f.geometry.dims
    legal = [sizes([f, g], dim=dim, count=3 if dims == 3 else 6) for dim in range(dims)]
    truth, size = chain(formula(f), formula(g)), chain(absolute(f), absolute(g))
    agree([pixels(2, f.geometry.in_channels, *n) for n in itertools.product(*legal)], merged, truth, size)


REFUSED = {
    "1x1 with a bias, zero-padded 3x3": (
        lambda: conv(4, 3, 1, 1, bias=True) >> conv(2, 4, 3, 3, pad=1),
        Inexact,
        ("4 -> 2, 3x3", "reads 0", "3 -> 4, 1x1", f"gives {float(max(weights(4, seed=1), key=abs)):.6g}", "without"),
    ),
    "batch norm with a shift, zero-padded 3x3": (
        lambda: ConvMap.scale(SCALE, SHIFT) >> conv(2, 4, 3, 3, pad=1), Inexact, ("4 -> 2, 3x3", "4 -> 4, 1x1", "bias"),
    ),
    "padded 3x3 twice": (
        lambda: conv(4, 3, 3, 3, pad=1) >> conv(2, 4, 3, 3, pad=1),
        Inexact, ("4 -> 2, 3x3", "reads 0", "spatial dim 0", "3 -> 4, 3x3", "padding belongs on the first"),
    ),
    "unpadded 1x3, 3x3": (
        lambda: conv(4, 3, 1, 3) >> conv(2, 4, 3, 3, pad=1), Inexact, ("spatial dim 1", "real pixels"),
    ),
    "a pad that a stride does not step over": (
        lambda: conv(4, 3, 3, pad=((1, 2),)) >> conv(2, 4, 3, stride=2, pad=((1, 0),)),
        Inexact, ("spatial dim 0", "real pixels"),
    ),
    "reflecting 3x3 twice": (
        lambda: conv(4, 3, 3, 3, pad=1, border="reflect") >> conv(2, 4, 3, 3, pad=1, border="reflect"),
        Inexact, ("reflect pad", "3 -> 4, 3x3", "spatial dim 0", "padding belongs on the first"),
    ),
    "circular 3x3 twice, which would wrap twice around one pixel": (
        lambda: conv(4, 3, 3, 3, pad=1, border="circular") >> conv(2, 4, 3, 3, pad=1, border="circular"),
        Inexact, ("circular pad", "padding belongs on the first"),
    ),
    "reflecting 3x1, zero-padded 1x3": (
        lambda: conv(4, 3, 3, 1, pad=TALL, border="reflect") >> conv(2, 4, 1, 3, pad=WIDE),
        Inexact, ("reads 0", "reads a reflect border", "pad both alike"),
    ),
    "sum of zero-padded and reflecting": (
        lambda: conv(4, 3, 3, 3, pad=1) + conv(4, 3, 3, 3, pad=1, border="reflect"),
        Inexact, ("0 in channel 0", "a reflect border", "pad both alike"),
    ),
    "sum of two fills": (
        lambda: conv(4, 3, 3, 3, pad=1, fill=torch.tensor([1.0, 2, 3])) + conv(4, 3, 3, 3, pad=1, fill=1.0),
        Inexact, ("3 in channel 2", "1 in channel 2", "pad both alike"),
    ),
    "channels that do not fit": (
        lambda: conv(4, 3, 1, 1) >> conv(4, 3, 1, 1), Incompatible, ("4 output", "3 input", "must be equal"),
    ),
    "a conv before a linear": (
        lambda: conv(4, 3, 1, 1) >> conv(2, 4), Incompatible, ("2 spatial dims", "one of 0", "must be equal"),
    ),
    "sum of other inputs": (
        lambda: conv(4, 3, 1, 1) + conv(4, 2, 1, 1), Incompatible, ("input channels", "3 and 2", "same input"),
    ),
    "sum of other outputs": (
        lambda: conv(4, 3, 1, 1) + conv(2, 3, 1, 1), Incompatible, ("output channels", "4 and 2", "concat"),
    ),
    "sum of other dims": (lambda: conv(4, 3, 1, 1) + conv(4, 3, 1), Incompatible, ("spatial dims", "2 and 1", "same")),
    "sum of other strides": (
        lambda: conv(4, 3, 1, 1, stride=2) + conv(4, 3, 1, 1), Incompatible, ("strides", "(2, 2) and (1, 1)", "same"),
    ),
    "sum of other sizes": (
        lambda: conv(4, 3, 3, 3, pad=1) + conv(4, 3, 3, 3),
        Incompatible, ("overhangs", "(0, 0) and (-2, -2)", "pad so that", "output sizes"),
    ),
    "concat of other sizes": (
        lambda: concat([conv(4, 3, 3, 3, pad=1), conv(2, 3, 1, 1, stride=2)]),
        Incompatible, ("strides", "(1, 1) and (2, 2)", "give both the same"),
    ),
    "fewer groups than there can be": (
        lambda: conv(6, 1, 3, 3, groups=6).regrouped(4), Incompatible, ("6 groups", "as 4", "divisor"),
    ),
    "a frame that is too small": (
        lambda: conv(4, 3, 3, 3, pad=1).framed(Geometry(3, 4, (1, 1))), Incompatible, ("frame", "does not hold", "sum"),
    ),
    "NaN": (
        lambda: ConvMap(torch.tensor([[1.0, math.nan]])), Inexact, ("kernel", "2 -> 1", "nan", "finite", "look for"),
    ),
    "infinite bias": (lambda: ConvMap(weights(1, 2), torch.tensor([-math.inf])), Inexact, ("bias", "-inf", "finite")),
    "infinite fill": (lambda: conv(1, 2, 3, pad=1, fill=math.inf), Inexact, ("fill", "inf", "finite")),
    "outgrown float64": (lambda: (conv(4, 3) * 1e200) >> (conv(2, 4) * 1e200), Inexact, ("kernel", "finite")),
    "complex": (lambda: ConvMap(torch.ones(2, 2, dtype=torch.cfloat)), Unreadable, ("complex64", "real", "stays")),
    "no channels": (lambda: ConvMap(torch.ones(3, 0, 3, 3)), Unreadable, ("(3, 0, 3, 3)", "empty", "nothing to merge")),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_says_what_was_found_both_values_and_the_remedy(name: str) -> None:
    merge, kind, words = REFUSED[name]
    with pytest.raises(kind) as refused:
        merge()
    assert type(refused.value) is kind
    assert [word for word in words if word not in str(refused.value)] == [], str(refused.value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ConvMap(torch.ones(3)), "(3,)"),
        (lambda: ConvMap(torch.ones(1, 1, 1, 1, 1, 1)), "0 to 3 spatial dims"),
        (lambda: ConvMap(torch.ones(2, 2, 0)), "start at 1"),
        (lambda: conv(2, 2, 3, stride=0), "start at 1"),
        (lambda: conv(2, 2, 3, dilation=0), "start at 1"),
        (lambda: conv(2, 2, 3, groups=0), "start at 1"),
        (lambda: conv(3, 2, 3, groups=2), "3 channels do not divide into 2 groups"),
        (lambda: conv(2, 2, 3, 3, stride=(1,)), "differ in spatial dims"),
        (lambda: conv(2, 2, 3, 3, dilation=(1, 2, 3)), "differ in spatial dims"),
        (lambda: conv(2, 2, 3, 3, pad=((1, 1),)), "differ in spatial dims"),
        (lambda: ConvMap(torch.ones(2, 2), torch.ones(3)), "a bias of shape (3,) for 2 output channels"),
        (lambda: conv(2, 2, 3, pad=1, fill=torch.ones(3)), "a fill of shape (3,) for 2 input channels"),
        (lambda: conv(2, 2, 3, pad=1, border="zeros"), "'zeros' is none of constant, reflect"),
        (lambda: conv(1, 2, 3) * torch.ones(3), "factors of shape (3,) for 1 output channels"),
        (lambda: conv(3, 2, 3) * torch.ones(3, 1), "factors of shape (3, 1) for 3 output channels"),
        (lambda: concat([]), "at least one map"),
    ],
)
def test_what_is_no_map_is_an_error(make: Callable[[], ConvMap], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        make()


# --- what went wrong once, and what might -------------------------------------------------------------------------


def test_a_circular_pad_wraps_all_of_the_input_not_what_is_left_after_a_crop() -> None:
    x = torch.tensor([[[1.0, 2.0, 3.0]]])
    merged = pad(1, (2, 0), border="circular") >> pad(1, (0, -1))
    assert merged(x).flatten().tolist() == [2, 3, 1, 2]


def test_a_crop_of_more_than_the_input_reads_the_pad() -> None:
    assert pad(1, (-3, 4), fill=7.0)(torch.ones(1, 1, 2)).flatten().tolist() == [7, 7, 7]


@pytest.mark.parametrize("fill", [1e300, -1e17, 1e-300])
def test_a_fill_of_any_size_leaves_the_pixels_as_they_are(fill: float) -> None:
    y = pad(1, (1, 0), fill=fill)(torch.tensor([[[1.0, 3.0]]]))
    assert y.flatten().tolist() == [fill, 1.0, 3.0]


def test_the_identity_passes_any_pad() -> None:
    f = conv(2, 3, 3, 3, pad=1, fill=5.0, bias=True)
    assert (ConvMap.identity(3) >> f).distance(f) == 0


def test_a_channel_is_not_hidden_by_a_larger_one() -> None:
    """1e-15 beside 1 is not rounding in a channel that is as small, and that the next map multiplies by 1e15."""
    with pytest.raises(Inexact):
        ConvMap.scale(torch.tensor([1.0, 1e-15]), torch.tensor([1.0, 1e-15])) >> conv(
            1, 2, 3, 3, pad=1, fill=torch.tensor([1.0, 0.0])
        )
    with pytest.raises(Inexact):
        conv(1, 2, 3, pad=1, fill=torch.tensor([1.0, 1e-15])) + conv(1, 2, 3, pad=1, fill=torch.tensor([1.0, 0.0]))


def test_a_bias_that_cancels_is_known_up_to_rounding() -> None:
    """A norm's shift, computed by two routes, is 1e-16 of the mean and not of the little that is left."""
    mean, var, weight = weights(256, seed=4), weights(256, seed=5).abs() + 0.1, weights(256, seed=6)
    shift = mean * weight * var.rsqrt() * (1 + 1e-5)
    by_map = ConvMap.scale(torch.ones(256), -mean) >> ConvMap.scale(weight * var.rsqrt(), shift)
    by_hand = shift - mean * weight / var.sqrt()
    assert float(((by_map.bias - by_hand).abs() / by_hand.abs()).max()) > 1e-13
    pooled = ConvMap(torch.full((256, 1, 3, 3), 1 / 9), groups=256, pad=1, fill=by_hand)
    x = pixels(1, 256, 2, 3)
    agree([x], by_map >> pooled, chain(by_map, pooled), chain(absolute(by_map), absolute(pooled)))


FRAMED = ConvMap.identity(3).framed(Geometry(3, 3, (3, 3), pad=((1, 1), (1, 1)), groups=3))
DEAF = ConvMap(torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1).expand(1, 2, 3, 3), pad=1)  # to its second channel
UNNEEDED = {
    "zero taps": (FRAMED, conv(2, 3, 3, 3, pad=1)),
    "a zero map": (FRAMED * 0, conv(2, 3, 3, 3, pad=1)),
    "a channel of no weight": (ConvMap.scale(torch.ones(2), torch.tensor([0.0, 1.0])), DEAF),
    "copies of a replicated pad": (pad(3, (1, 1), border="replicate"), conv(2, 3, 3, pad=1, border="replicate")),
    "copies of a constant pad": (pad(3, (2, 2), fill=2.0), conv(2, 3, 3, pad=1, border="reflect")),
    "pointwise before the first pixel": (conv(3, 3, 1, stride=2), conv(2, 3, 3, pad=((2, 0),), border="reflect")),
    "pointwise after the last pixel": (pad(3, (-1, 0)), conv(2, 3, 3, pad=((0, 2),), border="reflect")),
    "a roll": (pad(3, (1, -1), border="circular"), conv(2, 3, 2, pad=((0, 1),), border="circular")),
    "a roll back": (pad(3, (1, -1), border="circular"), conv(2, 3, 2, pad=((-1, 2),), border="circular")),
}


@pytest.mark.parametrize("name", UNNEEDED)
def test_refusals_that_are_known_not_to_be_needed(name: str) -> None:
    """Legality does not hang on a coefficient that happens to be zero: such taps count. The others are rare, see
    `conservative`. Where one of these is merged, and rightly, it goes from this list to that of `COMPOSITES`."""
    f, g = UNNEEDED[name]
    assert not differs(
        formula(f) >> formula(g), [[f, g]], chain(formula(f), formula(g)), chain(absolute(f), absolute(g))
    )
    with pytest.raises(Inexact):
        f >> g


def test_a_sum_of_borders_that_no_tap_reads_is_refused() -> None:
    """Zeros count as taps here, too."""
    with pytest.raises(Inexact):
        FRAMED + conv(3, 3, 3, 3, pad=1, border="reflect")


def test_a_fill_is_not_solved_for() -> None:
    """Also known: a constant that the first map would turn into what the second reads is found for a scale only."""
    with pytest.raises(Inexact, match="its bias"):
        ConvMap.scale(SCALE, SHIFT) >> conv(2, 4, 3, 3, pad=1)  # -SHIFT / SCALE
    with pytest.raises(Inexact, match="its bias"):
        conv(4, 3, 1, 1) >> conv(2, 4, 3, 3, pad=1, fill=weights(4, 3).sum(1))  # 1
    with pytest.raises(Inexact, match="its bias"):  # nothing that the crop leaves reads the first fill
        pad(3, (1, 0), fill=5.0) >> pad(3, (-1, 1))


def test_a_map_keeps_its_own_coefficients() -> None:
    kernel, bias, fill = torch.ones(2, 3, 3, dtype=torch.float64), torch.ones(2).double(), torch.ones(3).double()
    f = ConvMap(kernel, bias, pad=1, fill=fill)
    for given_ in (kernel, bias, fill):
        given_.fill_(7)
    assert f.magnitude == 1
    assert f.fill.eq(1).all()


def test_parameters_give_a_map_without_gradients() -> None:
    layer = torch.nn.Conv2d(4, 6, 3, groups=2)
    fill = torch.ones(4, requires_grad=True)
    f = ConvMap(layer.weight, layer.bias, groups=2, pad=1, fill=fill)
    scale = torch.ones(6, requires_grad=True)
    for map_ in (f, f * scale, f + f, f >> ConvMap.scale(scale, scale), concat([f, f])):
        assert not any(t.requires_grad for t in (map_.kernel, map_.bias, map_.fill))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int8])
def test_kernels_of_any_dtype_are_read_exactly(dtype: torch.dtype) -> None:
    kernel, bias = (weights(4, 3, 3, 3) * 9).to(dtype), (weights(4) * 9).to(dtype)
    f = ConvMap(kernel, bias, pad=1)
    assert (f.kernel.dtype, f.bias.dtype, f.fill.dtype) == (torch.float64,) * 3
    assert f.kernel.equal(kernel.double())
    assert f(torch.ones(1, 3, 2, 2, dtype=dtype)).dtype == torch.float64


def test_kernels_of_any_strides_are_read() -> None:
    dense = weights(4, 4, 3, 3)
    for kernel in (
        dense.transpose(2, 3),
        dense.transpose(0, 1),
        dense.contiguous(memory_format=torch.channels_last),
        dense[:, :1].expand(4, 4, 3, 3),
        dense.flip(3)[::2, ::2],
    ):
        f, g = ConvMap(kernel, pad=1), ConvMap(kernel.contiguous(), pad=1)
        assert f.distance(g) == 0
        diagonal, dense_1x1 = ConvMap.scale(weights(len(kernel))), conv(5, len(kernel), 1, 1)
        for second in (diagonal, dense_1x1, pad(len(kernel), (0, 0), (-1, 0))):
            assert (f >> second).distance(g >> second) == 0
        assert (f.regrouped(1) * weights(len(kernel))).distance(g * weights(len(kernel))) == 0


@pytest.mark.parametrize("size", [1e-150, 1e-30, 1e30, 1e150])
def test_coefficients_of_any_size_compose_exactly(size: float) -> None:
    f, g = conv(4, 3, 1, 1) * size, conv(2, 4, 3, 3, pad=1)
    assert ((f >> g) * (1 / size)).distance(conv(4, 3, 1, 1) >> g) < EXACT * amplification(g, g)
    assert ((g >> conv(3, 2, 1, 1) * size) * (1 / size)).distance(g >> conv(3, 2, 1, 1)) < EXACT * amplification(g, g)


def test_a_linear_takes_any_leading_dims() -> None:
    f = conv(4, 3, groups=2, bias=True)
    x = pixels(5, 7, 6)
    assert f(x).shape == (5, 7, 4)
    assert gap(f(x)[:, 2], formula(f)(x[:, 2]), formula(absolute(f))(x[:, 2].abs())) < EXACT


def test_far_strides_dilations_and_pads() -> None:
    f = conv(2, 1, 2, stride=50, dilation=97, pad=((120, 30),), bias=True, fill=3.0)
    g = conv(1, 2, 2, stride=3, dilation=5)
    xs = [pixels(2, 1, n) for n in sizes([f, g], dim=0, count=60)]
    agree(xs, f >> g, chain(formula(f), formula(g)), chain(absolute(f), absolute(g)))


def test_one_tap_has_no_dilation() -> None:
    assert conv(2, 3, 1, 3, dilation=5).geometry == conv(2, 3, 1, 3, dilation=(1, 5)).geometry
    assert (conv(2, 3, 1, 3, dilation=(7, 2)) + conv(2, 3, 1, 3, dilation=2)).geometry.dilation == (1, 2)


def test_dilated_branches_stay_dilated() -> None:
    merged = conv(2, 3, 3, 3, dilation=4, pad=4) + conv(2, 3, 3, 3, dilation=2, pad=2) + conv(2, 3, 1, 1)
    assert (merged.geometry.kernel, merged.geometry.dilation) == ((5, 5), (2, 2))


def test_other_operands_are_no_maps() -> None:
    f = conv(2, 3, 1, 1)
    for operation in (
        lambda: f + 1,
        lambda: f + torch.ones(2),
        lambda: f >> 2,
        lambda: f >> torch.relu,
        lambda: 2 >> f,
    ):
        with pytest.raises(TypeError):
            operation()
    assert (torch.tensor(2.0) * f).distance(f * 2) == (torch.ones(2) * f).distance(f) == 0
