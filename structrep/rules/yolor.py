"""YOLOR: You Only Learn One Representation: Unified Network for Multiple Tasks. Wang et al., arXiv:2105.04206.

Training time: implicit knowledge around the last 1x1 of a detector, a learned vector that is added to its input and one
that its output is multiplied by. W' = m W, b' = m (b + W a).
"""

from torch import Tensor, nn

from structrep.algebra import ConvMap
from structrep.blocks import ImplicitConv2d
from structrep.pattern import Conv, Optional, Scale, Seq, Shift, pointwise
from structrep.registry import rule


class _Plus(nn.Module):
    """A number that nobody learns, added."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1


@rule(
    Seq(Shift(learned=True).named("add"), Conv(pointwise).named("conv"), Optional(Scale().named("multiply"))),
    source="YOLOR, arXiv:2105.04206, implicit knowledge",
    example=lambda: ImplicitConv2d(8, 12, 1),
    counter_examples=[
        ("", lambda: nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, 12, 1))),
        ("", lambda: nn.Sequential(_Plus(), nn.Conv2d(8, 12, 1))),
    ],
    published="YOLOv7's (WongKinYiu/yolov7 at a207844) is a notebook that writes to layers by their number.",
)
def yolor(add: ConvMap, conv: ConvMap, multiply: ConvMap) -> ConvMap:
    return add >> conv >> multiply
