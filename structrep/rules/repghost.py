"""RepGhost: A Hardware-Efficient Ghost Module via Re-parameterization. Chen et al., arXiv:2211.06088.

Training time: a cheap depthwise convolution and the identity, each with a norm, added (section 3.2, figure 4), where
GhostNet would stack the two.
"""

from torch import nn

from structrep.algebra import ConvMap
from structrep.blocks import Branches
from structrep.pattern import Affine, Conv, Seq, Sum, spatial
from structrep.registry import rule


def _cheap(*more: nn.Module) -> Branches:
    depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
    return Branches(nn.Sequential(depthwise, nn.BatchNorm2d(8), *more), nn.BatchNorm2d(8))


@rule(
    Sum(Seq(Conv(spatial, depthwise=True), Affine()).named("cheap"), Affine().named("skip")),
    source="RepGhost, arXiv:2211.06088, section 3.2",
    example=lambda: _cheap(),
    counter_examples=[("", lambda: _cheap(nn.ReLU()))],
    published="The authors' (ChengpengChen/RepGhost at 3c7d87e) leaves 48 norms of its smallest network.",
)
def repghost(cheap: ConvMap, skip: ConvMap) -> ConvMap:
    return cheap + skip
