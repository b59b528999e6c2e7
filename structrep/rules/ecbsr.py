"""ECBSR: Edge-oriented Convolution Block for Real-time Super Resolution on Mobile Devices. Zhang et al., ACM Multimedia
2021, doi:10.1145/3474085.3475291.

Training time: a 3x3, and branches of a 1x1 padded with its own bias and a 3x3, which is learned or a Sobel or Laplacian
filter with a scale per channel, + x (section 3.2). SPAN (arXiv:2311.12770) has a 1x1, a 3x3, a 1x1 in a row, padded
before the first, and a 1x1 beside them (Conv3XC).
"""

from torch import nn

from structrep.algebra import ConvMap
from structrep.blocks import Branches, EdgeBlock2d
from structrep.pattern import Conv, Identity, Many, Optional, Pad, Seq, Sum, conv_norm, pointwise, spatial
from structrep.registry import rule
from structrep.rules.dbb import BORDER


@rule(
    Sum(
        conv_norm(spatial).named("dense"),
        Optional(Identity().named("skip")),
        Many(Seq(Conv(pointwise), BORDER, Conv(spatial))).named("edges"),
    ),
    source="ECBSR, doi:10.1145/3474085.3475291, section 3.2",
    example=lambda: EdgeBlock2d(8, 8, 3, padding=1),
)
def ecbsr(dense: ConvMap, skip: ConvMap, edges: list[ConvMap]) -> ConvMap:
    return dense + skip + sum(edges)


@rule(
    Sum(
        Seq(Optional(Pad()), Conv(pointwise), Conv(spatial), Conv(pointwise)).named("chain"),
        Conv(pointwise).named("beside"),
    ),
    source="SPAN, arXiv:2311.12770, Conv3XC",
    example=lambda: Branches(
        nn.Sequential(nn.Conv2d(8, 16, 1, padding=1), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 8, 1)), nn.Conv2d(8, 8, 1)
    ),
)
def conv3xc(chain: ConvMap, beside: ConvMap) -> ConvMap:
    return chain + beside
