"""FMEN: Fast and Memory-Efficient Network Towards Efficient Image Super-Resolution. Du et al., arXiv:2204.08397.

Training time: residual in residual (RRRB): x + R (E x + D E x), a 1x1 that expands, a 3x3 padded with what that makes
of 0 beside a skip, a 1x1 that reduces.
"""

from torch import nn

from structrep.algebra import ConvMap
from structrep.blocks import Branches, ResidualRepBlock2d
from structrep.pattern import Affine, Conv, Identity, Seq, Sum, pointwise, spatial
from structrep.registry import rule
from structrep.rules.branches import BORDER


def _padded_with_zeros() -> nn.Module:
    inner = Branches(nn.Conv2d(16, 16, 3, padding=1), nn.Identity())
    return Branches(nn.Sequential(nn.Conv2d(8, 16, 1), inner, nn.Conv2d(16, 8, 1)), nn.Identity())


@rule(
    Sum(
        Identity().named("skip"),
        Seq(
            Conv(pointwise).named("expand"),
            Sum(Seq(BORDER, Conv(spatial)), Identity() | Affine()).named("inner"),
            Conv(pointwise).named("reduce"),
        ),
    ),
    source="FMEN, arXiv:2204.08397, RRRB",
    example=lambda: ResidualRepBlock2d(8, 8, 3, padding=1),
    counter_examples=[("Inexact", _padded_with_zeros)],
    published="The authors' (NJU-Jet/FMEN at a1def16) computes in float32: off by 4.8e-9 in a float64 model.",
)
def rrrb(skip: ConvMap, expand: ConvMap, inner: ConvMap, reduce: ConvMap) -> ConvMap:
    return skip + (expand >> inner >> reduce)
