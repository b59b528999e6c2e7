"""ECBSR: Edge-oriented Convolution Block for Real-time Super Resolution on Mobile Devices. Zhang et al., ACM Multimedia
2021, doi:10.1145/3474085.3475291.

Training time: a 3x3, and branches of a 1x1 padded with its own bias and a 3x3, which is learned or a Sobel or Laplacian
filter with a scale per channel, + x (section 3.2). In eval mode its authors compute the merged kernel in every forward.
EFDN (Wang, arXiv:2204.08759) adds a 1x1 (EDBB).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structrep.algebra import ConvMap
from structrep.blocks import Branches, Conv3XC2d, EdgeBlock2d
from structrep.pattern import Conv, Identity, Many, Optional, Seq, Sum, conv_norm, pointwise, spatial
from structrep.registry import rule
from structrep.rules.branches import BORDER
from structrep.rules.formulas import CONTRACTIONS, CONVOLUTIONS, SUMS
from structrep.terms.layer import Formula


@rule(
    Sum(
        conv_norm(spatial).named("dense"),
        Optional(Identity().named("skip")),
        Many(Seq(Conv(pointwise), BORDER, Conv(spatial))).named("edges"),
    ),
    source="ECBSR, doi:10.1145/3474085.3475291, section 3.2",
    example=lambda: EdgeBlock2d(8, 8, 3, padding=1),
    counter_examples=[
        (
            "Inexact",
            lambda: Branches(
                nn.Conv2d(8, 8, 3, padding=1), nn.Sequential(nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 3, padding=1))
            ),
        ),
    ],
)
def ecbsr(dense: ConvMap, skip: ConvMap, edges: list[ConvMap]) -> ConvMap:
    return dense + skip + sum(edges)


@rule(
    Sum(
        conv_norm(spatial).named("dense"),
        Conv(pointwise).named("point"),
        Optional(Identity().named("skip")),
        Many(Seq(Conv(pointwise), BORDER, Conv(spatial))).named("edges"),
    ),
    source="EFDN, arXiv:2204.08759, EDBB",
    example=lambda: EdgeBlock2d(8, 8, 3, padding=1, point=True),
    counter_examples=[("", lambda: EdgeBlock2d(8, 8, 3, padding=1))],
)
def edbb(dense: ConvMap, point: ConvMap, skip: ConvMap, edges: list[ConvMap]) -> ConvMap:
    return dense + point + skip + sum(edges)


def kernel_of_kernels(formula: Formula) -> bool:
    """Kernels of one size convolved with pointwise ones, and a kernel added: nothing flipped, padded or contracted."""
    others = formula.calls & (CONTRACTIONS | {"flip", "pad"})
    return bool(formula.calls & CONVOLUTIONS and formula.calls & SUMS and not others)


class _Computed(nn.Module):
    """Two branches as the authors' block computes them in eval mode: a 3x3, and a 1x1 before a 3x3."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.inner, self.outer = (
            nn.Parameter(torch.randn(*shape)) for shape in ((8, 8, 3, 3), (16, 8, 1, 1), (8, 16, 3, 3))
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.dense + F.conv2d(self.outer, self.inner.permute(1, 0, 2, 3)), padding=1)


@rule(
    Conv(formula=kernel_of_kernels).named("conv"),
    source="ECBSR, doi:10.1145/3474085.3475291, section 3.2",
    example=_Computed,
    counter_examples=[("", lambda: Conv3XC2d(8, 8, 3, padding=1))],
)
def ecbsr_computed(conv: ConvMap) -> ConvMap:
    """The kernel that was computed at every pass, as a constant."""
    return conv
