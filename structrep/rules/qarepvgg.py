"""QARepVGG: Make RepVGG Greater Again. Chu et al., AAAI 2024, arXiv:2212.01593; and RepViT. Wang et al., CVPR 2024,
arXiv:2307.09283.

Training time: a k×k with a norm, a 1x1 and a skip without, added, and a norm behind the sum; YOLOv6 (arXiv:2209.02976)
adds an average pool. RepViT's depthwise block is the same with one filter a channel. That norm folds into the merged
kernel if nothing stands between: with a squeeze-excite before it, it does not, and is not.
"""

from torch import nn

from structrep.algebra import ConvMap
from structrep.blocks import Branches, QARepVGGBlock2d
from structrep.pattern import Affine, Conv, Identity, Optional, Pad, Pool, Seq, Sum, conv_norm, pointwise, spatial
from structrep.registry import rule


def _interrupted(groups: int) -> nn.Module:
    """Something between the sum and the norm, as a squeeze-excite layer may stand there."""
    dense = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=groups), nn.BatchNorm2d(8))
    branches = Branches(dense, nn.Conv2d(8, 8, 1, groups=groups), nn.Identity())
    return nn.Sequential(branches, nn.Sigmoid(), nn.BatchNorm2d(8))


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
    counter_examples=[("", lambda: _interrupted(8))],
    narrower_than=["qarepvgg"],
    published="The authors' (THU-MIG/RepViT at 298f420, replace_batchnorm) makes identities of norms that it knows "
    "no layer for: off by 46 % on a convolution and norm that are not of its own class.",
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
    counter_examples=[("", lambda: _interrupted(1))],
    published="The authors' (cxxgtxy/QARepVGG at b88def2) folds the norm past a squeeze-excite layer before it: off "
    "by 40 %. YOLOv6's (meituan/YOLOv6 at e86a483) leaves the norm, and is off by 3.8e-9 in a float64 "
    "model with average pools.",
)
def qarepvgg(dense: ConvMap, point: ConvMap, skip: ConvMap, average: ConvMap, after: ConvMap) -> ConvMap:
    return (dense + point + skip + average) >> after
