"""RepOptimizer: Re-parameterizing Your Optimizers rather than Architectures. Ding et al., ICLR 2023, arXiv:2205.15242.

Training time: s conv_k(x) + t conv_1(x) + u x, constant scales per channel and linear addition (CSLA), and one norm
behind the sum, where RepVGG has a norm on each branch.
"""

from torch import nn

from structrep.algebra import ConvMap
from structrep.blocks import Branches, CSLABlock2d, RepVGGBlock2d
from structrep.pattern import Affine, Conv, Optional, Pad, Scale, Seq, Sum, pointwise, spatial
from structrep.registry import rule


@rule(
    Seq(
        Sum(
            Seq(Optional(Pad()), Conv(spatial), Scale()).named("dense"),
            Seq(Optional(Pad()), Conv(pointwise), Scale()).named("point"),
            Optional(Scale().named("skip")),
        ),
        Affine().named("after"),
    ),
    source="RepOptimizer, arXiv:2205.15242, CSLA block",
    example=lambda: CSLABlock2d(8, 8, 3, padding=1),
    counter_examples=[
        ("", lambda: nn.Sequential(RepVGGBlock2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))),
        ("", lambda: nn.Sequential(Branches(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)), nn.BatchNorm2d(8))),
    ],
    published="The authors publish none: they train the plain model with an optimizer that makes up for the branches.",
)
def csla(dense: ConvMap, point: ConvMap, skip: ConvMap, after: ConvMap) -> ConvMap:
    return (dense + point + skip) >> after
