"""ACNet: Strengthening the Kernel Skeletons. Ding et al., ICCV 2019, arXiv:1908.03930.

Training time: BN(kxk conv) + BN(kx1 conv) + BN(1xk conv). The asymmetric kernels add to the middle column and row of
the square one (section 3.2, figure 3). Where the padding is smaller than k // 2 they read a cropped input, which
only moves their taps: a crop is a negative pad.
"""

from torch import nn

from structrep.algebra import ConvMap
from structrep.blocks import ACBlock2d, Branches
from structrep.pattern import Sum, conv_norm, line, square
from structrep.registry import rule


def tall(kernel: tuple[int, ...]) -> bool:
    """kx1."""
    return line(kernel) and kernel[0] > 1


def wide(kernel: tuple[int, ...]) -> bool:
    """1xk."""
    return line(kernel) and kernel[0] == 1


@rule(
    Sum(conv_norm(square).named("square"), conv_norm(tall).named("tall"), conv_norm(wide).named("wide")),
    source="ACNet, arXiv:1908.03930, section 3.2",
    example=lambda: ACBlock2d(8, 8, 3, padding=1),
    counter_examples=[
        (
            "Inexact",
            lambda: Branches(
                nn.Conv2d(8, 8, 3, padding=1),
                nn.Conv2d(8, 8, (3, 1), padding=(1, 0), padding_mode="reflect"),
                nn.Conv2d(8, 8, (1, 3), padding=(0, 1)),
            ),
        ),
    ],
    published="The authors' conversion (DingXiaoH/ACNet at 748fb0c) stops with an error on norms without weights.",
)
def acb(square: ConvMap, tall: ConvMap, wide: ConvMap) -> ConvMap:
    return square + tall + wide
