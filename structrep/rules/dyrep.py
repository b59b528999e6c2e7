"""DyRep: Bootstrapping Training with Dynamic Re-parameterization. Huang et al., CVPR 2022, arXiv:2204.00868.

Training time: a k×k and what grew beside it: the branches of DBB and ACNet, perhaps one inside another, and the
identity (section 3.2). It comes after the families whose branches it has.
"""

from torch import nn

from structrep.algebra import ConvMap
from structrep.blocks import Branches
from structrep.pattern import Affine, Identity, Many, Sum, conv_norm, spatial
from structrep.registry import rule
from structrep.rules.branches import AVERAGE, CHAIN


def _example() -> nn.Module:
    sizes = (((3, 3), (1, 1)), ((1, 3), (0, 1)), ((3, 1), (1, 0)), ((1, 1), (0, 0)))
    convs = (nn.Sequential(nn.Conv2d(8, 8, k, padding=p, bias=False), nn.BatchNorm2d(8)) for k, p in sizes)
    return Branches(*convs, nn.BatchNorm2d(8))


@rule(
    Sum(
        conv_norm(spatial).named("dense"),
        Many(AVERAGE | CHAIN | conv_norm() | Affine() | Identity(), least=3).named("branches"),
    ),
    source="DyRep, arXiv:2204.00868, section 3.2",
    example=_example,
    counter_examples=[
        (
            "",
            lambda: Branches(
                nn.Conv2d(8, 8, 3, padding=1), *(nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU()) for _ in "abc")
            ),
        ),
    ],
    published="The authors' (hunto/image_classification_sota at 6f7a70a) computes 1/9 in float32: off by 2e-9 to "
    "8e-9 in a float64 model.",
)
def dyrep(dense: ConvMap, branches: list[ConvMap]) -> ConvMap:
    return dense + sum(branches)
