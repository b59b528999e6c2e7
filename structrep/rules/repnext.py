"""RepNeXt: A Fast Multi-Scale CNN using Structural Reparameterization. Zhao et al., arXiv:2406.16004.

Training time: on a part of the channels, a depthwise k×k and smaller kernels beside it, strips, rows of two strips and
2x2 dilated ones, added without a norm; the norm is behind the concatenation of the parts.
"""

from torch import nn

from structrep.algebra import ConvMap
from structrep.blocks import Branches
from structrep.pattern import Conv, Many, Optional, Pad, Seq, Sum, line, square
from structrep.registry import rule


def _small(*between: nn.Module) -> nn.Module:
    """3x3, 1x3, 3x1, and the corners of a 3x3."""
    kernels = (((3, 3), (1, 1), 1), ((1, 3), (0, 1), 1), ((3, 1), (1, 0), 1), ((2, 2), (1, 1), 2))
    convs = (nn.Conv2d(8, 8, kernel, padding=pad, dilation=step, groups=8) for kernel, pad, step in kernels)
    return Branches(*(nn.Sequential(conv, *between) for conv in convs))


STRIP = Conv(line, depthwise=True)


@rule(
    Sum(
        Seq(Optional(Pad()), Conv(square, depthwise=True)).named("dense"),
        Many(Seq(Optional(Pad()), Seq(STRIP, STRIP) | Conv(depthwise=True)), least=3).named("branches"),
    ),
    source="RepNeXt, arXiv:2406.16004, chunk convolution",
    example=lambda: _small(),
    counter_examples=[("", lambda: _small(nn.ReLU()))],
)
def repnext(dense: ConvMap, branches: list[ConvMap]) -> ConvMap:
    return dense + sum(branches)
