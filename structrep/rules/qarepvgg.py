"""QARepVGG: Make RepVGG Greater Again. Chu et al., AAAI 2024, arXiv:2212.01593; and RepViT. Wang et al., CVPR 2024,
arXiv:2307.09283.

Training time: a k×k with a norm, a 1x1 and a skip without, added, and a norm behind the sum; YOLOv6 (arXiv:2209.02976)
adds an average pool. RepViT's depthwise block is the same with one filter a channel. That norm folds into the merged
kernel if nothing stands between: with a squeeze-excite before it, it does not, and is not.
"""

from structrep.algebra import ConvMap
from structrep.blocks import QARepVGGBlock2d
from structrep.pattern import Affine, Conv, Identity, Optional, Pad, Pool, Seq, Sum, conv_norm, pointwise, spatial
from structrep.registry import rule


@rule(
    Seq(
        Sum(
            conv_norm(spatial, depthwise=True).named("dense"),
            Conv(pointwise, depthwise=True).named("point"),
            Identity().named("skip"),
        ),
        Affine().named("after"),
    ),
    source="RepViT, arXiv:2307.09283, section 3.2",
    example=lambda: QARepVGGBlock2d(8, 8, 3, padding=1, groups=8),
)
def repvit(dense: ConvMap, point: ConvMap, skip: ConvMap, after: ConvMap) -> ConvMap:
    return (dense + point + skip) >> after


@rule(
    Seq(
        Sum(
            conv_norm(spatial).named("dense"),
            Seq(Optional(Pad()), Conv(pointwise)).named("point"),
            Optional(Seq(Optional(Pad()), Identity()).named("skip")),
            Optional(Pool().named("average")),
        ),
        Affine().named("after"),
    ),
    source="QARepVGG, arXiv:2212.01593, section 4",
    example=lambda: QARepVGGBlock2d(8, 8, 3, padding=1),
)
def qarepvgg(dense: ConvMap, point: ConvMap, skip: ConvMap, average: ConvMap, after: ConvMap) -> ConvMap:
    return (dense + point + skip + average) >> after
