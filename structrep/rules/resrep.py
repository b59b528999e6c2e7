"""ResRep: Lossless CNN Pruning via Decoupling Remembering and Forgetting. Ding et al., ICCV 2021, arXiv:2007.03260.

Training time: a convolution, its norm, and a compactor, a 1x1 that keeps the channels, starts as the identity and
forgets. W' = Q s W, b' = Q (beta - s mean): where a row of Q is 0, so is the channel.
"""

from torch import nn

from structrep.algebra import ConvMap
from structrep.blocks import CompactorBlock2d
from structrep.pattern import Affine, Conv, Optional, Pad, Seq, pointwise
from structrep.registry import rule


@rule(
    Seq(
        Seq(Optional(Pad()), Conv(depthwise=False)).named("conv"),
        Affine().named("norm"),
        Conv(pointwise, keeps_channels=True).named("compactor"),
    ),
    source="ResRep, arXiv:2007.03260, compactor",
    example=lambda: CompactorBlock2d(4, 8, 3, padding=1),
    counter_examples=[
        ("", lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1, bias=False))),
        ("", lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1, bias=False))),
    ],
)
def resrep(conv: ConvMap, norm: ConvMap, compactor: ConvMap) -> ConvMap:
    return conv >> norm >> compactor
