"""RepAdapter: Towards Efficient Visual Adaption via Structural Re-parameterization. Luo et al., arXiv:2302.08106.

Training time: an adapter of two thin layers beside a skip, x + s B A x, and the layer of the trained model behind it.
Alone the adapter is cheaper as it is; with that layer it is one.
"""

from torch import nn

from structrep.algebra import ConvMap
from structrep.blocks import Branches, RepAdapterLinear
from structrep.pattern import Affine, Conv, Identity, Optional, Seq, Sum, pointwise
from structrep.registry import rule


def _adapter(*between: nn.Module) -> Branches:
    return Branches(nn.Identity(), nn.Sequential(nn.Linear(8, 2), *between, nn.Linear(2, 8)))


@rule(
    Seq(
        Sum(
            Identity().named("skip"),
            Seq(Conv(pointwise).named("down"), Conv(pointwise).named("up"), Optional(Affine().named("scale"))),
        ),
        Conv(pointwise).named("base"),
    ),
    source="RepAdapter, arXiv:2302.08106",
    example=lambda: RepAdapterLinear(8, 6, rank=2),
    counter_examples=[
        ("", lambda: nn.Sequential(_adapter(nn.GELU()), nn.Linear(8, 6))),
        ("", lambda: _adapter()),  # which takes less than the one layer that it could be
    ],
)
def repadapter(skip: ConvMap, down: ConvMap, up: ConvMap, scale: ConvMap, base: ConvMap) -> ConvMap:
    return (skip + (down >> up >> scale)) >> base
