"""RepLKNet: Scaling Up Your Kernels to 31x31. Ding et al., CVPR 2022, arXiv:2203.06717; and UniRepLKNet. Ding et al.,
CVPR 2024, arXiv:2311.15599.

Training time: a large depthwise kernel and small ones, dilated or not, each with a norm, added (RepLKNet, guideline 3;
UniRepLKNet, the dilated re-param block). A dilated kernel is a larger one with zeros between its taps.
"""

from structrep.algebra import ConvMap
from structrep.blocks import LargeKernelBlock2d
from structrep.pattern import Affine, Identity, Many, Optional, Sum, conv_norm, large, spatial
from structrep.registry import rule


@rule(
    Sum(
        conv_norm(large, depthwise=True).named("large"),
        conv_norm(spatial, depthwise=True).named("small"),
        Optional((Affine() | Identity()).named("skip")),
    ),
    source="RepLKNet, arXiv:2203.06717, section 3, guideline 3",
    example=lambda: LargeKernelBlock2d(8, 8, 13, padding=6, groups=8),
)
def replknet(large: ConvMap, small: ConvMap, skip: ConvMap) -> ConvMap:
    return large + small + skip


@rule(
    Sum(
        conv_norm(spatial, depthwise=True).named("large"),
        Optional((Affine() | Identity()).named("skip")),
        Many(conv_norm(spatial, depthwise=True), least=2).named("small"),
    ),
    source="UniRepLKNet, arXiv:2311.15599, section 3.2",
    example=lambda: LargeKernelBlock2d(8, 8, 13, padding=6, groups=8, branches="dilated"),
)
def unireplknet(large: ConvMap, small: list[ConvMap], skip: ConvMap) -> ConvMap:
    return large + sum(small) + skip
