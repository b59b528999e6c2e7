"""SPAN: Swift Parameter-free Attention Network for Efficient Super-Resolution. Wan et al., CVPRW 2024,
arXiv:2311.12770.

Training time: a 1x1, a 3x3 and a 1x1 in a row, padded before the first, and a 1x1 beside them (Conv3XC). In eval mode
its authors compose the kernels in every forward, and assign them to a convolution; what that computes depends on
parameters alone.
"""

from torch import nn

from structrep.algebra import ConvMap
from structrep.blocks import Branches, Conv3XC2d, DOConv2d
from structrep.pattern import Conv, Optional, Pad, Seq, Sum, pointwise, spatial
from structrep.registry import rule
from structrep.rules.formulas import CONVOLUTIONS
from structrep.terms.layer import Formula


@rule(
    Sum(
        Seq(Optional(Pad()), Conv(pointwise), Conv(spatial), Conv(pointwise)).named("chain"),
        Conv(pointwise).named("beside"),
    ),
    source="SPAN, arXiv:2311.12770, Conv3XC",
    example=lambda: Branches(
        nn.Sequential(nn.Conv2d(8, 16, 1, padding=1), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 8, 1)), nn.Conv2d(8, 8, 1)
    ),
    counter_examples=[
        (
            "Inexact",
            lambda: Branches(
                nn.Sequential(nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 8, 1)),
                nn.Conv2d(8, 8, 1),
            ),
        ),
    ],
)
def conv3xc(chain: ConvMap, beside: ConvMap) -> ConvMap:
    return chain + beside


def row_of_kernels(formula: Formula) -> bool:
    """Kernels convolved with one another, flipped to be composed, and a kernel added."""
    return bool(formula.calls & CONVOLUTIONS and "flip" in formula.calls)


@rule(
    Conv(formula=row_of_kernels).named("conv"),
    source="SPAN, arXiv:2311.12770, Conv3XC",
    example=lambda: Conv3XC2d(8, 8, 3, padding=1),
    counter_examples=[("", lambda: DOConv2d(8, 8, 3, padding=1))],
)
def conv3xc_computed(conv: ConvMap) -> ConvMap:
    return conv
