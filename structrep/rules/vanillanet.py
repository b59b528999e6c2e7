"""VanillaNet: the Power of Minimalism in Deep Learning. Chen et al., NeurIPS 2023, arXiv:2305.12972.

Training time: two convolutions, each with a norm, and an activation between them that training turns into the identity:
a leaky ReLU whose slope grows to 1 (deep training strategy). One of the two keeps the channels. Until the slope is 1,
they are two layers.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from structrep.algebra import ConvMap
from structrep.pattern import Affine, Conv, Optional, Pad, Seq, pointwise, spatial
from structrep.registry import rule


class _Block(nn.Module):
    """Two 1x1 with norms, and between them a leaky ReLU."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = slope
        self.first = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
        self.second = nn.Sequential(nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(F.leaky_relu(self.first(x), self.slope))
        return y


@rule(
    Seq(
        Seq(Optional(Pad()), Conv(spatial, depthwise=False) | Conv(pointwise, keeps_channels=True), Affine()).named(
            "first"
        ),
        Seq(Conv(pointwise), Affine()).named("second"),
    ),
    source="VanillaNet, arXiv:2305.12972, deep training",
    example=lambda: _Block(1.0),
    counter_examples=[("", lambda: _Block(0.5))],
)
def vanillanet(first: ConvMap, second: ConvMap) -> ConvMap:
    return first >> second
