"""RepLKNet: Scaling Up Your Kernels to 31x31. Ding et al., CVPR 2022, arXiv:2203.06717; and UniRepLKNet. Ding et al.,
CVPR 2024, arXiv:2311.15599.

Training time: a large depthwise kernel and small ones, dilated or not, each with a norm, added (RepLKNet, guideline 3;
UniRepLKNet, the dilated re-param block). A dilated kernel is a larger one with zeros between its taps.
"""

from torch import nn

from structrep.algebra import ConvMap
from structrep.blocks import Branches, LargeKernelBlock2d
from structrep.pattern import Affine, Identity, Many, Optional, Sum, conv_norm, large, spatial, square
from structrep.registry import rule


def _strips(*kernels: tuple[int, int]) -> Branches:
    """Depthwise strips, as SLaK (arXiv:2207.03620) has them in place of one large kernel."""
    return Branches(*(nn.Conv2d(8, 8, (h, w), padding=(h // 2, w // 2), groups=8) for h, w in kernels))


@rule(
    Sum(
        conv_norm(large, depthwise=True).named("large"),
        conv_norm(spatial, depthwise=True).named("small"),
        Optional((Affine() | Identity()).named("skip")),
    ),
    source="RepLKNet, arXiv:2203.06717, section 3, guideline 3",
    example=lambda: LargeKernelBlock2d(8, 8, 13, padding=6, groups=8),
    counter_examples=[("Costlier", lambda: _strips((51, 5), (5, 51)))],
    published="The authors' (DingXiaoH/RepLKNet-pytorch at b76808a) leaves all norms where they are SyncBatchNorms, "
    "as they are by default: 35 of 35; and else those before 1x1 convolutions, 9.",
)
def replknet(large: ConvMap, small: ConvMap, skip: ConvMap) -> ConvMap:
    return large + small + skip


@rule(
    Sum(
        conv_norm(square, depthwise=True).named("large"),
        Optional((Affine() | Identity()).named("skip")),
        Many(conv_norm(square, depthwise=True), least=2).named("small"),
    ),
    source="UniRepLKNet, arXiv:2311.15599, section 3.2",
    example=lambda: LargeKernelBlock2d(8, 8, 13, padding=6, groups=8, branches="dilated"),
    counter_examples=[("Costlier", lambda: _strips((51, 5), (5, 51), (5, 5)))],
    narrower_than=["dyrep"],
    published="The authors' (AILab-CVC/UniRepLKNet at b5677d8) stops with an error on models in float64.",
)
def unireplknet(large: ConvMap, small: list[ConvMap], skip: ConvMap) -> ConvMap:
    return large + sum(small) + skip
